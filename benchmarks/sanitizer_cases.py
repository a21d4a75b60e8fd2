"""The smallest shapes that reach every part of the CUDA C++ kernels, in every type and on every tile, for
compute-sanitizer, under which a kernel takes many times as long:

    compute-sanitizer --tool memcheck python benchmarks/sanitizer_cases.py

Arguments are made and results are checked on the CPU, so that on the GPU next to nothing but these kernels runs. Each
result is compared with float64. Leaves with 1 where one is wrong or a tile was never used.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, whatever else is installed

from resnet_fast.choose import CUDA_TILES
from resnet_fast.measure import relative_rms
from resnet_fast.ops import (
    avg_pool_flatten_ref,
    batch_norm_relu_projection_ref,
    batch_norm_relu_ref,
    batch_norm_statistics_ref,
    conv_bn_relu_ref,
    max_pool_ref,
    max_pool_with_indices_ref,
)
from resnet_fast.ops.arguments import pack_bits

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Relative to float64, of operands that are rounded to it already; float32 is multiplied as TF32.
TOLERANCES = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-3}
OPS = torch.ops.resnet_fast

# Chunks of 16 bytes, steps of the reduction (16 or 32 channels), pipelines longer than it, and edges in pixels and
# filters. Windows of several taps with stride 1 also go through the tiles that read their input once.
CONVOLUTIONS = {
    "1x1": dict(c=8, k=8, kernel=1),
    "1x1, several steps": dict(c=136, k=72, kernel=1),
    "1x1 strided": dict(c=32, k=40, kernel=1, stride=2),
    "3x3": dict(c=40, k=72, residual=True),
    "3x3, more than a tile": dict(c=16, k=136, h=13, w=12),
    "3x3 strided": dict(c=16, k=24, stride=2, h=7, residual=True),
    "3x3 dilated": dict(c=16, k=16, dilation=2, padding=2),
    "3x3, one pixel": dict(c=16, k=16, h=1, w=1),
    "stem": dict(c=3, k=64, kernel=7, stride=2, padding=3, h=11, w=10),
    "1 channel": dict(c=1, k=7),
    "unaligned channels": dict(c=13, k=9, residual=True),
    "unaligned filters": dict(c=16, k=33, residual=True),
    "unaligned pointers": dict(c=16, k=16, residual=True, offset=1),
    "groups": dict(c=32, k=48, groups=2, residual=True),
    "depthwise": dict(c=6, k=6, groups=6),
    "no ReLU": dict(c=16, k=16, relu=False),
    "bare": dict(c=16, k=16, affine=False),
}
MAPS = {
    "aligned": (2, 16, 7, 6),
    "unaligned channels": (2, 13, 5, 6),
    "wide": (1, 264, 3, 3),
    "one": (1, 1, 3, 3),
    "several chunks": (1, 256, 5, 15),
}
POOLS = {
    "3x3 s2": ([3, 3], [2, 2], [1, 1], [1, 1]),
    "unequal": ([2, 3], [1, 2], [1, 0], [1, 1]),
    "dilated": ([2, 2], [1, 1], [1, 1], [2, 2]),
}


def placed(t: Tensor | None, offset: int, device: str) -> Tensor | None:
    """A copy on the device, maps in channels_last, that begins so many elements behind the start of its memory."""
    if t is None:
        return None
    dense = t.permute(0, 2, 3, 1).contiguous() if t.dim() == 4 else t.contiguous()
    moved = torch.cat([dense.new_zeros(offset), dense.flatten()]).to(device)[offset:].view(dense.shape)
    return moved.permute(0, 3, 1, 2) if t.dim() == 4 else moved


class Cases:
    """Runs them on a device, and counts."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.done, self.wrong, self.tiles = Counter(), [], set()

    def check(self, name: str, out: Tensor, exact: Tensor) -> None:
        dtype = out.dtype
        error = relative_rms(out.cpu(), exact)
        self.done[name.split(",")[0]] += 1
        if not error < TOLERANCES[dtype]:
            self.wrong.append(f"{name}, {dtype}: relative RMS {error:.1e}")

    def convolution(self, case: str, dtype: torch.dtype) -> None:
        """On every tile that takes it."""
        tensors, numbers, offset = convolution(**CONVOLUTIONS[case], dtype=dtype)
        exact = conv_bn_relu_ref(*(None if t is None else t.double() for t in tensors), *numbers)
        moved = [placed(t, offset, self.device) for t in tensors]
        for tile in (-1, *range(len(CUDA_TILES))):
            try:
                out = OPS._conv_bn_relu_cuda(*moved, *numbers, tile)
            except RuntimeError as error:
                if tile >= 0 and "does not take this convolution" in str(error):
                    continue
                raise
            self.tiles.add((tile, dtype))
            self.check(f"conv_bn_relu, {case}, {CUDA_TILES[tile] if tile >= 0 else 'chosen tile'}", out, exact)

    def maps(self, case: str, dtype: torch.dtype) -> None:
        """The operators on maps alone, on one that begins between vectors too."""
        x, y = torch.randn(2, *MAPS[case]).to(dtype)
        for offset in (0, 1):
            a, b = (placed(t, offset, self.device) for t in (x, y))
            name = f"{case}, {offset} off"
            self.check(f"add_relu, {name}", OPS._add_relu_cuda(a, b), torch.relu(x.double() + y.double()))
            self.check(f"avg_pool_flatten, {name}", OPS._avg_pool_flatten_cuda(a), avg_pool_flatten_ref(x.double()))
            for pool, how in POOLS.items():
                exact = max_pool_ref(x.double(), *how, False)
                out = OPS._max_pool_cuda(a, *how, list(exact.shape[2:]))
                self.check(f"max_pool, {name}, {pool}", out, exact)
                self.max_pool_with_indices(f"{name}, {pool}", x, a, how, offset)

    def max_pool_with_indices(self, name: str, x: Tensor, moved: Tensor, how: tuple, offset: int) -> None:
        leaf = x.double().requires_grad_()
        with torch.enable_grad():
            exact, places = max_pool_with_indices_ref(leaf, *how)
        out, indices = OPS._max_pool_with_indices_cuda(moved, *how, list(exact.shape[2:]))
        self.check(f"max_pool_with_indices, {name}", out, exact.detach())
        self.check(f"max_pool_with_indices, {name}, indices", indices.float() + 1, places.double() + 1)
        grad = torch.randn(exact.shape).to(x.dtype)
        found = OPS._max_pool_backward_cuda(placed(grad, offset, self.device), indices, *how, list(x.shape[2:]))
        self.check(f"max_pool_backward, {name}", found, torch.autograd.grad(exact, leaf, grad.double())[0])

    def norms(self, case: str, dtype: torch.dtype) -> None:
        """Batch normalisation in training: alone, and with a shortcut that is normalised too and a mask."""
        x, grad, shortcut = torch.randn(3, *MAPS[case]).to(dtype)
        vectors = list(torch.rand(3, x.shape[1]) + 0.5)
        leaves = [t.double().requires_grad_() for t in (x, *vectors[:2], shortcut, vectors[2])]
        with torch.enable_grad():
            exact = {3: batch_norm_relu_ref(*leaves[:3]), 5: batch_norm_relu_projection_ref(*leaves, None)}
        for offset, count in itertools.product((0, 1), exact):
            name, two, right = f"{case}, {offset} off, {count} gradients", count == 5, exact[count]
            a, g, s = (placed(t, offset, self.device) for t in (x, grad, shortcut))
            weight, bias, other = (v.to(self.device) for v in vectors)
            statistics = OPS._batch_norm_statistics_cuda(a)
            for found, of in zip(statistics, batch_norm_statistics_ref(x.double()), strict=True):
                self.check(f"batch_norm_statistics, {name}", found, of)
            running = OPS._update_running_stats_cuda_(weight.clone(), bias.clone(), *statistics, 0.25, 8)
            right_mean = 0.75 * vectors[0] + 0.25 * x.double().mean((0, 2, 3))
            self.check(f"update_running_stats_, {name}", running, right_mean)
            norm = (a, *statistics, weight, bias, 1e-5)
            second = (s, *OPS._batch_norm_statistics_cuda(s), other) if two else (None,) * 4
            out, mask = OPS._batch_norm_relu_cuda(*norm, *second, None, 1e-5, True, two)
            self.check(f"batch_norm_relu, {name}", out, right.detach())
            if two and not torch.equal(mask.cpu(), pack_bits(~(out.cpu() <= 0))):
                self.wrong.append(f"batch_norm_relu, {name}, {dtype}: the mask")
            grads = OPS._batch_norm_relu_backward_cuda(g, *norm, mask if two else None, *second, 1e-5, True, False)
            for found, of in zip(
                grads, torch.autograd.grad(right, leaves[:count], grad.double(), retain_graph=True), strict=False
            ):
                self.check(f"batch_norm_relu_backward, {name}", found, of)


def convolution(
    c: int, k: int, kernel: int = 3, stride: int = 1, padding: int | None = None, dilation: int = 1, groups: int = 1,
    h: int = 5, w: int = 6, residual: bool = False, relu: bool = True, affine: bool = True, offset: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor | None], tuple, int]:  # fmt: skip
    """Arguments of conv_bn_relu: tensors and the rest, with how far from the start of its memory each tensor begins."""
    padding = kernel // 2 if padding is None else padding
    fan_in = c // groups * kernel**2
    x, weight = torch.randn(2, c, h, w), torch.randn(k, c // groups, kernel, kernel) / fan_in**0.5
    vectors = [torch.rand(k) + 0.5 for _ in range(5)]
    tensors = [x.to(dtype), weight.to(dtype), vectors[0].to(dtype), *vectors[1:], None]
    if not affine:
        tensors[2:5] = [None] * 3
    numbers = ([stride] * 2, [padding] * 2, [dilation] * 2, groups, 1e-5, relu)
    if residual:
        tensors[7] = torch.randn(conv_bn_relu_ref(*tensors, *numbers).shape).to(dtype)
    return tensors, numbers, offset


@torch.no_grad()
def run(device: str) -> Cases:
    torch.manual_seed(0)
    cases = Cases(device)
    for dtype in DTYPES:
        for case in CONVOLUTIONS:
            cases.convolution(case, dtype)
        for case in MAPS:
            cases.maps(case, dtype)
            cases.norms(case, dtype)
    unused = set(itertools.product(range(-1, len(CUDA_TILES)), DTYPES)) - cases.tiles
    cases.wrong += [f"tile {CUDA_TILES[tile]} was never used in {dtype}" for tile, dtype in unused]
    return cases


def main() -> int:
    cases = run("cuda")
    torch.cuda.synchronize()
    print(", ".join(f"{count} of {name}" for name, count in cases.done.items()))
    print("\n".join(cases.wrong) or "all right")
    return int(bool(cases.wrong))


if __name__ == "__main__":
    sys.exit(main())
