"""What the Triton convolutions share: the end of every kernel, and what their launchers ask."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import tf32_allowed, triton_interpreted

# Where a tensor has more elements than this, offsets are computed in 64 bits. Below 2^31 by more than the rows of a
# tile, since the row numbers of the last tile run past the last row and must not wrap around.
MOST_INT32 = 2**31 - 2**16

ALIGNMENT = 16  # bytes: of a vector, and of a descriptor's tensor and of all its strides but the last, which is 1


class Conv(NamedTuple):
    """A convolution and the BatchNorm behind it. ``vectors``: bias, bn_weight, bn_bias, running_mean, running_var, each
    [K] and contiguous, or None where the BatchNorm has none; without running_mean there is no BatchNorm."""

    input: Tensor  # [N, C, H, W], any strides
    weight: Tensor  # [K, C / groups, R, S], any strides
    vectors: list[Tensor | None]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    eps: float

    @classmethod
    def of(cls, input, weight, *rest) -> Conv:
        """As the operators pass it on: input, weight, the five vectors, stride, padding, dilation, groups, eps."""
        return cls(input, weight, [None if v is None else v.contiguous() for v in rest[:5]], *rest[5:])

    @property
    def is_pointwise(self) -> bool:
        """Whether every output sees one pixel of the input."""
        return tuple(self.weight.shape[2:]) == (1, 1) and max(self.padding) == 0


@triton.jit
def rounded_to_tf32(x):
    """float32 to the nearest value that TF32 can tell apart (10 bits of mantissa), as cuDNN rounds its operands.

    Tensor cores by themselves ignore the last 13 bits. That error points towards 0 in every operand, so it adds up: 8
    times cuDNN's in the logits of a ResNet-18.
    """
    rounded = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)  # the sum may carry a NaN into the sign


@triton.jit
def batch_norm_vectors(
    columns, column_ok,  # [BLOCK_N]: filters, and which of them exist
    bias, bn_weight, bn_bias,  # [filters] or None
    running_mean, running_var,  # [filters], or both None: no BatchNorm
    eps,
):  # fmt: skip
    """mean, scale and shift, [BLOCK_N] in float32 each: batch_norm(x + bias) = (x - mean) * scale + shift.

    From BatchNorm's own tensors, in every call: there is nothing folded that could go stale. The correctly rounded root
    and quotient are one per column.
    """
    mean = tl.zeros(columns.shape, dtype=tl.float32)
    scale = mean + 1.0
    shift = mean
    if running_var is not None:
        var = tl.load(running_var + columns, mask=column_ok, other=1.0).to(tl.float32)
        scale = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
        mean = tl.load(running_mean + columns, mask=column_ok, other=0.0).to(tl.float32)
        if bn_weight is not None:
            scale *= tl.load(bn_weight + columns, mask=column_ok, other=0.0).to(tl.float32)
        if bn_bias is not None:
            shift = tl.load(bn_bias + columns, mask=column_ok, other=0.0).to(tl.float32)
    if bias is not None:
        mean -= tl.load(bias + columns, mask=column_ok, other=0.0).to(tl.float32)
    return mean, scale, shift


@triton.jit
def batch_norm(acc, columns, column_ok, bias, bn_weight, bn_bias, running_mean, running_var, eps):
    """batch_norm(acc + bias), [BLOCK_M, BLOCK_N] in float32; the other arguments are those of `batch_norm_vectors`."""
    mean, scale, shift = batch_norm_vectors(
        columns, column_ok, bias, bn_weight, bn_bias, running_mean, running_var, eps
    )
    return (acc - mean[None, :]) * scale[None, :] + shift[None, :]


@triton.jit
def relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)  # a plain maximum turns NaN into 0


@triton.jit
def residual_relu_store(
    acc,  # [BLOCK_M, BLOCK_N], float32
    rows, row_ok,  # [BLOCK_M]: output pixels, and which of them exist
    columns, column_ok,  # [BLOCK_N]: filters, likewise
    residual,  # [pixels, filters] or None
    out,  # [pixels, filters]
    filters,
    RELU: tl.constexpr,
):  # fmt: skip
    """out = relu(acc + residual)."""
    offsets = rows[:, None] * filters + columns[None, :]
    ok = row_ok[:, None] & column_ok[None, :]
    if residual is not None:
        acc += tl.load(residual + offsets, mask=ok, other=0.0).to(tl.float32)
    if RELU:
        acc = relu(acc)
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=ok)


def reach(t: Tensor) -> int:
    """The offset of the last element; a view's strides may be of any size."""
    return sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))


def needs_int64(input: Tensor, padding: list[int], *others: Tensor) -> bool:
    """Whether an offset into input [N, C, H, W], channels_last, or into one of the others may not fit into 32 bits.

    Windows begin in the padding, so the padded input counts; a weight may be a view with strides of any size.
    """
    n, c, h, w = input.shape
    padded = n * c * (h + 2 * padding[0]) * (w + 2 * padding[1])
    return max(padded, *map(reach, others)) > MOST_INT32


def is_aligned(*tensors: Tensor | None) -> bool:
    """Whether each begins where a vector of 16 bytes, or a tensor descriptor, may."""
    return all(t is None or t.data_ptr() % ALIGNMENT == 0 for t in tensors)


def has_vectors(map: Tensor) -> bool:
    """Whether a map [N, C, H, W], channels_last, can be read in vectors of 16 bytes."""
    return map.shape[1] * map.element_size() % ALIGNMENT == 0 and is_aligned(map)


def precision_of(dtype: torch.dtype) -> str:
    """tl.dot's input_precision. It matters for float32 only; "ieee" is what 16-bit products are anyway."""
    return "tf32" if dtype == torch.float32 and tf32_allowed() else "ieee"


def product_of(dtype: torch.dtype) -> str:
    """The kind of product, as configs.py names it: "16-bit", "tf32" or "ieee"."""
    return precision_of(dtype) if dtype == torch.float32 else "16-bit"


@lru_cache
def _architecture_of(device: int | None) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{10 * major + minor}"


def target_of(t: Tensor) -> str:
    """Where a kernel on ``t`` runs, as configs.py names it: "interpreter" or an architecture such as "sm_90"."""
    if triton_interpreted():
        return "interpreter"
    if t.is_cuda:
        return _architecture_of(t.device.index)
    return f"sm_{triton.runtime.driver.active.get_current_target().arch}"  # compiled for a GPU that is not here


@lru_cache
def _multiprocessors_of(device: int | None) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors_of(t: Tensor) -> int:
    """Those of the GPU that ``t`` is on. In the interpreter 3, so that programs take several tiles each; 132, an
    H100's, where a kernel is compiled for a GPU that is not here."""
    if t.is_cuda:
        return _multiprocessors_of(t.device.index)
    return 3 if triton_interpreted() else 132


def on_device_of(t: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors' one."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()
