"""The convolution through tensor descriptors, for sm_90 and later: a persistent implicit GEMM over NHWC.

The copy engine fetches a step of the product as one box: of [pixels, channels] for a 1x1 convolution, else of [images,
rows, columns, channels], moved by the tap; what lies in the padding it fills with zeros. Of a convolution with stride 2
the map is seen as [N, H / 2, 2, W / 2, 2 * C], so that a tap selects the parity of row and column and its pixels are
neighbours again. No masks, no addresses in registers, no divisions in the loop, and the store is a box too.

Output tiles are boxes of images, rows and columns whose product is BLOCK_M; `box_of` finds the ones that waste least.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import prod

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import shared
from .configs import ConvConfig, config_for, has_descriptors
from .descriptors import descriptor
from .shared import ALIGNMENT, Conv, batch_norm, is_aligned, rounded_to_tf32

_LEAST_DEPTH = 16  # of a step: tl.dot's smallest
# Triton 3.6 makes all wgmma instructions wait for each other where two pipelined loops of one kernel take boxes of more
# than two dimensions, which pass through registers. The second loop, a tenth of the work, then goes without.
_PIPELINES_TWO_LOOPS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


@triton.jit
def box_gemm(
    x,  # [M, C], [N, H, W, C] or [N, H / 2, 2, W / 2, 2 * C]
    weight,  # [K, R * S * C]
    m0, n0, p0, q0, k0,  # the tile's first pixel (counted over all images); image, row, column; filter
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The tile of the convolution, [BLOCK_M, BLOCK_N] in float32."""
    STEPS: tl.constexpr = C // BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in tl.range(0, R * S * STEPS, num_stages=STAGES):
        if FLAT:
            a = x.load([m0, step * BLOCK_K])
        else:
            tap = step // STEPS
            c = step % STEPS * BLOCK_K
            h = tap // S * DIL_H - PAD_H
            w = tap % S * DIL_W - PAD_W
            if STRIDE == 1:
                a = x.load([n0, p0 + h, q0 + w, c])
            else:
                a = x.load([n0, p0 + (h >> 1), h & 1, q0 + (w >> 1), (w & 1) * C + c])
            a = tl.reshape(a, (BLOCK_M, BLOCK_K))
        b = weight.load([k0, step * BLOCK_K])
        if PRECISION == "tf32":
            a, b = rounded_to_tf32(a), rounded_to_tf32(b)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["tiles", "tiles_p", "tiles_q", "K"])
def conv_tma_kernel(
    x,  # descriptor of the input: [M, C], [N, H, W, C] or [N, H / 2, 2, W / 2, 2 * C]
    weight,  # descriptor, [K, R * S * C]
    bias, bn_weight, bn_bias,  # [K] or None
    running_mean, running_var,  # [K]
    shortcut,  # descriptor of the shortcut's input, [M, C2] or [N, P, Q, C2]; None without a projection
    weight2,  # descriptor, [K, C2]
    bias2, bn_weight2, bn_bias2, running_mean2, running_var2,
    residual,  # descriptor like out's, or None
    out,  # descriptor, [M, K] or [N, P, Q, K]
    tiles, tiles_p, tiles_q,  # of the whole output; in a column, in a row of an image
    K,
    eps: tl.float32, eps2: tl.float32,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE: tl.constexpr,  # 1 or 2
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    C2: tl.constexpr,
    FLAT: tl.constexpr,  # maps are [pixels, channels]
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,  # of a float32 product: "tf32" or "ieee"
    BOX_N: tl.constexpr, BOX_P: tl.constexpr, BOX_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_K2: tl.constexpr,
    STAGES: tl.constexpr, STAGES2: tl.constexpr,  # of the loops over the steps of the two products
):  # fmt: skip
    BLOCK_M: tl.constexpr = BOX_N * BOX_P * BOX_Q
    column_tiles = tl.cdiv(K, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        # Columns run fastest: programs side by side read the same input rows, and the weight is small enough for L2.
        k0 = tile % column_tiles * BLOCK_N
        m = tile // column_tiles
        m0 = m * BLOCK_M
        q0 = m % tiles_q * BOX_Q
        p0 = m // tiles_q % tiles_p * BOX_P
        n0 = m // tiles_q // tiles_p * BOX_N
        columns = k0 + tl.arange(0, BLOCK_N)
        column_ok = columns < K

        acc = box_gemm(
            x, weight, m0, n0, p0, q0, k0, C, R, S, STRIDE, PAD_H, PAD_W, DIL_H, DIL_W, FLAT, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
        acc = batch_norm(acc, columns, column_ok, bias, bn_weight, bn_bias, running_mean, running_var, eps)
        if shortcut is not None:
            acc2 = box_gemm(
                shortcut, weight2, m0, n0, p0, q0, k0, C2, 1, 1, 1, 0, 0, 1, 1, FLAT, PRECISION,
                BLOCK_M, BLOCK_N, BLOCK_K2, STAGES2,
            )  # fmt: skip
            acc += batch_norm(acc2, columns, column_ok, bias2, bn_weight2, bn_bias2, running_mean2, running_var2, eps2)
        if residual is not None:
            if FLAT:
                r = residual.load([m0, k0])
            else:
                r = tl.reshape(residual.load([n0, p0, q0, k0]), (BLOCK_M, BLOCK_N))
            acc += r.to(tl.float32)
        if RELU:
            acc = shared.relu(acc)
        y = acc.to(out.dtype)
        if FLAT:
            out.store([m0, k0], y)
        else:
            out.store([n0, p0, q0, k0], tl.reshape(y, (BOX_N, BOX_P, BOX_Q, BLOCK_N)))


@lru_cache
def box_of(n: int, p: int, q: int, block_m: int) -> tuple[int, int, int]:
    """Images, rows and columns, powers of two whose product is ``block_m``, that cover [n, p, q] with the fewest
    elements; of equal ones the one with the most columns, then rows: neighbours share the taps that they read.

    A map of 56 x 56 is covered exactly by [2, 8, 8], one of 14 x 14 by [32, 2, 2], of 7 x 7 by [128, 1, 1].
    """
    sizes = [2**i for i in range(block_m.bit_length())]
    boxes = [(block_m // (b * c), b, c) for b in sizes for c in sizes if b * c <= block_m and max(b, c) <= 256]

    def covered(box: tuple[int, int, int]) -> int:
        return prod(triton.cdiv(size, side) * side for size, side in zip((n, p, q), box, strict=True))

    return min((box for box in boxes if box[0] <= 256), key=lambda box: (covered(box), -box[2], -box[1]))


def _depth(config: ConvConfig, channels: int) -> int:
    """Channels of a step: the largest power of two that divides them, so that no step crosses into another tap."""
    return min(config.block_k, channels & -channels)


def _takes_map(conv: Conv) -> bool:
    """Whether the convolution's taps can be boxes."""
    _, c, h, w = conv.input.shape
    if conv.groups != 1 or c % _LEAST_DEPTH != 0 or not is_aligned(conv.input, conv.weight):
        return False
    if conv.is_pointwise or conv.stride == [1, 1]:
        return True
    return conv.stride == [2, 2] and h % 2 == w % 2 == 0


def takes(conv: Conv, shortcut: Conv | None, residual: Tensor | None, out: Tensor) -> bool:
    """Whether `run` computes it: 16 divides the channels, whole vectors of 16 bytes of filters, stride 1, or 2 on a map
    of even sides, or 1x1; on an architecture whose table has tiles for it."""
    product = shared.product_of(out.dtype)
    if product == "ieee" or not has_descriptors(shared.target_of(out)):
        return False
    n, k, p, q = out.shape
    if k * out.element_size() % ALIGNMENT != 0 or not is_aligned(residual, out):
        return False
    if max(n * p * q, conv.weight[0].numel()) > shared.MOST_INT32:
        return False
    return _takes_map(conv) and (shortcut is None or (shortcut.is_pointwise and _takes_map(shortcut)))


def _map_descriptor(conv: Conv, out: Tensor, flat: bool, box: tuple[int, int, int], depth: int) -> TensorDescriptor:
    """The input as the kernel reads it."""
    x = conv.input
    n, c, h, w = x.shape
    if flat:
        return descriptor(x, (n * h * w, c), (c, 1), (prod(box), depth))
    if conv.is_pointwise:  # the pixels that it sees, whatever its stride
        p, q = out.shape[2:]
        strides = (h * w * c, conv.stride[0] * w * c, conv.stride[1] * c, 1)
        return descriptor(x, (n, p, q, c), strides, (*box, depth))
    if conv.stride[0] == 1:
        return descriptor(x, (n, h, w, c), (h * w * c, w * c, c, 1), (*box, depth))
    shape, strides = (n, h // 2, 2, w // 2, 2 * c), (h * w * c, 2 * w * c, w * c, 2 * c, 1)
    return descriptor(x, shape, strides, (box[0], box[1], 1, box[2], depth))


def _weight_descriptor(conv: Conv, block_n: int, depth: int) -> TensorDescriptor:
    w = conv.weight
    size = w[0].numel()
    return descriptor(w, (w.shape[0], size), (size, 1), (block_n, depth))


def _output_descriptor(t: Tensor, flat: bool, box: tuple[int, int, int], block_n: int) -> TensorDescriptor:
    n, k, p, q = t.shape
    if flat:
        return descriptor(t, (n * p * q, k), (k, 1), (prod(box), block_n))
    return descriptor(t, (n, p, q, k), (p * q * k, q * k, k, 1), (*box, block_n))


@lru_cache(maxsize=4096)
def _plan(
    target: str, product: str, adds: str, pointwise: bool, flat: bool, n: int, p: int, q: int, k: int, processors: int
) -> tuple[ConvConfig, tuple[int, int, int], tuple[int, int, int], int]:
    """The tile, its box, the numbers of tiles (all, in a column, in a row of an image), and of programs."""

    def fitted(shape_class: str):
        config = config_for(target, product, shape_class, adds)
        config = replace(config, block_n=max(16, min(config.block_n, triton.next_power_of_2(k))))
        box = (1, 1, config.block_m) if flat else box_of(n, p, q, config.block_m)
        sizes = (1, 1, n * p * q) if flat else (n, p, q)
        counts = [triton.cdiv(size, side) for size, side in zip(sizes, box, strict=True)]
        return config, box, (prod(counts) * triton.cdiv(k, config.block_n), *counts[1:])

    config, box, tiles = fitted("pointwise" if pointwise else "window")
    if tiles[0] < processors:
        config, box, tiles = fitted("few tiles")
    return config, box, tiles, min(tiles[0], processors * config.programs)


def run(conv: Conv, shortcut: Conv | None, residual: Tensor | None, relu: bool, out: Tensor) -> Tensor:
    """relu(batch_norm(conv) + batch_norm(shortcut), or residual) into ``out`` [N, K, P, Q]; `takes` has said yes, and
    all maps and weights are channels_last."""
    n, k, p, q = out.shape
    parts = [part for part in (conv, shortcut) if part is not None]
    flat = all(part.is_pointwise and max(part.stride) == 1 for part in parts)
    adds = "projection" if shortcut is not None else "residual" if residual is not None else ""
    config, box, tiles, programs = _plan(
        shared.target_of(out), shared.product_of(out.dtype), adds, conv.is_pointwise, flat, n, p, q, k,
        shared.multiprocessors_of(out),
    )  # fmt: skip
    depths = [_depth(config, part.input.shape[1]) for part in parts]
    # More stages than a product has steps would only take the shared memory of another block.
    steps = [part.weight[0].numel() // depth for part, depth in zip(parts, depths, strict=True)]
    stages = [min(config.num_stages, count) for count in steps]
    if shortcut is not None and not flat and out.element_size() == 2 and not _PIPELINES_TWO_LOOPS:
        stages[1] = 1
    maps = [_map_descriptor(part, out, flat, box, depth) for part, depth in zip(parts, depths, strict=True)]
    weights = [_weight_descriptor(part, config.block_n, depth) for part, depth in zip(parts, depths, strict=True)]
    second = [None] * 7 if shortcut is None else [maps[1], weights[1], *shortcut.vectors]
    with shared.on_device_of(out):
        conv_tma_kernel[(programs,)](
            maps[0], weights[0], *conv.vectors, *second,
            None if residual is None else _output_descriptor(residual, flat, box, config.block_n),
            _output_descriptor(out, flat, box, config.block_n),
            *tiles, k, conv.eps, conv.eps if shortcut is None else shortcut.eps,
            C=conv.input.shape[1], R=conv.weight.shape[2], S=conv.weight.shape[3],
            STRIDE=1 if conv.is_pointwise else conv.stride[0],
            PAD_H=conv.padding[0], PAD_W=conv.padding[1], DIL_H=conv.dilation[0], DIL_W=conv.dilation[1],
            C2=0 if shortcut is None else shortcut.input.shape[1], FLAT=flat, RELU=relu,
            PRECISION=shared.precision_of(out.dtype), BOX_N=box[0], BOX_P=box[1], BOX_Q=box[2],
            BLOCK_N=config.block_n, BLOCK_K=depths[0], BLOCK_K2=depths[-1],
            STAGES=stages[0], STAGES2=stages[-1], num_warps=config.num_warps, num_stages=max(stages),
        )  # fmt: skip
    return out
