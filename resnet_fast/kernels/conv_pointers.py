"""The convolution as an implicit GEMM over NHWC that computes its own addresses: any shape, any architecture.

    acc[m, k] = sum over (r, s, c) of input[n, p * stride + r * dilation - padding, ..., c] * weight[k, c, r, s]

Row m is the output pixel (n, p, q), column k the filter; the depth of the product runs over (r, s, c). A program
computes a [BLOCK_M, BLOCK_N] tile of one group, and a projection shortcut by a second product over the same tile.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import shared
from .configs import ConvConfig, config_for
from .shared import ALIGNMENT, Conv, batch_norm, has_vectors, is_aligned, residual_relu_store, rounded_to_tf32

# tl.dot's smallest tile in every dimension; smaller problems are filled up with zeros by the masks.
_LEAST_BLOCK = 16


@triton.jit
def implicit_gemm(
    input,  # [N, H, W, GROUPS * C]
    weight,  # [GROUPS * K, C, R, S], read by its strides
    H, W, P, Q,
    offs_m, row_ok,  # [BLOCK_M]: output pixels, and which of them exist
    columns, column_ok,  # [BLOCK_N]: filters, counted over all groups, likewise
    group,
    weight_k, weight_c, weight_r, weight_s,  # strides of the weight
    C: tl.constexpr,  # channels of a group
    R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,  # of a float32 product: "tf32" or "ieee"
    WIDE: tl.constexpr,  # offsets in 64 bits
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile of the convolution, [BLOCK_M, BLOCK_N] in float32."""
    offs_k = tl.arange(0, BLOCK_K)
    if WIDE:
        offs_k = offs_k.to(tl.int64)
    # The corner of each output pixel's window; it may lie in the padding, left of or above the image.
    h0 = offs_m // Q % P * STRIDE_H - PAD_H
    w0 = offs_m % Q * STRIDE_W - PAD_W
    corner = input + ((offs_m // (P * Q) * H + h0) * W + w0) * (GROUPS * C) + group * C
    filters = weight + columns * weight_k

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    DEPTH: tl.constexpr = R * S * C
    if C < BLOCK_K:
        # Few channels (depthwise): a step takes BLOCK_K neighbours of the whole depth, across taps, since one tap would
        # fill little of the tile. Costs divisions in the loop.
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
    return acc


# Sizes that only bound a mask are not specialized: a new batch or image size must not compile a new kernel.
@triton.jit(do_not_specialize=["rows", "H", "W", "P", "Q"])
def conv_pointers_kernel(
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
    if WIDE:  # from here on; the divisions above fit into 32 bits, as a grid does
        tile_n, group, tile_m = tile_n.to(tl.int64), group.to(tl.int64), tile_m.to(tl.int64)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = offs_m < rows
    column_ok = offs_n < K
    columns = group * K + offs_n

    acc = implicit_gemm(
        input, weight, H, W, P, Q, offs_m, row_ok, columns, column_ok, group, weight_k, weight_c, weight_r, weight_s,
        C, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, GROUPS, PRECISION, WIDE, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    acc = batch_norm(acc, columns, column_ok, bias, bn_weight, bn_bias, running_mean, running_var, eps)
    residual_relu_store(acc, offs_m, row_ok, columns, column_ok, residual, out, GROUPS * K, RELU)


@triton.jit(do_not_specialize=["rows", "H", "W", "P", "Q", "H2", "W2"])
def conv_projection_pointers_kernel(
    input,  # [N, H, W, C]
    weight,  # [K, C, R, S], read by its strides
    bias, bn_weight, bn_bias,  # [K] or None
    running_mean, running_var,  # [K]
    shortcut,  # [N, H2, W2, C2]
    weight2,  # [K, C2, R2, S2], read by its strides
    bias2, bn_weight2, bn_bias2,  # [K] or None
    running_mean2, running_var2,  # [K], or both None
    out,  # [N, P, Q, K]
    rows,  # N * P * Q
    H, W, H2, W2, P, Q,
    K,
    weight_k, weight_c, weight_r, weight_s,
    weight2_k, weight2_c, weight2_r, weight2_s,
    eps: tl.float32, eps2: tl.float32,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    C2: tl.constexpr, R2: tl.constexpr, S2: tl.constexpr,
    STRIDE2_H: tl.constexpr, STRIDE2_W: tl.constexpr,
    PAD2_H: tl.constexpr, PAD2_W: tl.constexpr,
    DIL2_H: tl.constexpr, DIL2_W: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_K2: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    column_tiles = tl.cdiv(K, BLOCK_N)
    tile_n = pid % column_tiles
    tile_m = pid // column_tiles
    if WIDE:
        tile_n, tile_m = tile_n.to(tl.int64), tile_m.to(tl.int64)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = offs_m < rows
    column_ok = columns < K

    acc = implicit_gemm(
        input, weight, H, W, P, Q, offs_m, row_ok, columns, column_ok, 0, weight_k, weight_c, weight_r, weight_s,
        C, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, 1, PRECISION, WIDE, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    acc = batch_norm(acc, columns, column_ok, bias, bn_weight, bn_bias, running_mean, running_var, eps)
    acc2 = implicit_gemm(
        shortcut, weight2, H2, W2, P, Q, offs_m, row_ok, columns, column_ok, 0,
        weight2_k, weight2_c, weight2_r, weight2_s,
        C2, R2, S2, STRIDE2_H, STRIDE2_W, PAD2_H, PAD2_W, DIL2_H, DIL2_W, 1, PRECISION, WIDE,
        BLOCK_M, BLOCK_N, BLOCK_K2,
    )  # fmt: skip
    acc += batch_norm(acc2, columns, column_ok, bias2, bn_weight2, bn_bias2, running_mean2, running_var2, eps2)
    residual_relu_store(acc, offs_m, row_ok, columns, column_ok, None, out, K, True)


def _loads_vectors(conv: Conv, filters: int) -> bool:
    """Whether loads and stores may be of 16 bytes: whole vectors in each pixel of input and output, and neighbours in
    the weight."""
    weight = conv.weight
    whole = (n * weight.element_size() % ALIGNMENT == 0 for n in (weight.shape[1], filters))
    return all(whole) and has_vectors(conv.input) and weight.stride(1) == 1 and is_aligned(weight)


def _config(conv: Conv, shortcut: Conv | None, residual: Tensor | None, filters: int, wide: bool) -> ConvConfig:
    """The tile for a group of ``filters`` columns. Maps are channels_last."""
    target, product = shared.target_of(conv.input), shared.product_of(conv.input.dtype)
    adds = "projection" if shortcut is not None else "residual" if residual is not None else ""
    config = config_for(target, product, "pointers", adds)
    # 64-bit addresses need twice the registers, so they count as elements.
    for part in (conv, shortcut):
        if part is not None and (wide or not _loads_vectors(part, filters) or part.weight.shape[1] < config.block_k):
            config = config_for(target, product, "elements", adds)
    if not is_aligned(residual):
        config = config_for(target, product, "elements", adds)
    return replace(config, block_n=_fit(config.block_n, filters))


def _fit(block: int, size: int) -> int:
    return max(_LEAST_BLOCK, min(block, triton.next_power_of_2(size)))


def _geometry(conv: Conv, suffix: str = "") -> dict[str, int]:
    """A convolution as the kernels' compile-time arguments."""
    names = ("C", "R", "S")
    pairs = {"STRIDE": conv.stride, "PAD": conv.padding, "DIL": conv.dilation}
    sizes = {name + suffix: size for name, size in zip(names, conv.weight.shape[1:], strict=True)}
    return sizes | {f"{name}{suffix}_{'HW'[d]}": pair[d] for name, pair in pairs.items() for d in (0, 1)}


def run(conv: Conv, shortcut: Conv | None, residual: Tensor | None, relu: bool, out: Tensor) -> Tensor:
    """relu(batch_norm(conv) + batch_norm(shortcut), or residual) into ``out`` [N, K, P, Q]; all maps are channels_last.

    With a shortcut there are no groups and no residual, and the ReLU is always applied.
    """
    n, k, p, q = out.shape
    filters = k // conv.groups
    parts = [part for part in (conv, shortcut) if part is not None]
    wide = any(shared.needs_int64(part.input, part.padding, out, part.weight) for part in parts)
    config = _config(conv, shortcut, residual, filters, wide)
    rows, columns = triton.cdiv(n * p * q, config.block_m), triton.cdiv(filters, config.block_n)
    how = dict(
        PRECISION=shared.precision_of(out.dtype), WIDE=wide, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_K=_fit(config.block_k, conv.weight[0].numel()),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    # One dimension for all three (rows, groups, columns): the others end at 65535, fewer than the groups may be.
    grid = (rows * conv.groups * columns,)
    with shared.on_device_of(out):
        if shortcut is None:
            conv_pointers_kernel[grid](
                conv.input, conv.weight, *conv.vectors, residual, out,
                n * p * q, *conv.input.shape[2:], p, q, filters, *conv.weight.stride(), conv.eps,
                **_geometry(conv), GROUPS=conv.groups, RELU=relu, **how,
            )  # fmt: skip
        else:
            conv_projection_pointers_kernel[grid](
                conv.input, conv.weight, *conv.vectors, shortcut.input, shortcut.weight, *shortcut.vectors, out,
                n * p * q, *conv.input.shape[2:], *shortcut.input.shape[2:], p, q, filters,
                *conv.weight.stride(), *shortcut.weight.stride(), conv.eps, shortcut.eps,
                **_geometry(conv), **_geometry(shortcut, "2"),
                BLOCK_K2=_fit(config.block_k, shortcut.weight[0].numel()), **how,
            )  # fmt: skip
    return out


def with_vectors(weight: Tensor) -> Tensor:
    """The weight with neighbouring channels where the convolution's loads then become vectors.

    One small pass, but ResNet-50 (batch 256, bfloat16) takes 14.7 ms instead of 20.4 on an H100.
    """
    if weight.stride(1) != 1 and weight.shape[1] * weight.element_size() % ALIGNMENT == 0:
        return weight.contiguous(memory_format=torch.channels_last)
    return weight
