"""batch_norm_relu in Triton: the statistics of a batch, what is normalised with them, and the gradient, over NHWC.

All of it is bound by memory. A program takes a chunk of pixels of a block of channels, tile by tile. How a map is cut
depends on its size alone, and nothing is added up by atomics: results are the same in every run and on every GPU. What
is summed over all pixels takes one more, tiny kernel. The launchers rely on the checks of ops/batch_norm_relu.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.arguments import empty_channels_last, packed_bits_size
from . import shared
from .shared import batch_norm_vectors, relu

# The lanes of a tile are as many pixels as all threads read with one 128-bit access each; a tile has a run of them,
# whose loads are under way at the same time. Where channels are read one by one, an access is 4 (float32) or 8 loads.
_WARPS = 4
_LANES_BYTES = 16 * 32 * _WARPS
_RUN_OF_MOMENTS, _RUN, _RUN_OF_FIVE_MAPS = 8, 4, 2

# Of a pixel a program takes a cache line, but no less than what a byte of the mask stands for.
_MOST_BYTES, _LEAST_CHANNELS = 128, 8

# Programs at most: 8 on each multiprocessor of an H100, which has 132. They are so many chunks at most, too, and one
# program combines those of a few channels at a time.
_PROGRAMS = 1024
_COMBINING_WARPS, _COMBINED, _MOST_COMBINED_CHANNELS = 8, 4096, 32


@triton.jit
def share_of_program(pixels, chunk, C, BLOCK_C: tl.constexpr):
    """Its chunk, the first pixel of that, the one behind the last, its block of channels, and these, [BLOCK_C]."""
    blocks = tl.cdiv(C, BLOCK_C)
    i = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    begin = i.to(tl.int64) * chunk  # with one 64-bit scalar the offsets inside of a tile stay 32-bit
    return i, begin, tl.minimum(begin + chunk, pixels), block, block * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def existing(row, left, c, C, WHOLE: tl.constexpr):
    """Which values of a tile exist where so many pixels are left, [P, BLOCK_C] (or [P, 1])."""
    ok = (row < left)[:, None]
    if not WHOLE:
        ok = ok & (c < C)[None, :]
    return ok


@triton.jit
def moments_along_first(mean, m2, count, total):
    """Mean (as a rounded one and what it lacks) and sum of squared deviations of parts that have theirs, along axis 0
    (Chan, Golub and LeVeque, 1979). Parts that count 0 add nothing; ``total``: the sum of the counts."""
    share = 1.0 / tl.maximum(total, 1.0)
    rounded = tl.sum(mean * count, axis=0) * share
    deviation = mean - rounded[None]
    weighted = deviation * count
    lacks = tl.sum(weighted, axis=0) * share
    return rounded, lacks, tl.sum(m2 + deviation * weighted, axis=0) - lacks * lacks * total


@triton.jit
def pixels_of_lane(lane, pixels, LANES: tl.constexpr):
    """How many of so many pixels each lane has."""
    return (pixels - lane + LANES - 1) // LANES  # never below 0: lanes are numbers below LANES


@triton.jit(do_not_specialize=["pixels", "chunk", "units"])
def batch_norm_moments_kernel(
    input,  # [pixels, C]
    moments,  # [chunks, 2, C], float64: mean and sum of squared deviations
    pixels,
    chunk,  # pixels of one
    units,  # C / UNIT
    UNIT: tl.constexpr,  # the compiler knows it to divide C, and needs no kernel of its own for every C
    WHOLE: tl.constexpr,  # BLOCK_C divides C
    RUN: tl.constexpr, LANES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = units * UNIT
    i, begin, end, _, c = share_of_program(pixels, chunk, C, BLOCK_C)
    lane = tl.arange(0, LANES)[:, None]
    pixel = tl.arange(0, RUN)[:, None, None] * LANES + lane[None]
    row = tl.arange(0, RUN * LANES)
    offsets = row[:, None] * C + c[None, :]
    # Sums are of the distance to the first pixel: float32 would lose digits in a mean much larger than the deviation.
    first = tl.load(input + begin * C + c, mask=c < C, other=0.0).to(tl.float32)

    # Of every lane. The moments of a run are made in registers, in two passes; only the last run may lack pixels.
    mean = tl.zeros((LANES, BLOCK_C), dtype=tl.float32)
    m2 = tl.zeros((LANES, BLOCK_C), dtype=tl.float32)
    for start in range(begin, end, RUN * LANES):
        left = (end - start).to(tl.int32)
        ok = existing(row, left, c, C, WHOLE)
        x = tl.reshape(tl.load(input + start * C + offsets, mask=ok, other=0.0).to(tl.float32), (RUN, LANES, BLOCK_C))
        count = tl.minimum(pixels_of_lane(lane, left, LANES), RUN).to(tl.float32)
        if left >= RUN * LANES:  # 3 multiplications a value less
            rounded, lacks, squares = moments_along_first(x, 0.0, 1.0, count)
        else:
            rounded, lacks, squares = moments_along_first(x, 0.0, (pixel < left).to(tl.float32), count)
        before = ((start - begin) // LANES).to(tl.float32)
        share = count / tl.maximum(before + count, 1.0)
        delta = (rounded - first[None, :]) + lacks - mean
        mean += delta * share
        m2 += squares + delta * delta * (before * share)

    pixels_here = (end - begin).to(tl.int32)
    rounded, lacks, squares = moments_along_first(
        mean, m2, pixels_of_lane(lane, pixels_here, LANES).to(tl.float32), pixels_here.to(tl.float32)
    )
    at = moments + i * 2 * C + c
    tl.store(at, first.to(tl.float64) + rounded + lacks, mask=c < C)
    tl.store(at + C, squares.to(tl.float64), mask=c < C)


@triton.jit(do_not_specialize=["pixels", "chunk", "chunks", "C"])
def batch_norm_statistics_kernel(
    moments,  # [chunks, 2, C]
    mean, var,  # [C]
    pixels, chunk, chunks, C,
    CHUNKS: tl.constexpr,  # the next power of 2
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    i = tl.arange(0, CHUNKS)
    ok = (i < chunks)[:, None] & (c < C)[None, :]
    at = moments + i[:, None] * 2 * C + c[None, :]
    count = tl.minimum(pixels - i.to(tl.int64) * chunk, chunk)
    rounded, lacks, squares = moments_along_first(
        tl.load(at, mask=ok, other=0.0),
        tl.load(at + C, mask=ok, other=0.0),
        tl.maximum(count, 0).to(tl.float64)[:, None],
        pixels.to(tl.float64),
    )
    tl.store(mean + c, (rounded + lacks).to(tl.float32), mask=c < C)
    tl.store(var + c, (squares / pixels).to(tl.float32), mask=c < C)


@triton.jit
def not_below(x, dtype: tl.constexpr):
    """Whether what is stored of x passes the ReLU: it is not <= 0. NaN does."""
    return (x.to(dtype).to(tl.float32) <= 0.0) == 0


@triton.jit
def mask_of_tile(mask, start, left, block, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pointers to a tile's bits, [BLOCK_P, BLOCK_C / 8], and which of them exist."""
    bytes = tl.cdiv(C, 8)
    row = tl.arange(0, BLOCK_P)
    byte = block * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    at = mask + start * bytes + (row[:, None] * bytes + byte[None, :])
    return at, (row < left)[:, None] & (byte < bytes)[None, :]


@triton.jit
def packed(flags):
    """[P, C] to [P, C / 8], uint8: bit c % 8 of byte c // 8."""
    P: tl.constexpr = flags.shape[0]
    G: tl.constexpr = flags.shape[1] // 8
    places = tl.arange(0, 8)[None, None, :]
    return tl.sum(tl.reshape(flags.to(tl.int32), (P, G, 8)) << places, axis=2).to(tl.uint8)


@triton.jit
def unpacked(bits):
    """The flags that `packed` has packed."""
    P: tl.constexpr = bits.shape[0]
    C: tl.constexpr = bits.shape[1] * 8
    places = tl.arange(0, 8)[None, None, :]
    return tl.reshape(((bits.to(tl.int32)[:, :, None] >> places) & 1) != 0, (P, C))


@triton.jit(do_not_specialize=["pixels", "chunk", "units", "eps", "residual_eps"])
def batch_norm_relu_kernel(
    input, residual,  # [pixels, C]; no residual: None
    out,  # [pixels, C]
    mask,  # [pixels, ceil(C / 8)] or None
    mean, var, weight, bias,  # [C]; the last two may be None
    residual_mean, residual_var, residual_weight, residual_bias,  # [C], or all None: the residual is taken as it is
    eps, residual_eps,
    pixels, chunk, units,
    UNIT: tl.constexpr, WHOLE: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = units * UNIT
    _, begin, end, block, c = share_of_program(pixels, chunk, C, BLOCK_C)
    mean1, scale, shift = batch_norm_vectors(c, c < C, None, weight, bias, mean, var, eps)
    if residual_mean is not None:
        mean2, scale2, shift2 = batch_norm_vectors(
            c, c < C, None, residual_weight, residual_bias, residual_mean, residual_var, residual_eps
        )
    dtype: tl.constexpr = out.dtype.element_ty
    row = tl.arange(0, BLOCK_P)
    offsets = row[:, None] * C + c[None, :]
    for start in range(begin, end, BLOCK_P):
        left = (end - start).to(tl.int32)
        ok = existing(row, left, c, C, WHOLE)
        x = tl.load(input + start * C + offsets, mask=ok, other=0.0).to(tl.float32)
        y = tl.fma(x - mean1[None, :], scale[None, :], shift[None, :])
        if residual is not None:
            r = tl.load(residual + start * C + offsets, mask=ok, other=0.0).to(tl.float32)
            if residual_mean is not None:
                r = tl.fma(r - mean2[None, :], scale2[None, :], shift2[None, :])
            y += r
        if mask is not None:
            at, byte_ok = mask_of_tile(mask, start, left, block, C, BLOCK_P, BLOCK_C)
            tl.store(at, packed(not_below(y, dtype)), mask=byte_ok)  # of channels that do not exist 0: they are 0
        if RELU:
            y = relu(y)
        tl.store(out + start * C + offsets, y.to(dtype), mask=ok)


@triton.jit
def behind_relu(
    grad,  # [P, C], float32
    centred,  # [P, C]: the map less its mean
    scale, shift,  # [C]
    mask, start, left, block, C,
    RELU: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """The gradient where the mask or, without one, the normalised value lets it through."""
    if mask is not None:
        at, ok = mask_of_tile(mask, start, left, block, C, grad.shape[0], grad.shape[1])
        grad = tl.where(unpacked(tl.load(at, mask=ok, other=0)), grad, 0.0)
    elif RELU:
        # As batch_norm_relu_kernel computes it: one value of another sign would be a wrong gradient.
        grad = tl.where(not_below(tl.fma(centred, scale[None, :], shift[None, :]), dtype), grad, 0.0)
    return grad


@triton.jit(do_not_specialize=["pixels", "chunk", "units", "eps"])
def batch_norm_grad_sums_kernel(
    grad, input, shortcut,  # [pixels, C]; no shortcut that is normalised: None
    mask,  # [pixels, ceil(C / 8)] or None
    sums,  # [chunks, 2 or, with a shortcut, 3, C]: of the gradient, and of its products with what is less its mean
    mean, var, weight, bias,  # [C]; the last two may be None
    shortcut_mean,  # [C] or None
    eps,
    pixels, chunk, units,
    UNIT: tl.constexpr, WHOLE: tl.constexpr,
    RELU: tl.constexpr,
    RUN: tl.constexpr, LANES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = units * UNIT
    i, begin, end, block, c = share_of_program(pixels, chunk, C, BLOCK_C)
    mean1, scale, shift = batch_norm_vectors(c, c < C, None, weight, bias, mean, var, eps)
    row = tl.arange(0, RUN * LANES)
    offsets = row[:, None] * C + c[None, :]
    total = tl.zeros((LANES, BLOCK_C), dtype=tl.float32)
    product = tl.zeros((LANES, BLOCK_C), dtype=tl.float32)
    if shortcut is not None:
        mean2 = tl.load(shortcut_mean + c, mask=c < C, other=0.0).to(tl.float32)
        product2 = tl.zeros((LANES, BLOCK_C), dtype=tl.float32)
    for start in range(begin, end, RUN * LANES):
        left = (end - start).to(tl.int32)
        ok = existing(row, left, c, C, WHOLE)
        g = tl.load(grad + start * C + offsets, mask=ok, other=0.0).to(tl.float32)
        x = tl.load(input + start * C + offsets, mask=ok, other=0.0).to(tl.float32) - mean1[None, :]
        g = behind_relu(g, x, scale, shift, mask, start, left, block, C, RELU, input.dtype.element_ty)
        # Runs are summed before they are added to a total: a sum of sums loses less than one long sum.
        total += tl.sum(tl.reshape(g, (RUN, LANES, BLOCK_C)), axis=0)
        product += tl.sum(tl.reshape(g * x, (RUN, LANES, BLOCK_C)), axis=0)
        if shortcut is not None:
            s = tl.load(shortcut + start * C + offsets, mask=ok, other=0.0).to(tl.float32) - mean2[None, :]
            product2 += tl.sum(tl.reshape(g * s, (RUN, LANES, BLOCK_C)), axis=0)

    at = sums + i * (2 if shortcut is None else 3) * C + c
    tl.store(at, tl.sum(total, axis=0), mask=c < C)
    tl.store(at + C, tl.sum(product, axis=0), mask=c < C)
    if shortcut is not None:
        tl.store(at + 2 * C, tl.sum(product2, axis=0), mask=c < C)


@triton.jit
def grad_vectors(product, total, var, weight, grad_weight, slopes, c, C, eps, pixels):
    """From the sums over all pixels, [BLOCK_C] in float64, the weight's gradient and what batch_norm_grad_kernel adds
    to the map's: slope * (map - mean) + offset."""
    ok = c < C
    invstd = tl.div_rn(1.0, tl.sqrt_rn(tl.load(var + c, mask=ok, other=1.0).to(tl.float32) + eps)).to(tl.float64)
    product *= invstd
    tl.store(grad_weight + c, product.to(tl.float32), mask=ok)
    share = -invstd * tl.div_rn(1.0, pixels.to(tl.float32))
    if weight is not None:
        share *= tl.load(weight + c, mask=ok, other=0.0).to(tl.float64)
    tl.store(slopes + c, (share * invstd * product).to(tl.float32), mask=ok)
    tl.store(slopes + C + c, (share * total).to(tl.float32), mask=ok)


@triton.jit(do_not_specialize=["eps", "shortcut_eps", "pixels", "chunks", "C"])
def batch_norm_grad_vectors_kernel(
    sums,  # [chunks, 2 or 3, C]
    var, weight, shortcut_var, shortcut_weight,  # [C]; all but the first may be None
    grad_weight, grad_bias, grad_shortcut_weight,  # [C]
    slopes,  # [2 or 4, C]
    eps, shortcut_eps,
    pixels, chunks, C,
    CHUNKS: tl.constexpr,  # the next power of 2
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    i = tl.arange(0, CHUNKS)
    ok = (i < chunks)[:, None] & (c < C)[None, :]
    at = sums + i[:, None] * (2 if shortcut_var is None else 3) * C + c[None, :]
    total = tl.sum(tl.load(at, mask=ok, other=0.0).to(tl.float64), axis=0)
    tl.store(grad_bias + c, total.to(tl.float32), mask=c < C)
    product = tl.sum(tl.load(at + C, mask=ok, other=0.0).to(tl.float64), axis=0)
    grad_vectors(product, total, var, weight, grad_weight, slopes, c, C, eps, pixels)
    if shortcut_var is not None:
        product = tl.sum(tl.load(at + 2 * C, mask=ok, other=0.0).to(tl.float64), axis=0)
        grad_vectors(
            product, total, shortcut_var, shortcut_weight, grad_shortcut_weight, slopes + 2 * C, c, C, shortcut_eps,
            pixels,
        )  # fmt: skip


@triton.jit
def slope_and_offset(slopes, c, C):
    return tl.load(slopes + c, mask=c < C, other=0.0)[None, :], tl.load(slopes + C + c, mask=c < C, other=0.0)[None, :]


@triton.jit(do_not_specialize=["eps", "shortcut_eps", "pixels", "chunk", "units"])
def batch_norm_grad_kernel(
    grad, input, shortcut,  # [pixels, C]; no shortcut that is normalised: None
    mask,  # [pixels, ceil(C / 8)] or None
    grad_input,  # [pixels, C]
    grad_residual,  # [pixels, C]: of the shortcut, where there is one, or None
    slopes,  # [2 or 4, C]
    mean, var, weight, bias,  # [C]; the last two may be None
    shortcut_mean, shortcut_var, shortcut_weight,  # [C] or None
    eps, shortcut_eps,
    pixels, chunk, units,
    UNIT: tl.constexpr, WHOLE: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = units * UNIT
    _, begin, end, block, c = share_of_program(pixels, chunk, C, BLOCK_C)
    mean1, scale, shift = batch_norm_vectors(c, c < C, None, weight, bias, mean, var, eps)
    slope, offset = slope_and_offset(slopes, c, C)
    if shortcut is not None:
        mean2, scale2, _ = batch_norm_vectors(
            c, c < C, None, shortcut_weight, None, shortcut_mean, shortcut_var, shortcut_eps
        )
        slope2, offset2 = slope_and_offset(slopes + 2 * C, c, C)
    dtype: tl.constexpr = grad_input.dtype.element_ty
    row = tl.arange(0, BLOCK_P)
    offsets = row[:, None] * C + c[None, :]
    for start in range(begin, end, BLOCK_P):
        left = (end - start).to(tl.int32)
        ok = existing(row, left, c, C, WHOLE)
        g = tl.load(grad + start * C + offsets, mask=ok, other=0.0).to(tl.float32)
        x = tl.load(input + start * C + offsets, mask=ok, other=0.0).to(tl.float32) - mean1[None, :]
        g = behind_relu(g, x, scale, shift, mask, start, left, block, C, RELU, dtype)
        of_input = tl.fma(g, scale[None, :], tl.fma(x, slope, offset))
        tl.store(grad_input + start * C + offsets, of_input.to(dtype), mask=ok)
        if shortcut is not None:
            s = tl.load(shortcut + start * C + offsets, mask=ok, other=0.0).to(tl.float32) - mean2[None, :]
            g = tl.fma(g, scale2[None, :], tl.fma(s, slope2, offset2))
        if grad_residual is not None:
            tl.store(grad_residual + start * C + offsets, g.to(dtype), mask=ok)


class _Cut(NamedTuple):
    """How a map is cut. ``chunk``: pixels of one; ``vectors``: whether it is read in vectors of 16 bytes."""

    pixels: int
    channels: int
    block_c: int
    lanes: int
    chunk: int
    vectors: bool

    @classmethod
    def of(cls, *maps: Tensor) -> _Cut:
        """For maps of one size and dtype [N, C, H, W], channels_last."""
        (n, c, h, w), size = maps[0].shape, maps[0].element_size()
        block_c = max(_LEAST_CHANNELS, min(triton.next_power_of_2(c), _MOST_BYTES // size))
        lanes = _LANES_BYTES // (block_c * size)
        tiles = triton.cdiv(n * h * w, lanes * _RUN_OF_MOMENTS)
        chunks = max(1, _PROGRAMS // triton.cdiv(c, block_c))
        chunk = triton.cdiv(tiles, chunks) * lanes * _RUN_OF_MOMENTS
        return cls(n * h * w, c, block_c, lanes, chunk, all(map(shared.has_vectors, maps)))

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.pixels, self.chunk)

    @property
    def grid(self) -> tuple[int]:
        return (self.chunks * triton.cdiv(self.channels, self.block_c),)

    @property
    def sizes(self) -> dict[str, int]:
        """What every kernel on maps takes."""
        unit = min(self.channels & -self.channels, self.block_c)
        return dict(
            pixels=self.pixels, chunk=self.chunk, units=self.channels // unit,
            UNIT=unit, WHOLE=self.channels % self.block_c == 0, BLOCK_C=self.block_c, num_warps=_WARPS,
        )  # fmt: skip

    def run(self, most: int) -> int:
        """Pixels of a lane in a tile."""
        return most if self.vectors else 1

    @property
    def combining(self) -> tuple[tuple[int], dict[str, int]]:
        """Grid and sizes of a kernel that combines the chunks."""
        chunks = triton.next_power_of_2(self.chunks)
        block_c = min(_MOST_COMBINED_CHANNELS, _COMBINED // chunks)
        sizes = dict(
            pixels=self.pixels, chunks=self.chunks, C=self.channels,
            CHUNKS=chunks, BLOCK_C=block_c, num_warps=_COMBINING_WARPS,
        )  # fmt: skip
        return (triton.cdiv(self.channels, block_c),), sizes


def _channels_last(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous(memory_format=torch.channels_last)


def _contiguous(*vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if v is None else v.contiguous() for v in vectors)


def _vector_like(input: Tensor) -> Tensor:
    return input.new_empty(input.shape[1], dtype=torch.float32)


def batch_norm_statistics_triton(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, [C] in float32 each, of ``input`` [N, C, H, W], any strides, not empty."""
    x = _channels_last(input)
    cut = _Cut.of(x)
    mean, var = _vector_like(x), _vector_like(x)
    moments = x.new_empty(cut.chunks, 2, cut.channels, dtype=torch.float64)
    with shared.on_device_of(x):
        batch_norm_moments_kernel[cut.grid](x, moments, RUN=cut.run(_RUN_OF_MOMENTS), LANES=cut.lanes, **cut.sizes)
        grid, sizes = cut.combining
        batch_norm_statistics_kernel[grid](moments, mean, var, chunk=cut.chunk, **sizes)
    return mean, var


def batch_norm_relu_triton(
    input: Tensor,  # [N, C, H, W], any strides
    mean: Tensor,  # [C]
    var: Tensor,  # [C]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
    residual: Tensor | None,  # [N, C, H, W], any strides
    residual_mean: Tensor | None,  # [C]; without it the residual is taken as it is
    residual_var: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_eps: float,
    relu: bool,
    with_mask: bool,
) -> tuple[Tensor, Tensor]:
    """relu(norm(input) + residual_norm(residual)), channels_last, and the mask (or an empty tensor)."""
    x, r = _channels_last(input), _channels_last(residual)
    out = empty_channels_last(x, x.shape)
    mask = x.new_empty(packed_bits_size(x.shape) if with_mask else (0,), dtype=torch.uint8)
    vectors = _contiguous(mean, var, weight, bias, residual_mean, residual_var, residual_weight, residual_bias)
    cut = _Cut.of(x, x if r is None else r)
    with shared.on_device_of(x):
        batch_norm_relu_kernel[cut.grid](
            x, r, out, mask if with_mask else None, *vectors, eps, residual_eps,
            RELU=relu, BLOCK_P=cut.run(_RUN) * cut.lanes, **cut.sizes,
        )  # fmt: skip
    return out, mask


def batch_norm_relu_backward_triton(
    grad: Tensor,  # [N, C, H, W], any strides
    input: Tensor,  # [N, C, H, W], any strides
    mean: Tensor,  # [C]
    var: Tensor,  # [C]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
    mask: Tensor | None,  # [N, H, W, ceil(C / 8)]
    shortcut: Tensor | None,  # [N, C, H, W], any strides; one that is normalised
    shortcut_mean: Tensor | None,  # [C]
    shortcut_var: Tensor | None,  # [C]
    shortcut_weight: Tensor | None,  # [C]
    shortcut_eps: float,
    relu: bool,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias, of the shortcut or the residual, and of the shortcut's weight; what is not
    asked for is empty."""
    x, s = _channels_last(input), _channels_last(shortcut)
    maps = (_channels_last(grad), x, s)
    mean, var, weight, bias, *of_shortcut = _contiguous(
        mean, var, weight, bias, shortcut_mean, shortcut_var, shortcut_weight
    )
    norm, bits = (mean, var, weight, bias), None if mask is None else mask.contiguous()
    has_second = s is not None or needs_residual
    to = empty_channels_last(x, x.shape)
    to_second = empty_channels_last(x, x.shape) if has_second else x.new_empty(0)
    of_weight, of_bias = _vector_like(x), _vector_like(x)
    of_shortcut_weight = of_weight.new_empty(0) if s is None else _vector_like(x)
    slopes = of_weight.new_empty(2 if s is None else 4, x.shape[1])

    cut = _Cut.of(*(t for t in maps if t is not None))
    sums = of_weight.new_empty(cut.chunks, 2 if s is None else 3, cut.channels)
    with shared.on_device_of(x):
        batch_norm_grad_sums_kernel[cut.grid](
            *maps, bits, sums, *norm, of_shortcut[0], eps,
            RELU=relu, RUN=cut.run(_RUN), LANES=cut.lanes, **cut.sizes,
        )  # fmt: skip
        grid, sizes = cut.combining
        batch_norm_grad_vectors_kernel[grid](
            sums, var, weight, *of_shortcut[1:], of_weight, of_bias, None if s is None else of_shortcut_weight, slopes,
            eps, shortcut_eps, **sizes,
        )  # fmt: skip
        batch_norm_grad_kernel[cut.grid](
            *maps, bits, to, to_second if has_second else None, slopes, *norm, *of_shortcut, eps, shortcut_eps,
            RELU=relu, BLOCK_P=cut.run(_RUN if s is None else _RUN_OF_FIVE_MAPS) * cut.lanes, **cut.sizes,
        )  # fmt: skip
    return to, of_weight, of_bias, to_second, of_shortcut_weight
