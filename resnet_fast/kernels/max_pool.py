"""max_pool in Triton: the largest value under a moving kernel, over NHWC; and, for training, with where it was found.

A program computes a [BLOCK_M, BLOCK_C] tile: output pixels (n, p, q) and their channels, so that every access is a run
of channels. Neighbouring windows overlap: what is read again comes from the caches. The gradient gathers: a program
computes input pixels from the outputs that saw them. The launchers rely on the checks of ops/max_pool.py and
ops/max_pool_with_indices.py.
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

# Outputs of the gradient's likewise: the 4 that see a pixel of a 3x3 kernel with stride 2, the 9 with stride 1.
_UNROLLED_OUTPUTS = 9


# Sizes that only bound a mask are not specialized: a new batch or image size must not compile a new kernel.
@triton.jit(do_not_specialize=["rows", "H", "W", "P", "Q"])
def max_pool_kernel(
    input,  # [N, H, W, C]
    out,  # [N, P, Q, C]
    indices,  # [N, P, Q, C], uint8: the tap that each value is of; or None
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
    if indices is not None:  # at first of the first tap inside of the map: where all are -inf nothing is larger
        first = tl.cdiv(tl.maximum(-h0, 0), DIL_H) * S + tl.cdiv(tl.maximum(-w0, 0), DIL_W)
        index = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.int32) + first.to(tl.int32)[:, None]
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
        if indices is not None:
            takes = (x > largest) | (x != x)  # of equal values the first, of NaNs the last, as in torch
            index = tl.where(takes, tap, index)
            largest = tl.where(takes, x, largest)
        else:
            # NaN wins, and of equal values the first; a maximum alone takes 0.0 of -0.0 and 0.0. In 16 bits Triton 3.8
            # makes instructions on pairs of values of it: 384 in all for a 3x3 kernel on sm_90, but 512 where it is
            # written as above.
            larger = tl.maximum(x, largest, propagate_nan=tl.PropagateNan.ALL)
            largest = tl.where(x == largest, largest, larger)
    offsets = m[:, None] * C + c[None, :]
    tl.store(out + offsets, largest.to(out.dtype.element_ty), mask=ok)
    if indices is not None:
        tl.store(indices + offsets, index.to(tl.uint8), mask=ok)


@triton.jit(do_not_specialize=["rows", "H", "W", "P", "Q"])
def max_pool_backward_kernel(
    grad,  # [N, P, Q, C]
    indices,  # [N, P, Q, C], uint8
    out,  # [N, H, W, C]
    rows,  # N * H * W
    H, W, P, Q,
    C: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    MOST_H: tl.constexpr, MOST_W: tl.constexpr,  # outputs that can see a pixel, one below the other and side by side
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

    # Where each input pixel lies in the padded map, and the first of the outputs that may have seen it.
    row = m // W
    h = row % H + PAD_H
    w = m % W + PAD_W
    p0 = h // STRIDE_H - (MOST_H - 1)
    q0 = w // STRIDE_W - (MOST_W - 1)
    corner = (row // H * P + p0) * Q + q0

    total = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for i in tl.range(0, MOST_H * MOST_W, loop_unroll_factor=UNROLL):  # in the order in which torch adds them
        p = p0 + i // MOST_W
        q = q0 + i % MOST_W
        # The tap under which that output has the pixel, if the pixel is under one at all.
        down = h - p * STRIDE_H
        across = w - q * STRIDE_W
        tap = down // DIL_H * S + across // DIL_W
        sees = (p >= 0) & (p < P) & (down < R * DIL_H) & (q >= 0) & (q < Q) & (across < S * DIL_W)
        if DIL_H > 1 or DIL_W > 1:
            sees = sees & (down % DIL_H == 0) & (across % DIL_W == 0)
        offsets = (corner + i // MOST_W * Q + i % MOST_W)[:, None] * C + c[None, :]
        index = tl.load(indices + offsets, mask=sees[:, None] & ok, other=0)
        g = tl.load(grad + offsets, mask=sees[:, None] & ok, other=0.0).to(tl.float32)
        total += tl.where(index.to(tl.int32) == tap.to(tl.int32)[:, None], g, 0.0)
    tl.store(out + m[:, None] * C + c[None, :], total.to(out.dtype.element_ty), mask=ok)


def _block_of(channels: int) -> dict[str, int]:
    block_c = min(triton.next_power_of_2(channels), _MOST_CHANNELS)
    block_m = (_INTERPRETER_BLOCK if triton_interpreted() else _BLOCK) // block_c
    return dict(C=channels, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=_WARPS)


def _grid(rows: int, block: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(rows, block["BLOCK_M"]) * triton.cdiv(block["C"], block["BLOCK_C"]),)


def _geometry(kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> dict[str, int]:
    names = ("R", "S"), ("STRIDE_H", "STRIDE_W"), ("PAD_H", "PAD_W"), ("DIL_H", "DIL_W")
    pairs = (kernel_size, stride, padding, dilation)
    return {name: n for pair, of in zip(pairs, names, strict=True) for name, n in zip(of, pair, strict=True)}


def max_pool_triton(
    input: Tensor,  # [N, C, H, W], any strides
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out: Tensor,  # [N, C, P, Q], channels_last, not empty; its size says whether a last window is cut off
    indices: Tensor | None = None,  # [N, C, P, Q], uint8, channels_last
) -> Tensor:
    """Writes max_pool2d(input) into ``out``, and which tap each value is of into ``indices``, and returns ``out``."""
    x = input.contiguous(memory_format=torch.channels_last)
    n, c, p, q = out.shape
    block = _block_of(c)
    with shared.on_device_of(out):
        max_pool_kernel[_grid(n * p * q, block)](
            x, out, indices,
            n * p * q, *x.shape[2:], p, q,
            **_geometry(kernel_size, stride, padding, dilation),
            WIDE=shared.needs_int64(x, padding, out),
            UNROLL=min(kernel_size[0] * kernel_size[1], _UNROLLED if shared.has_vectors(x) else _UNROLLED_ELEMENTS),
            **block,
        )  # fmt: skip
    return out


def max_pool_with_indices_triton(
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out: Tensor,
    indices: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `max_pool_triton`; returns both."""
    return max_pool_triton(input, kernel_size, stride, padding, dilation, out, indices), indices


def max_pool_backward_triton(
    grad: Tensor,  # [N, C, P, Q], any strides, not empty
    indices: Tensor,  # [N, C, P, Q], uint8
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out: Tensor,  # [N, C, H, W], channels_last
) -> Tensor:
    """Writes the gradient of the input of max-pooling into ``out`` and returns it."""
    g, places = (t.contiguous(memory_format=torch.channels_last) for t in (grad, indices))
    n, c, h, w = out.shape
    block = _block_of(c)
    most = [(kernel_size[d] - 1) * dilation[d] // stride[d] + 1 for d in (0, 1)]
    with shared.on_device_of(out):
        max_pool_backward_kernel[_grid(n * h * w, block)](
            g, places, out,
            n * h * w, h, w, *g.shape[2:],
            **_geometry(kernel_size, stride, padding, dilation),
            MOST_H=most[0], MOST_W=most[1],
            WIDE=shared.needs_int64(out, [0, 0], g),
            UNROLL=min(most[0] * most[1], _UNROLLED_OUTPUTS if shared.has_vectors(g) else 1),
            **block,
        )  # fmt: skip
    return out
