"""The convolution for up to 4 input channels, such as the 7x7 stem on RGB images, and the max-pooling behind it.

The implicit GEMM of conv_pointers.py reads such a map element by element, with a mask and a division each. Here a first
kernel copies it into [N, PH, PW, CP] with the padding written out as zeros and the channels filled up to CP, a power of
two. Then the window of an output pixel is, in each kernel row, one run of TAPS * CP elements at a fixed distance from
the next pixel's: a tensor of windows that overlap, which the other kernels load in vectors, or in boxes through a
descriptor. Only the taps that are filled up need a mask; to a descriptor they lie outside of the tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import shared
from .configs import StemConfig, has_descriptors, stem_config_for
from .descriptors import descriptor
from .shared import ALIGNMENT, Conv, batch_norm, batch_norm_vectors, relu, residual_relu_store, rounded_to_tf32

_LEAST_DEPTH = 16  # tl.dot's smallest
_MOST_DEPTH = 128  # of one kernel row
_PIXELS = 256  # of a program of the first kernel


# The first `image_blocks` programs copy pixels, the others filter rows (one k and r each).
@triton.jit(do_not_specialize=["pixels", "H", "W", "PH", "PW"])
def pad_kernel(
    input,  # [N, C, H, W], read by its strides
    weight,  # [K, C, R, S], read by its strides
    padded,  # [N, PH, PW, CP]
    packed,  # [K, R, TAPS, CP]
    pixels,  # N * PH * PW
    H, W, PH, PW,
    input_n, input_c, input_h, input_w,
    weight_k, weight_c, weight_r, weight_s,
    pad_h, pad_w,
    filter_rows,  # K * R
    image_blocks,
    C: tl.constexpr, CP: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, TAPS: tl.constexpr,
    PIXELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    c = tl.arange(0, CP)[None, :]
    if pid < image_blocks:
        pixel = pid * PIXELS + tl.arange(0, PIXELS)[:, None]
        h = pixel // PW % PH - pad_h
        w = pixel % PW - pad_w
        inside = (pixel < pixels) & (h >= 0) & (h < H) & (w >= 0) & (w < W) & (c < C)
        n = (pixel // (PW * PH)).to(tl.int64)
        x = tl.load(input + n * input_n + c * input_c + h * input_h + w * input_w, mask=inside, other=0.0)
        tl.store(padded + pixel * CP + c, x, mask=pixel < pixels)
    else:
        tap = (pid - image_blocks) * ROWS * TAPS + tl.arange(0, ROWS * TAPS)[:, None]
        s = tap % TAPS
        r = tap // TAPS % R
        k = tap // (TAPS * R)
        exists = tap < filter_rows * TAPS
        y = tl.load(
            weight + k * weight_k + c * weight_c + r * weight_r + s * weight_s,
            mask=exists & (s < S) & (c < C),
            other=0.0,
        )
        tl.store(packed + tap * CP + c, y, mask=exists)


@triton.jit(do_not_specialize=["rows", "P", "Q"])
def conv_few_channels_kernel(
    padded,  # [N, PH, PW, CP]
    packed,  # [K, R, TAPS, CP]
    bias, bn_weight, bn_bias,  # [K] or None
    running_mean, running_var,  # [K]
    residual,  # [N, P, Q, K] or None
    out,  # [N, P, Q, K]
    rows,  # N * P * Q
    P, Q,
    image,  # PH * PW * CP, which 16 divides; Triton must know it to load vectors
    line,  # PW * CP, likewise
    K,
    eps: tl.float32,
    R: tl.constexpr,
    STEP_H: tl.constexpr,  # stride, in lines of `padded`
    STEP_W: tl.constexpr,  # stride, in elements
    DIL_H: tl.constexpr,
    DEPTH: tl.constexpr,  # TAPS * CP
    WINDOW: tl.constexpr,  # S * CP: elements of a kernel row that belong to the window
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    offs_m = pid // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = pid % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = offs_m < rows
    column_ok = columns < K
    depth = tl.arange(0, DEPTH)

    # Rows and columns past the end read what the last one reads, so that they need no mask.
    m = tl.minimum(offs_m, rows - 1)
    window = m // (P * Q) * image + m // Q % P * (STEP_H * line) + m % Q * STEP_W
    windows = padded + window[:, None] + depth[None, :]
    filters = packed + tl.minimum(columns, K - 1)[None, :] * (R * DEPTH) + depth[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r in range(0, R):
        if WINDOW == DEPTH:
            x = tl.load(windows + r * (DIL_H * line))
        else:  # not left to the zeros in the weight: a NaN or an infinity beside the window would come through
            x = tl.load(windows + r * (DIL_H * line), mask=(depth < WINDOW)[None, :], other=0.0)
        y = tl.load(filters + r * DEPTH)
        if PRECISION == "tf32":
            x, y = rounded_to_tf32(x), rounded_to_tf32(y)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    acc = batch_norm(acc, columns, column_ok, bias, bn_weight, bn_bias, running_mean, running_var, eps)
    residual_relu_store(acc, offs_m, row_ok, columns, column_ok, residual, out, K, RELU)


@triton.jit
def normalized(acc, mean, scale, shift, exists):
    """relu(batch_norm(acc)), and 0, which no maximum of such values notices, where there is no output column."""
    return tl.where(exists[:, None], relu((acc - mean[None, :]) * scale[None, :] + shift[None, :]), 0.0)


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


# A program makes `strip` rows of the pooled map from top to bottom and computes every row of the convolution between
# them once: what a pooled row shares with the next one it keeps. Of the columns it computes every second one twice.
@triton.jit(do_not_specialize=["P", "Q", "pooled_P", "pooled_Q", "PH", "strip", "strips"])
def conv_few_channels_max_pool_kernel(
    padded,  # [N, PH, PW, CP], or its descriptor [N * PH, 2, Q / 2, WINDOW]
    packed,  # [K, R, TAPS, CP], or its descriptor [K, R * DEPTH]
    bias, bn_weight, bn_bias,  # [K] or None
    running_mean, running_var,  # [K]
    out,  # [N, pooled_P, pooled_Q, K]
    P, Q, pooled_P, pooled_Q,
    PH,
    line_size,  # PW * CP, which 16 divides; Triton must know it to load vectors
    strip, strips,  # rows of the pooled map of a program; programs of an image's height
    K,
    eps: tl.float32,
    R: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr,  # stride, in lines of `padded` and in elements
    DIL_H: tl.constexpr,
    DEPTH: tl.constexpr,  # TAPS * CP
    WINDOW: tl.constexpr,  # S * CP: elements of a kernel row that belong to the window
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    column_tiles = tl.cdiv(K, BLOCK_N)
    q_tiles = tl.cdiv(pooled_Q, BLOCK_Q)
    k0 = pid % column_tiles * BLOCK_N
    q0 = pid // column_tiles % q_tiles * BLOCK_Q
    p0 = pid // column_tiles // q_tiles % strips * strip
    n = pid // column_tiles // q_tiles // strips
    columns = k0 + tl.arange(0, BLOCK_N)
    column_ok = columns < K
    pixels = q0 + tl.arange(0, BLOCK_Q)
    ok = (pixels < pooled_Q)[:, None] & column_ok[None, :]
    mean, scale, shift = batch_norm_vectors(
        columns, column_ok, bias, bn_weight, bn_bias, running_mean, running_var, eps
    )
    # The columns of the convolution that a pooled one sees: `first` and the two behind it.
    first = 2 * pixels - 1
    has_left, has_middle, has_right = (first >= 0) & (first < Q), first + 1 < Q, first + 2 < Q
    if not DESCRIPTORS:
        depth = tl.arange(0, DEPTH)
        in_window = (depth < WINDOW)[None, :]
        windows = padded + first[:, None] * STEP_W + depth[None, :]
        filters = packed + tl.minimum(columns, K - 1)[None, :] * (R * DEPTH) + depth[:, None]

    largest = tl.zeros((BLOCK_Q, BLOCK_N), dtype=tl.float32)  # of what belongs to the current pooled row
    for i in range(0, 2 * tl.minimum(strip, pooled_P - p0) + 1):
        row = 2 * p0 - 1 + i
        # Above and below the map the nearest row counts twice, which changes no maximum.
        line = n * PH + tl.minimum(tl.maximum(row, 0), P - 1) * STEP_H
        left = tl.zeros((BLOCK_Q, BLOCK_N), dtype=tl.float32)
        middle = tl.zeros((BLOCK_Q, BLOCK_N), dtype=tl.float32)
        right = tl.zeros((BLOCK_Q, BLOCK_N), dtype=tl.float32)
        for r in range(0, R):
            if DESCRIPTORS:
                a = tl.reshape(padded.load([line + r * DIL_H, 1, q0 - 1, 0]), (BLOCK_Q, DEPTH))
                b = tl.reshape(padded.load([line + r * DIL_H, 0, q0, 0]), (BLOCK_Q, DEPTH))
                c = tl.reshape(padded.load([line + r * DIL_H, 1, q0, 0]), (BLOCK_Q, DEPTH))
                y = packed.load([k0, r * DEPTH]).T
            else:
                at = (line + r * DIL_H) * line_size
                a = tl.load(windows + at, mask=has_left[:, None] & in_window, other=0.0)
                b = tl.load(windows + (at + STEP_W), mask=has_middle[:, None] & in_window, other=0.0)
                c = tl.load(windows + (at + 2 * STEP_W), mask=has_right[:, None] & in_window, other=0.0)
                y = tl.load(filters + r * DEPTH)
            if PRECISION == "tf32":
                a, b, c, y = rounded_to_tf32(a), rounded_to_tf32(b), rounded_to_tf32(c), rounded_to_tf32(y)
            left = tl.dot(a, y, left, input_precision=PRECISION)
            middle = tl.dot(b, y, middle, input_precision=PRECISION)
            right = tl.dot(c, y, right, input_precision=PRECISION)
        left = normalized(left, mean, scale, shift, has_left)
        middle = normalized(middle, mean, scale, shift, has_middle)
        right = normalized(right, mean, scale, shift, has_right)
        of_row = maximum(maximum(left, middle), right)
        largest = maximum(largest, of_row)
        if i % 2 == 0:  # the last row of one pooled row, and the first of the next
            if i > 0:
                at = ((n * pooled_P + p0 + i // 2 - 1) * pooled_Q + pixels)[:, None] * K + columns[None, :]
                tl.store(out + at, largest.to(out.dtype.element_ty), mask=ok)
            largest = of_row


@dataclass(frozen=True)
class _Layout:
    """Sizes of the padded map [N, PH, PW, CP] and of the packed weight [K, R, TAPS, CP]."""

    ph: int
    pw: int
    cp: int
    taps: int

    @staticmethod
    def of(conv: Conv, p: int, q: int) -> _Layout:
        _, c, r, s = conv.weight.shape
        cp = triton.next_power_of_2(c)
        taps = triton.next_power_of_2(max(s, _LEAST_DEPTH // cp))
        ph = (p - 1) * conv.stride[0] + (r - 1) * conv.dilation[0] + 1
        # Windows of an even number of columns, which a descriptor sees in two halves.
        pw = (2 * triton.cdiv(q, 2) - 1) * conv.stride[1] + taps
        # Lines of whole vectors.
        multiple = max(1, 16 // cp)
        return _Layout(ph, triton.cdiv(pw, multiple) * multiple, cp, taps)

    @property
    def line(self) -> int:
        return self.pw * self.cp


def takes(conv: Conv, size: list[int]) -> bool:
    """Whether this file's kernels compute the convolution, whose output has ``size`` [N, K, P, Q]: few channels,
    neighbouring taps, 32-bit offsets, on tensor cores."""
    few = conv.weight.shape[1] <= 4 and conv.groups == 1 and conv.dilation[1] == 1
    if not few or shared.product_of(conv.input.dtype) == "ieee":
        return False
    n, k, p, q = size
    layout = _Layout.of(conv, p, q)
    reach = max(shared.reach(conv.input[0]), shared.reach(conv.weight))
    offsets = max(n * layout.ph * layout.line, n * k * p * q, reach)
    return layout.taps * layout.cp <= _MOST_DEPTH and offsets <= shared.MOST_INT32


def _pad(conv: Conv, layout: _Layout) -> tuple[Tensor, Tensor]:
    """The padded map and the packed weight."""
    x, weight = conv.input, conv.weight
    k, c, r, s = weight.shape
    pixels = x.shape[0] * layout.ph * layout.pw
    padded = torch.empty(pixels * layout.cp, dtype=x.dtype, device=x.device)
    packed = torch.empty(k * r * layout.taps * layout.cp, dtype=x.dtype, device=x.device)
    image_blocks = triton.cdiv(pixels, _PIXELS)
    rows = max(1, _PIXELS // layout.taps)
    pad_kernel[(image_blocks + triton.cdiv(k * r, rows),)](
        x, weight, padded, packed,
        pixels, *x.shape[2:], layout.ph, layout.pw, *x.stride(), *weight.stride(), *conv.padding,
        k * r, image_blocks,
        C=c, CP=layout.cp, R=r, S=s, TAPS=layout.taps, PIXELS=_PIXELS, ROWS=rows, num_warps=4,
    )  # fmt: skip
    return padded, packed


def _how(conv: Conv, layout: _Layout, config: StemConfig) -> dict:
    """What both kernels know when they are compiled."""
    return dict(
        R=conv.weight.shape[2], STEP_H=conv.stride[0], STEP_W=conv.stride[1] * layout.cp, DIL_H=conv.dilation[0],
        DEPTH=layout.taps * layout.cp, WINDOW=conv.weight.shape[3] * layout.cp,
        PRECISION=shared.precision_of(conv.input.dtype),
        BLOCK_N=max(16, min(config.block_n, triton.next_power_of_2(conv.weight.shape[0]))),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def run(conv: Conv, residual: Tensor | None, relu: bool, out: Tensor) -> Tensor:
    """relu(batch_norm(conv) + residual) into ``out`` [N, K, P, Q]; `takes` has said yes, and ``out`` and ``residual``
    are channels_last."""
    n, k, p, q = out.shape
    layout = _Layout.of(conv, p, q)
    config = stem_config_for(shared.target_of(out), shared.product_of(out.dtype), "stem")
    how = _how(conv, layout, config)
    with shared.on_device_of(out):
        padded, packed = _pad(conv, layout)
        conv_few_channels_kernel[(triton.cdiv(n * p * q, config.block_m) * triton.cdiv(k, how["BLOCK_N"]),)](
            padded, packed, *conv.vectors, residual, out,
            n * p * q, p, q, layout.ph * layout.line, layout.line, k, conv.eps,
            RELU=relu, BLOCK_M=config.block_m, **how,
        )  # fmt: skip
    return out


def takes_max_pool(conv: Conv, size: list[int], pool: list[list[int]]) -> bool:
    """Whether `run_max_pool` computes it: `takes`, and ResNet's pooling."""
    return pool == [[3, 3], [2, 2], [1, 1]] and takes(conv, size)


def run_max_pool(conv: Conv, size: list[int], out: Tensor) -> Tensor:
    """max_pool(relu(batch_norm(conv))) into ``out`` [N, K, pooled P, pooled Q], channels_last; ``size`` [N, K, P, Q] is
    that of the map between the two, which is never written. `takes_max_pool` has said yes."""
    n, k, p, q = size
    pooled_p, pooled_q = out.shape[2:]
    layout = _Layout.of(conv, p, q)
    target = shared.target_of(out)
    config = stem_config_for(target, shared.product_of(out.dtype), "stem with max-pooling")
    how = _how(conv, layout, config)
    block_q = max(config.block_m // 4, min(config.block_m, triton.next_power_of_2(pooled_q)))
    across = n * triton.cdiv(pooled_q, block_q) * triton.cdiv(k, how["BLOCK_N"])
    strip = min(config.strip, max(1, pooled_p * across // shared.multiprocessors_of(out)))
    strips = triton.cdiv(pooled_p, strip)
    descriptors = has_descriptors(target) and how["STEP_W"] * out.element_size() % ALIGNMENT == 0
    with shared.on_device_of(out):
        maps = padded, packed = _pad(conv, layout)
        if descriptors:
            rows = how["R"] * how["DEPTH"]
            windows = (n * layout.ph, 2, triton.cdiv(q, 2), how["WINDOW"])
            strides = (layout.line, how["STEP_W"], 2 * how["STEP_W"], 1)
            maps = (
                descriptor(padded, windows, strides, (1, 1, block_q, how["DEPTH"])),
                descriptor(packed, (k, rows), (rows, 1), (how["BLOCK_N"], how["DEPTH"])),
            )
        conv_few_channels_max_pool_kernel[(across * strips,)](
            *maps, *conv.vectors, out,
            p, q, pooled_p, pooled_q, layout.ph, layout.line, strip, strips, k, conv.eps,
            DESCRIPTORS=descriptors, BLOCK_Q=block_q, **how,
        )  # fmt: skip
    return out
