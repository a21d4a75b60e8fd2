"""add_relu in Triton: out = relu(a + b), element by element.

The simplest kernel here, and the template of the others: a kernel that only computes, and a launcher that lays out its
arguments. The launcher relies on the checks of ops/add_relu.py.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements a program and its warps. With 4 warps a thread has 8 elements: one 128-bit access of 16-bit elements, two of
# float32. Bound by memory, so nothing else matters.
_BLOCK = 1024
_WARPS = 4


@triton.jit
def add_relu_kernel(a, b, out, n, BLOCK: tl.constexpr):
    # In 64 bits, since n may pass 2^31. It is one scalar; the lanes below stay 32-bit.
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    # Whole blocks go without a mask: with one, an n that 16 does not divide would narrow every access to one element.
    if start + BLOCK <= n:
        x = tl.load(a + start + lane).to(tl.float32) + tl.load(b + start + lane).to(tl.float32)
        # A plain maximum turns NaN into 0; torch.relu keeps it.
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out + start + lane, x.to(out.dtype.element_ty))
    else:
        tail = start + lane < n
        x = tl.load(a + start + lane, mask=tail, other=0.0).to(tl.float32)
        x += tl.load(b + start + lane, mask=tail, other=0.0).to(tl.float32)
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out + start + lane, x.to(out.dtype.element_ty), mask=tail)


def _in_layout_of(out: Tensor, t: Tensor) -> Tensor:
    """``t``, or a copy of it whose elements lie in memory as those of ``out`` do."""
    same = all(size < 2 or s == o for size, s, o in zip(t.shape, t.stride(), out.stride(), strict=True))
    return t if same else torch.empty_like(out).copy_(t)


def add_relu_triton(a: Tensor, b: Tensor) -> Tensor:
    """relu(a + b) for two checked tensors of one shape, dtype and device; strides of ``torch.empty_like(a)``."""
    out = torch.empty_like(a)  # dense, so that its elements are one range of memory
    n = out.numel()
    if n == 0:
        return out
    a, b = _in_layout_of(out, a), _in_layout_of(out, b)
    # Triton launches on the current device, which need not be the tensors' one.
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        add_relu_kernel[(triton.cdiv(n, _BLOCK),)](a, b, out, n, BLOCK=_BLOCK, num_warps=_WARPS)
    return out
