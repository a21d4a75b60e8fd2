"""conv_bn_relu in Triton for up to 4 input channels, such as the 7x7 stem on RGB images.

The implicit GEMM of conv_bn_relu.py reads such a map element by element, with a mask and a division each. Here a first
kernel copies it into [N, PH, PW, CP] with the padding written out as zeros and the channels filled up to CP, a power of
two. Then the window of an output pixel is, in each kernel row, one run of TAPS * CP elements at a fixed distance from
the next pixel's: the second kernel loads them in vectors; only the taps that are filled up need a mask.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import triton_interpreted
from . import shared
from .shared import batch_norm_store, rounded_to_tf32

_LEAST_DEPTH = 16  # tl.dot's smallest
_MOST_DEPTH = 128  # of one kernel row
_PIXELS = 256  # of a program of the first kernel


@dataclass(frozen=True)
class FewChannelsConfig:
    """Rows (output pixels) and at most how many columns (filters) of a program, and how a GPU runs it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By bytes of an element. For 2 measured on an H100, before WINDOW's mask: 0.55 ms for the 7x7 stem on 256 images, 0.61
# with 128 rows.
CONFIGS = {2: FewChannelsConfig(256, 64, 4, 4), 4: FewChannelsConfig(128, 64, 4, 3)}
_INTERPRETER_CONFIG = FewChannelsConfig(256, 128, 1, 1)


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
    batch_norm_store(
        acc, offs_m, row_ok, columns, column_ok, bias, bn_weight, bn_bias, running_mean, running_var, residual, out,
        K, eps, RELU,
    )  # fmt: skip


@dataclass(frozen=True)
class _Layout:
    """Sizes of the padded map [N, PH, PW, CP] and of the packed weight [K, R, TAPS, CP]."""

    ph: int
    pw: int
    cp: int
    taps: int

    @staticmethod
    def of(input: Tensor, weight: Tensor, out: Tensor, stride: list[int], dilation: list[int]) -> _Layout:
        _, c, r, s = weight.shape
        cp = triton.next_power_of_2(c)
        taps = triton.next_power_of_2(max(s, _LEAST_DEPTH // cp))
        ph = (out.shape[2] - 1) * stride[0] + (r - 1) * dilation[0] + 1
        pw = (out.shape[3] - 1) * stride[1] + taps
        # Lines of whole vectors.
        multiple = max(1, 16 // cp)
        return _Layout(ph, triton.cdiv(pw, multiple) * multiple, cp, taps)


def takes(input: Tensor, weight: Tensor, out: Tensor, stride: list[int], dilation: list[int], groups: int) -> bool:
    """Whether this file's kernels compute the convolution: few channels, neighbouring taps, 32-bit offsets."""
    if weight.shape[1] > 4 or groups != 1 or dilation[1] != 1:
        return False
    layout = _Layout.of(input, weight, out, stride, dilation)
    padded = input.shape[0] * layout.ph * layout.pw * layout.cp
    reach = max(shared.reach(input[0]), shared.reach(weight))
    return layout.taps * layout.cp <= _MOST_DEPTH and max(padded, out.numel(), reach) <= shared.MOST_INT32


def conv_few_channels_triton(
    input: Tensor,  # [N, C, H, W], any strides
    weight: Tensor,  # [K, C, R, S], any strides
    vectors: list[Tensor | None],  # bias, bn_weight, bn_bias, running_mean, running_var, each [K] and contiguous
    residual: Tensor | None,  # [N, K, P, Q], channels_last
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    eps: float,
    relu: bool,
    precision: str,  # tl.dot's input_precision
    out: Tensor,  # [N, K, P, Q], channels_last, not empty
) -> Tensor:
    """Writes relu(batch_norm(conv2d(input, weight, bias)) + residual) into ``out``; where `takes` says so."""
    n, k, p, q = out.shape
    _, c, r, s = weight.shape
    layout = _Layout.of(input, weight, out, stride, dilation)
    pixels = n * layout.ph * layout.pw
    padded = torch.empty(pixels * layout.cp, dtype=input.dtype, device=input.device)
    packed = torch.empty(k * r * layout.taps * layout.cp, dtype=input.dtype, device=input.device)
    image_blocks = triton.cdiv(pixels, _PIXELS)
    rows = max(1, _PIXELS // layout.taps)
    config = _INTERPRETER_CONFIG if triton_interpreted() else CONFIGS[input.element_size()]
    block_n = max(16, min(config.block_n, triton.next_power_of_2(k)))
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        pad_kernel[(image_blocks + triton.cdiv(k * r, rows),)](
            input, weight, padded, packed,
            pixels, *input.shape[2:], layout.ph, layout.pw, *input.stride(), *weight.stride(), *padding,
            k * r, image_blocks,
            C=c, CP=layout.cp, R=r, S=s, TAPS=layout.taps, PIXELS=_PIXELS, ROWS=rows, num_warps=4,
        )  # fmt: skip
        conv_few_channels_kernel[(triton.cdiv(n * p * q, config.block_m) * triton.cdiv(k, block_n),)](
            padded, packed, *vectors, residual, out,
            n * p * q, p, q, layout.ph * layout.pw * layout.cp, layout.pw * layout.cp, k, eps,
            R=r, STEP_H=stride[0], STEP_W=stride[1] * layout.cp, DIL_H=dilation[0], DEPTH=layout.taps * layout.cp,
            WINDOW=s * layout.cp, RELU=relu, PRECISION=precision, BLOCK_M=config.block_m, BLOCK_N=block_n,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out
