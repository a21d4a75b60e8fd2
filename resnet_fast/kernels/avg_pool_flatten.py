"""avg_pool_flatten in Triton: the mean over height and width, over NHWC.

A program sums all pixels of one image for a block of channels. The launcher relies on the checks of
ops/avg_pool_flatten.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import shared

# A tile is one 128-bit access of every thread. A run of tiles has its loads under way at the same time. Where channels
# are read one by one, a tile is 4 (float32) or 8 loads of a thread: 128 of them take 254 registers on sm_80 and sm_100.
_WARPS = 4
_TILE_BYTES = 16 * 32 * _WARPS
_MOST_LOADS, _MOST_LOADS_OF_ELEMENTS = 16, 32

# Of a pixel a program takes a cache line. Where that makes too few programs to keep a GPU busy (an H100 has 132
# multiprocessors), it takes less, down to what memory moves at least.
_MOST_BYTES, _LEAST_BYTES = 128, 32
_ENOUGH_PROGRAMS = 128


@triton.jit(do_not_specialize=["pixels"])
def avg_pool_flatten_kernel(
    input,  # [N, pixels, C]
    out,  # [N, C]
    pixels,
    C: tl.constexpr,
    WIDE: tl.constexpr,  # offsets in 64 bits
    TILES: tl.constexpr,  # of a run
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    channel_tiles = tl.cdiv(C, BLOCK_C)
    n = pid // channel_tiles
    lane = tl.arange(0, BLOCK_P)
    if WIDE:  # from here on; a grid fits into 32 bits
        n, lane = n.to(tl.int64), lane.to(tl.int64)
    c = pid % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = input + n * pixels * C + c

    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    left = pixels
    while left > 0:
        # Runs are summed before they are added to the total: a sum of sums loses less than one long sum.
        run = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
        for tile in tl.static_range(TILES):
            pixel = tile * BLOCK_P + lane
            ok = (pixel < left)[:, None]
            if C % BLOCK_C != 0:
                ok = ok & (c < C)[None, :]
            run += tl.load(columns[None, :] + pixel[:, None] * C, mask=ok, other=0.0).to(tl.float32)
        total += run
        columns += TILES * BLOCK_P * C
        left -= TILES * BLOCK_P
    mean = tl.div_rn(tl.sum(total, axis=0), pixels.to(tl.float32))
    tl.store(out + n * C + c, mean.to(out.dtype.element_ty), mask=c < C)


def _block_c(n: int, c: int, element_size: int) -> int:
    block = min(triton.next_power_of_2(c), _MOST_BYTES // element_size)
    while n * triton.cdiv(c, block) < _ENOUGH_PROGRAMS and block * element_size > _LEAST_BYTES:
        block //= 2
    return block


def _most_tiles(x: Tensor) -> int:
    """Of a run; x is channels_last."""
    return _MOST_LOADS if shared.has_vectors(x) else _MOST_LOADS_OF_ELEMENTS * x.element_size() // 16


def avg_pool_flatten_triton(input: Tensor, out: Tensor) -> Tensor:
    """Writes the means of ``input`` [N, C, H, W], any strides, into ``out`` [N, C], contiguous, and returns it."""
    if input.numel() == 0:
        return out.fill_(math.nan)  # of empty maps, as torch's; out itself may be empty too
    x = input.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    block_c = _block_c(n, c, x.element_size())
    block_p = min(triton.next_power_of_2(h * w), _TILE_BYTES // (block_c * x.element_size()))
    with shared.on_device_of(out):
        avg_pool_flatten_kernel[(n * triton.cdiv(c, block_c),)](
            x, out, h * w,
            C=c, WIDE=x.numel() > shared.MOST_INT32,
            TILES=min(_most_tiles(x), triton.next_power_of_2(triton.cdiv(h * w, block_p))),
            BLOCK_P=block_p, BLOCK_C=block_c, num_warps=_WARPS,
        )  # fmt: skip
    return out
