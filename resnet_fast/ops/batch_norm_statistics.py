"""batch_norm_statistics: what batch normalisation subtracts and divides by in training.

The pieces and their order are explained in add_relu.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..choose import choose
from .registration import dispatch, register, under_transform


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What statistics of a map of ``dtype`` are kept in."""
    return torch.promote_types(torch.float32, dtype)


def batch_norm_statistics_ref(input: Tensor) -> tuple[Tensor, Tensor]:  # [N, C, H, W]
    """batch_norm_statistics in plain torch, any device and dtype; [C] each."""
    var, mean = torch.var_mean(input.to(wide_dtype(input.dtype)), (0, 2, 3), correction=0)
    return mean, var


def check_map(operator: str, input: Tensor) -> None:
    """``input`` [N, C, H, W] is something that has statistics."""
    if input.dim() != 4:
        raise RuntimeError(f"{operator}: input must have 4 dimensions [N, C, H, W], got shape {tuple(input.shape)}")
    if not input.is_floating_point():
        raise RuntimeError(f"{operator}: input must be floating point, got {input.dtype}")
    if 0 in input.shape:
        raise RuntimeError(f"{operator}: input must not be empty, got shape {tuple(input.shape)}")


def empty_statistics(input: Tensor) -> Tensor:
    return input.new_empty(input.shape[1], dtype=wide_dtype(input.dtype))


def _fake(input: Tensor) -> tuple[Tensor, Tensor]:
    check_map("batch_norm_statistics", input)
    return empty_statistics(input), empty_statistics(input)


_ops = {
    "cpu": torch.ops.resnet_fast._batch_norm_statistics_cpu.default,
    "cuda": torch.ops.resnet_fast._batch_norm_statistics_cuda.default,
}


def statistics_kernel(input: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """On one backend; the argument has been checked."""
    if backend in _ops:
        return _ops[backend](input)
    if backend == "triton":
        from ..kernels.batch_norm_relu import batch_norm_statistics_triton

        return batch_norm_statistics_triton(input)
    return batch_norm_statistics_ref(input)


def _kernel(input: Tensor) -> tuple[Tensor, Tensor]:
    check_map("batch_norm_statistics", input)
    return statistics_kernel(input, choose("batch_norm_statistics", input.device.type, input.dtype).backend)


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[0])


def _backward(ctx, grad_mean: Tensor | None, grad_var: Tensor | None) -> Tensor | None:
    if grad_mean is None and grad_var is None:
        return None
    input, mean = ctx.saved_tensors
    grad = torch.zeros_like(mean) if grad_mean is None else grad_mean
    grad = grad.view(1, -1, 1, 1).expand(input.shape)
    if grad_var is not None:
        grad = grad + 2 * (input - mean.view(1, -1, 1, 1)) * grad_var.view(1, -1, 1, 1)
    return (grad / (input.numel() // input.shape[1])).to(input.dtype)


def _autocast(device_type: str, input: Tensor) -> tuple[Tensor]:
    return (input,)


register(
    "batch_norm_statistics",
    kernel=_kernel,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)


_op = torch.ops.resnet_fast.batch_norm_statistics.default


def batch_norm_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel over batch, height and width, in one pass over memory.

    Args:
        input: [N, C, H, W], not empty; float32, float16, bfloat16 (float64 runs on the reference); any strides,
            channels_last is the fast one.

    Returns:
        mean, var: [C], float32 (float64 for float64); var is biased: divided by N * H * W. The result does not depend
        on the number of threads, and is right where the mean is much larger than the deviation: blocks of pixels are
        summed in two passes each, and combined. Differentiable, twice.

    Raises:
        RuntimeError: input breaks a rule above, or a backend forced by `resnet_fast.use_backend` cannot run it.

    References:
        Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances (1979).
    """
    if under_transform():
        return batch_norm_statistics_ref(input)
    return dispatch(_op, (input,), typed=isinstance(input, Tensor))
