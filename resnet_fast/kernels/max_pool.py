"""max_pool in Triton: the largest value under a moving kernel, over NHWC.

A program computes a [BLOCK_M, BLOCK_C] tile: output pixels (n, p, q) and their channels, so that every access is a run
of channels. Neighbouring windows overlap: what is read again comes from the caches. The launcher relies on the checks
of ops/max_pool.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import triton_interpreted
from . import shared

# Elements of a program, its warps, and its channels at most. A thread has 8 elements: one 128-bit access of 16-bit
# elements, two of float32; 64 channels of 16 bits fill a cache line.
_BLOCK = 1024
_WARPS = 4
_MOST_CHANNELS = 64
_INTERPRETER_BLOCK = 2**14  # an operation costs 70 us there whatever the tile's size

# Taps whose loads are under way at the same time: all of a 3x3 or 4x4 kernel. Where channels are read one by one, every
# tap is 8 loads with an address and a mask each: with 9 of them sm_100 spills (float32, 64-bit offsets, Triton 3.6).
_UNROLLED, _UNROLLED_ELEMENTS = 16, 3


# Sizes that only bound a mask are not specialized: a new batch or image size must not compile a new kernel.
@triton.jit(do_not_specialize=["rows", "H", "W", "P", "Q"])
def max_pool_kernel(
    input,  # [N, H, W, C]
    out,  # [N, P, Q, C]
    rows,  # N * P * Q
    H, W, P, Q,
    C: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    WIDE: tl.constexpr,  # offsets in 64 bits
    UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    channel_tiles = tl.cdiv(C, BLOCK_C)
    tile_m = pid // channel_tiles
    if WIDE:  # from here on; a grid fits into 32 bits
        tile_m = tile_m.to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = (m < rows)[:, None]
    if C % BLOCK_C != 0:
        ok = ok & (c < C)[None, :]

    # The corner of each output pixel's window; it may lie in the padding, left of or above the image.
    row = m // Q
    h0 = row % P * STRIDE_H - PAD_H
    w0 = m % Q * STRIDE_W - PAD_W
    corner = input + ((row // P * H + h0) * W + w0)[:, None] * C + c[None, :]

    largest = tl.full((BLOCK_M, BLOCK_C), float("-inf"), dtype=tl.float32)
    for tap in tl.range(0, R * S, loop_unroll_factor=UNROLL):
        r = tap // S
        s = tap % S
        if WIDE:
            r, s = r.to(tl.int64), s.to(tl.int64)
        h = h0 + r * DIL_H
        w = w0 + s * DIL_W
        inside = ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & ok
        offset = (r * DIL_H * W + s * DIL_W) * C
        x = tl.load(corner + offset, mask=inside, other=float("-inf")).to(tl.float32)
        # NaN wins, and of equal values the first; a maximum alone takes 0.0 of -0.0 and 0.0. In 16 bits Triton 3.8
        # makes instructions on pairs of values of it: 384 in all for a 3x3 kernel on sm_90, but 512 where it is written
        # `where((x > largest) | (x != x), x, largest)`.
        larger = tl.maximum(x, largest, propagate_nan=tl.PropagateNan.ALL)
        largest = tl.where(x == largest, largest, larger)
    tl.store(out + m[:, None] * C + c[None, :], largest.to(out.dtype.element_ty), mask=ok)


def max_pool_triton(
    input: Tensor,  # [N, C, H, W], any strides
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out: Tensor,  # [N, C, P, Q], channels_last, not empty; its size says whether a last window is cut off
) -> Tensor:
    """Writes max_pool2d(input) into ``out`` and returns it."""
    x = input.contiguous(memory_format=torch.channels_last)
    n, c, p, q = out.shape
    block_c = min(triton.next_power_of_2(c), _MOST_CHANNELS)
    block_m = (_INTERPRETER_BLOCK if triton_interpreted() else _BLOCK) // block_c
    with shared.on_device_of(out):
        max_pool_kernel[(triton.cdiv(n * p * q, block_m) * triton.cdiv(c, block_c),)](
            x, out,
            n * p * q, *x.shape[2:], p, q,
            C=c, R=kernel_size[0], S=kernel_size[1],
            STRIDE_H=stride[0], STRIDE_W=stride[1],
            PAD_H=padding[0], PAD_W=padding[1],
            DIL_H=dilation[0], DIL_W=dilation[1],
            WIDE=shared.needs_int64(x, padding, out),
            UNROLL=min(kernel_size[0] * kernel_size[1], _UNROLLED if shared.has_vectors(x) else _UNROLLED_ELEMENTS),
            BLOCK_M=block_m, BLOCK_C=block_c, num_warps=_WARPS,
        )  # fmt: skip
    return out
