"""conv_bn_relu in Triton: an implicit GEMM over NHWC with BatchNorm, residual and ReLU in its store.

    acc[m, k] = sum over (r, s, c) of input[n, p * stride + r * dilation - padding, ..., c] * weight[k, c, r, s]
    out[m, k] = relu((acc + bias - mean) * (bn_weight / sqrt(var + eps)) + bn_bias + residual)

Row m is the output pixel (n, p, q), column k the filter; the depth of the product runs over (r, s, c). A program
computes a [BLOCK_M, BLOCK_N] tile of one group. The launcher relies on the checks of ops/conv_bn_relu.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import triton_interpreted
from . import conv_few_channels, shared
from .shared import batch_norm_store, precision_of, rounded_to_tf32


@dataclass(frozen=True)
class ConvConfig:
    """A tile: rows (output pixels), columns (filters) and depth of one step, and how a GPU runs it."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


_BIG = ConvConfig(256, 128, 64, 1, 1)

# By target, kind of product and kind of access. The defaults are not tuned: they compile for sm_80 and sm_90 without a
# spill in all variants of tests/triton_aot, by Triton 3.6 and 3.8, with 72 KB of shared memory at most.
CONFIGS: dict[str, dict[tuple[str, str], ConvConfig]] = {
    # An operation costs 70 us in the interpreter whatever the tile's size, so few programs with big tiles.
    "interpreter": {(p, a): _BIG for p in ("16-bit", "tf32", "ieee") for a in ("vectors", "elements")},
    "default": {
        ("16-bit", "vectors"): ConvConfig(128, 64, 64, 4, 3),
        ("tf32", "vectors"): ConvConfig(64, 64, 32, 4, 3),
        # Every element has an address and a mask of its own in registers: with odd channels the tiles above spill on
        # sm_90 (2.8 KB of stores and loads in bfloat16).
        ("16-bit", "elements"): ConvConfig(128, 64, 32, 8, 2),
        ("tf32", "elements"): ConvConfig(64, 64, 16, 4, 2),
        # No tensor cores: the operands pass through registers.
        ("ieee", "vectors"): ConvConfig(64, 32, 16, 4, 2),
        ("ieee", "elements"): ConvConfig(64, 32, 16, 4, 2),
    },
}
# Measured on an H100 in bfloat16 at batch 256 (benchmarks/gpu_campaign.py --steps tune) on the 1x1 layers of ResNet-50
# that run here by default, those without a ReLU and those on 64 channels into a residual: 1.1-1.4 times the speed of
# the default's tile. With a residual 128 x 128 would be 1.3 times as fast again (0.36 ms instead of 0.46), but spills.
CONFIGS["sm_90"] = CONFIGS["default"] | {
    ("16-bit", "vectors"): ConvConfig(128, 128, 64, 4, 3),
    ("16-bit", "vectors and residual"): ConvConfig(64, 128, 64, 4, 3),
}

# tl.dot's smallest tile in every dimension; smaller problems are filled up with zeros by the masks.
_LEAST_BLOCK = 16


# Sizes that only bound a mask are not specialized: a new batch or image size must not compile a new kernel.
@triton.jit(do_not_specialize=["rows", "H", "W", "P", "Q"])
def conv_bn_relu_kernel(
    input,  # [N, H, W, GROUPS * C]
    weight,  # [GROUPS * K, C, R, S], read by its strides
    bias, bn_weight, bn_bias,  # [GROUPS * K] or None
    running_mean, running_var,  # [GROUPS * K]
    residual,  # [N, P, Q, GROUPS * K] or None
    out,  # [N, P, Q, GROUPS * K]
    rows,  # N * P * Q
    H, W, P, Q,
    K,  # filters of a group
    weight_k, weight_c, weight_r, weight_s,  # strides of the weight
    eps: tl.float32,  # pinned, since a caller may hand over a float64
    C: tl.constexpr,  # channels of a group
    R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    GROUPS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,  # of a float32 product: "tf32" or "ieee"
    WIDE: tl.constexpr,  # offsets in 64 bits
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Columns run fastest: programs side by side read the same input rows, and the weight is small enough for L2.
    pid = tl.program_id(0)
    column_tiles = tl.cdiv(K, BLOCK_N)
    tile_n = pid % column_tiles
    group = pid // column_tiles % GROUPS
    tile_m = pid // column_tiles // GROUPS
    offs_k = tl.arange(0, BLOCK_K)
    if WIDE:  # from here on; the divisions above fit into 32 bits, as a grid does
        tile_n, group, tile_m = tile_n.to(tl.int64), group.to(tl.int64), tile_m.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = offs_m < rows
    column_ok = offs_n < K
    columns = group * K + offs_n  # filters, counted over all groups

    # The corner of each output pixel's window; it may lie in the padding, left of or above the image.
    h0 = offs_m // Q % P * STRIDE_H - PAD_H
    w0 = offs_m % Q * STRIDE_W - PAD_W
    corner = input + ((offs_m // (P * Q) * H + h0) * W + w0) * (GROUPS * C) + group * C
    filters = weight + columns * weight_k

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    DEPTH: tl.constexpr = R * S * C
    if C < BLOCK_K:
        # Few channels (the stem, depthwise): a step takes BLOCK_K neighbours of the whole depth, across taps, since
        # one tap would fill little of the tile. Costs divisions in the loop.
        for start in range(0, DEPTH, BLOCK_K):
            k = start + offs_k
            c = k % C
            r = k // C // S
            s = k // C % S
            h = h0[:, None] + (r * DIL_H)[None, :]
            w = w0[:, None] + (s * DIL_W)[None, :]
            inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) & row_ok[:, None] & (k < DEPTH)[None, :]
            x_offset = (r * DIL_H * W + s * DIL_W) * (GROUPS * C) + c
            x = tl.load(corner[:, None] + x_offset[None, :], mask=inside, other=0.0)
            y_offset = c * weight_c + r * weight_r + s * weight_s
            y_ok = (k < DEPTH)[:, None] & column_ok[None, :]
            y = tl.load(filters[None, :] + y_offset[:, None], mask=y_ok, other=0.0)
            if PRECISION == "tf32":
                x, y = rounded_to_tf32(x), rounded_to_tf32(y)
            acc = tl.dot(x, y, acc, input_precision=PRECISION)
    else:
        # A step takes BLOCK_K channels of one tap, whose position is then one scalar.
        STEPS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
        for step in range(0, R * S * STEPS):
            tap = step // STEPS
            r = tap // S
            s = tap % S
            c = step % STEPS * BLOCK_K + offs_k
            if WIDE:
                r, s = r.to(tl.int64), s.to(tl.int64)
            h = h0 + r * DIL_H
            w = w0 + s * DIL_W
            inside = ((h >= 0) & (h < H) & (w >= 0) & (w < W) & row_ok)[:, None]
            y_ok = column_ok[None, :]
            if C % BLOCK_K != 0:  # else the masks stay free of the channel, and the loads wide
                inside = inside & (c < C)[None, :]
                y_ok = y_ok & (c < C)[:, None]
            x_offset = (r * DIL_H * W + s * DIL_W) * (GROUPS * C) + c
            x = tl.load(corner[:, None] + x_offset[None, :], mask=inside, other=0.0)
            y_offset = c * weight_c + r * weight_r + s * weight_s
            y = tl.load(filters[None, :] + y_offset[:, None], mask=y_ok, other=0.0)
            if PRECISION == "tf32":
                x, y = rounded_to_tf32(x), rounded_to_tf32(y)
            acc = tl.dot(x, y, acc, input_precision=PRECISION)

    batch_norm_store(
        acc, offs_m, row_ok, columns, column_ok, bias, bn_weight, bn_bias, running_mean, running_var, residual, out,
        GROUPS * K, eps, RELU,
    )  # fmt: skip


def _target(t: Tensor) -> str:
    """Where a kernel on ``t`` runs, as CONFIGS names it."""
    if triton_interpreted():
        return "interpreter"
    if t.is_cuda:
        major, minor = torch.cuda.get_device_capability(t.device)
        return f"sm_{10 * major + minor}"
    return f"sm_{triton.runtime.driver.active.get_current_target().arch}"  # compiled for a GPU that is not here


def _product(dtype: torch.dtype) -> str:
    """The kind of product, as CONFIGS names it."""
    return precision_of(dtype) if dtype == torch.float32 else "16-bit"


def _config(x: Tensor, weight: Tensor, residual: Tensor | None, filters: int, wide: bool) -> ConvConfig:
    """The tile for a group of ``filters`` columns. ``x`` and ``residual`` are channels_last."""
    product = _product(x.dtype)
    configs = CONFIGS.get(_target(x), CONFIGS["default"])

    _, channels, *window = weight.shape
    config = configs[product, "vectors"]
    # What a vector of 16 bytes needs: whole vectors in each pixel of input and output, and neighbours in the weight.
    vectors = weight.stride(1) == 1
    vectors = vectors and all(n * x.element_size() % 16 == 0 for n in (channels, filters))
    vectors = vectors and all(t is None or t.data_ptr() % 16 == 0 for t in (x, weight, residual))
    # 64-bit addresses need twice the registers, so they count as elements.
    if wide or not vectors or channels < config.block_k:
        config = configs[product, "elements"]
    elif residual is not None:
        config = configs.get((product, "vectors and residual"), config)

    def fit(block: int, size: int) -> int:
        return max(_LEAST_BLOCK, min(block, triton.next_power_of_2(size)))

    block_n, block_k = fit(config.block_n, filters), fit(config.block_k, channels * window[0] * window[1])
    return replace(config, block_n=block_n, block_k=block_k)


def _needs_int64(input: Tensor, weight: Tensor, out: Tensor, padding: list[int]) -> bool:
    """Whether an offset that a kernel computes may not fit into 32 bits.

    Windows begin in the padding, so the padded input counts; the weight may be a view with strides of any size.
    """
    n, c, h, w = input.shape
    padded = n * c * (h + 2 * padding[0]) * (w + 2 * padding[1])
    return max(padded, out.numel(), shared.reach(weight)) > shared.MOST_INT32


def conv_bn_relu_triton(
    input: Tensor,  # [N, C, H, W], any strides
    weight: Tensor,  # [K, C / groups, R, S], any strides
    bias: Tensor | None,  # [K]
    bn_weight: Tensor | None,  # [K]
    bn_bias: Tensor | None,  # [K]
    running_mean: Tensor,  # [K]
    running_var: Tensor,  # [K]
    residual: Tensor | None,  # [N, K, P, Q], any strides
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    relu: bool,
    out: Tensor,  # [N, K, P, Q], channels_last, not empty
) -> Tensor:
    """Writes relu(batch_norm(conv2d(input, weight, bias)) + residual) into ``out`` and returns it."""
    r = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    vectors = [None if v is None else v.contiguous() for v in (bias, bn_weight, bn_bias, running_mean, running_var)]

    n, k, p, q = out.shape
    channels = weight.shape[1]
    filters = k // groups
    precision = precision_of(input.dtype)
    if _product(input.dtype) != "ieee" and conv_few_channels.takes(input, weight, out, stride, dilation, groups):
        return conv_few_channels.conv_few_channels_triton(
            input, weight, vectors, r, stride, padding, dilation, eps, relu, precision, out
        )
    x = input.contiguous(memory_format=torch.channels_last)
    if weight.stride(1) != 1 and channels * weight.element_size() % 16 == 0:
        # One small pass more, but the convolution's loads become vectors: ResNet-50 (batch 256, bfloat16) takes 14.7 ms
        # instead of 20.4 on an H100.
        weight = weight.contiguous(memory_format=torch.channels_last)
    wide = _needs_int64(x, weight, out, padding)
    config = _config(x, weight, r, filters, wide)
    # One dimension for all three (rows, groups, columns): the others end at 65535, fewer than the groups may be.
    grid = (triton.cdiv(n * p * q, config.block_m) * groups * triton.cdiv(filters, config.block_n),)
    # Triton launches on the current device, which need not be the tensors' one.
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        conv_bn_relu_kernel[grid](
            x, weight, *vectors, r, out,
            n * p * q, *x.shape[2:], p, q, filters, *weight.stride(), eps,
            C=channels, R=weight.shape[2], S=weight.shape[3],
            STRIDE_H=stride[0], STRIDE_W=stride[1],
            PAD_H=padding[0], PAD_W=padding[1],
            DIL_H=dilation[0], DIL_W=dilation[1],
            GROUPS=groups, RELU=relu, PRECISION=precision,
            WIDE=wide,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out
