"""What the Triton convolutions share: the end of every kernel, and what their launchers ask."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Where a tensor has more elements than this, offsets are computed in 64 bits. Below 2^31 by more than the rows of a
# tile, since the row numbers of the last tile run past the last row and must not wrap around.
MOST_INT32 = 2**31 - 2**16


@triton.jit
def rounded_to_tf32(x):
    """float32 to the nearest value that TF32 can tell apart (10 bits of mantissa), as cuDNN rounds its operands.

    Tensor cores by themselves ignore the last 13 bits. That error points towards 0 in every operand, so it adds up: 8
    times cuDNN's in the logits of a ResNet-18.
    """
    rounded = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)  # the sum may carry a NaN into the sign


@triton.jit
def batch_norm_store(
    acc,  # [BLOCK_M, BLOCK_N], float32
    rows, row_ok,  # [BLOCK_M]: output pixels, and which of them exist
    columns, column_ok,  # [BLOCK_N]: filters, likewise
    bias, bn_weight, bn_bias,  # [filters] or None
    running_mean, running_var,  # [filters]
    residual,  # [pixels, filters] or None
    out,  # [pixels, filters]
    filters,
    eps,
    RELU: tl.constexpr,
):  # fmt: skip
    """The end of every convolution: out = relu(batch_norm(acc + bias) + residual)."""
    # BatchNorm in float32 from its own tensors, in every call: there is nothing folded that could go stale. The
    # correctly rounded root and quotient are one per column, so they cost nothing.
    var = tl.load(running_var + columns, mask=column_ok, other=1.0).to(tl.float32)
    scale = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    if bn_weight is not None:
        scale *= tl.load(bn_weight + columns, mask=column_ok, other=0.0).to(tl.float32)
    mean = tl.load(running_mean + columns, mask=column_ok, other=0.0).to(tl.float32)
    if bias is not None:
        mean -= tl.load(bias + columns, mask=column_ok, other=0.0).to(tl.float32)
    acc = (acc - mean[None, :]) * scale[None, :]
    if bn_bias is not None:
        acc += tl.load(bn_bias + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]

    offsets = rows[:, None] * filters + columns[None, :]
    ok = row_ok[:, None] & column_ok[None, :]
    if residual is not None:
        acc += tl.load(residual + offsets, mask=ok, other=0.0).to(tl.float32)
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)  # a plain maximum turns NaN into 0
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=ok)


def reach(t: Tensor) -> int:
    """The offset of the last element; a view's strides may be of any size."""
    return sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))


def tf32_allowed() -> bool:
    """Whether torch's own float32 convolutions may use TF32.

    Asked by the newer per-operator setting where torch has it: the older ``allow_tf32`` raises once a program has set
    the newer one.
    """
    precision = getattr(getattr(torch.backends.cudnn, "conv", None), "fp32_precision", None)
    return torch.backends.cudnn.allow_tf32 if precision is None else precision == "tf32"


def precision_of(dtype: torch.dtype) -> str:
    """tl.dot's input_precision. It matters for float32 only; "ieee" is what 16-bit products are anyway."""
    return "tf32" if dtype == torch.float32 and tf32_allowed() else "ieee"
