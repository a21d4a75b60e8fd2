"""Run by test_conv_cpu.py in a process of its own: inputs, weights and residuals that end where memory does.

A read behind them is a segmentation fault.
"""

import ctypes
import mmap

import torch

ops = torch.ops.resnet_fast
libc = ctypes.CDLL(None, use_errno=True)
keep = []


def at_the_end(t: torch.Tensor) -> torch.Tensor:
    """A copy of ``t``, in the order of its dimensions, behind whose last byte lies a page that cannot be read."""
    page, size = mmap.PAGESIZE, t.numel() * t.element_size()
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if libc.mprotect(ctypes.c_void_p(address + pages * page), page, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    keep.append(memory)
    start = pages * page - size
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=start).view(t.shape)
    return copy.copy_(t)


def channels_last(t: torch.Tensor) -> torch.Tensor:
    return at_the_end(t.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


def main() -> None:
    from resnet_fast.kernels.packing import pack_few_channels  # and registers the operators

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for c, k, h, w in (
            (1, 1, 1, 1),
            (3, 5, 7, 6),
            (7, 9, 5, 5),
            (8, 8, 8, 8),
            (17, 15, 9, 4),
            (33, 66, 3, 11),
            (34, 66, 7, 5),
        ):
            x, residual = channels_last(torch.randn(2, c, h, w).to(dtype)), torch.randn(2, k, h, w).to(dtype)
            weight, bias = at_the_end(torch.randn(k, c, 3, 3)), at_the_end(torch.randn(k))
            point, residual = at_the_end(torch.randn(k, c, 1, 1)), channels_last(residual)
            geometry = ([1, 1], [1, 1], [1, 1])
            ops._conv_gemm(x, at_the_end(ops._pack_gemm(weight, 1)), bias, residual, *geometry, 1, True)
            packed = at_the_end(ops._pack_gemm(point, 1))
            ops._conv_gemm(x, packed, bias, residual, [1, 1], [0, 0], [1, 1], 1, True)
            for groups in (1, c):  # with c groups: c filters of one channel each
                in_groups = at_the_end(torch.randn(k, c, 3, 3) if groups == 1 else torch.randn(c, 1, 3, 3))
                packed, filters = at_the_end(ops._pack_grouped(in_groups, groups)), in_groups.shape[0]
                added = residual if groups == 1 else x
                ops._conv_grouped(x, packed, at_the_end(torch.randn(filters)), added, *geometry, groups, True)
            if dtype == torch.bfloat16 and ops._multiplies_bf16() and c % 2 == 0:
                packed = at_the_end(ops._pack_grouped(weight, 1, True))
                ops._conv_grouped(x, packed, bias, residual, *geometry, 1, True)
                packed = at_the_end(ops._pack_grouped(at_the_end(torch.randn(c, 2, 3, 3)), c // 2, True))
                ops._conv_grouped(x, packed, at_the_end(torch.randn(c)), x, *geometry, c // 2, True)
            depthwise = at_the_end(torch.randn(3, 3, c))
            ops._conv_depthwise(x, depthwise, at_the_end(torch.randn(c)), x, *geometry, True)
            for tile in (2, 4, 5):
                packed = at_the_end(ops._pack_winograd(weight, tile))
                ops._conv_winograd(x, packed, bias, residual, [1, 1], True)
            if dtype == torch.bfloat16 and ops._multiplies_bf16():
                packed = at_the_end(ops._pack_winograd(weight, 2, True))
                ops._conv_winograd(x, packed, bias, residual, [1, 1], True)
                packed = at_the_end(ops._pack_gemm(weight, 1, True))
                ops._conv_gemm(x, packed, bias, residual, *geometry, 1, True)
                packed = at_the_end(ops._pack_gemm(point, 1, True))
                ops._conv_gemm(x, packed, bias, residual, [1, 1], [0, 0], [1, 1], 1, True)
            if c <= 4:
                packed = at_the_end(ops._pack_winograd_stem(at_the_end(torch.randn(k, c, 7, 7))))
                ops._conv_winograd_stem(x, packed, bias, [3, 3], True)
                for bfloat16 in {False, dtype == torch.bfloat16 and ops._multiplies_bf16()}:
                    packed = at_the_end(pack_few_channels(weight, [1, 1], bfloat16))
                    ops._conv_few_channels(x, packed, bias, *geometry, True)
    canary = at_the_end(torch.zeros(4))
    print("read nothing behind the end", flush=True)
    ctypes.string_at(canary.data_ptr(), 17)  # that the pages are protected


if __name__ == "__main__":
    main()
