"""add_relu: relu(a + b) in one pass over memory. The simplest operator, and the template for every other one.

An operator is made of these pieces, in this order:

1. The schema, in csrc/ops.cpp: ``add_relu(Tensor a, Tensor b) -> Tensor``. It is C++ so that a process without Python
   knows the operator.
2. The reference: plain torch, any device and dtype, differentiable. Run in float64 it is the oracle of the tests.
3. The checks, shared by the kernel and the fake, so that eager and compiled code raise the same words. They name the
   argument, the rule and what came.
4. The fake: an empty tensor with the result's exact shape, strides, dtype and device. torch.compile plans memory by it.
5. The kernel: checks, asks `choose` for a backend, and calls it: the internal operator ``_add_relu_cpu``
   (csrc/cpu/add_relu.cpp -> csrc/cpu/kernels/add_relu.cpp) or ``_add_relu_cuda`` (csrc/cuda/ops.cpp ->
   csrc/cuda/add_relu.cu), or the Triton launcher (resnet_fast/kernels/add_relu.py).
6. The gradient: differentiable torch operators, so that double backward works.
7. Autocast: which arguments are cast.
8. The public function, which users import.

A new operator: copy this file, its C++ and Triton kernels and tests/test_add_relu.py, and rename.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..choose import choose
from .registration import autocast_tensor, dispatch, register, under_transform


def add_relu_ref(a: Tensor, b: Tensor) -> Tensor:
    """relu(a + b) in plain torch."""
    return torch.relu(a + b)


def check_add_relu(a: Tensor, b: Tensor) -> None:
    if not a.is_floating_point():
        raise RuntimeError(f"add_relu: a must be floating point, got {a.dtype}")
    if a.shape != b.shape:
        raise RuntimeError(f"add_relu: a and b must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.dtype != b.dtype:
        raise RuntimeError(f"add_relu: a and b must have the same dtype, got {a.dtype} and {b.dtype}")
    if a.device != b.device:
        raise RuntimeError(f"add_relu: a and b must be on the same device, got {a.device} and {b.device}")


def _fake(a: Tensor, b: Tensor) -> Tensor:
    check_add_relu(a, b)
    return torch.empty_like(a)  # keeps a's strides if a is dense


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    check_add_relu(a, b)
    backend = choose("add_relu", a.device.type, a.dtype).backend
    if backend == "cpu":
        return torch.ops.resnet_fast._add_relu_cpu(a, b)
    if backend == "cuda":
        return torch.ops.resnet_fast._add_relu_cuda(a, b)
    if backend == "triton":
        from ..kernels.add_relu import add_relu_triton

        return add_relu_triton(a, b)
    return torch.empty_like(a).copy_(add_relu_ref(a, b))


def _setup_context(ctx, inputs, output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    (output,) = ctx.saved_tensors
    # As in torch.relu: the gradient passes where the output is positive or NaN.
    grad = torch.ops.aten.threshold_backward(grad, output, 0)
    return grad, grad


def _autocast(device_type: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return autocast_tensor(a, device_type), autocast_tensor(b, device_type)


register(
    "add_relu",
    kernel=_kernel,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)


_op = torch.ops.resnet_fast.add_relu.default


def add_relu(a: Tensor, b: Tensor) -> Tensor:
    """relu(a + b), the end of every residual block, in one pass over memory.

    Args:
        a, b: same shape, dtype (float32, float16, bfloat16; float64 runs on the reference) and device, any strides.
            There is no broadcasting.

    Returns:
        A new tensor with the strides of ``torch.empty_like(a)``. NaN stays NaN, as in torch.relu. Differentiable in
        both arguments, twice.

    Raises:
        RuntimeError: shapes, dtypes or devices differ, the dtype is not floating point, or a backend forced by
            `resnet_fast.use_backend` cannot run it.
    """
    if under_transform():
        return add_relu_ref(a, b)
    return dispatch(_op, (a, b), typed=isinstance(a, Tensor) and isinstance(b, Tensor))
