"""batch_norm_relu_projection: relu(batch_norm(input) + batch_norm(shortcut)) with the statistics of the batch.

The end of a residual block with a projection shortcut, in training: both normalisations, the sum and the ReLU in one
pass. The pieces and their order are explained in add_relu.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..choose import choose
from .arguments import pack_bits, unpack_bits
from .batch_norm_relu import (
    Norm,
    apply_kernel,
    backward_kernel,
    batch_norm_ref,
    check_batch,
    check_norm,
    check_same,
    empty_map_like,
    empty_mask,
)
from .batch_norm_statistics import empty_statistics, statistics_kernel
from .registration import dispatch, dispatch_gradient, double_backward, register, under_transform

_NAME = "batch_norm_relu_projection"


def batch_norm_relu_projection_ref(
    input: Tensor,  # [N, C, H, W]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    shortcut: Tensor,  # [N, C, H, W]
    shortcut_weight: Tensor | None,  # [C]
    shortcut_bias: Tensor | None,  # [C]
    eps: float = 1e-5,
    shortcut_eps: float = 1e-5,
) -> Tensor:
    """The first result of batch_norm_relu_projection in plain torch, any device and dtype; [N, C, H, W]."""
    residual = batch_norm_ref(shortcut, shortcut_weight, shortcut_bias, shortcut_eps)
    return torch.relu(batch_norm_ref(input, weight, bias, eps) + residual)


def _check(input: Tensor, weight, bias, shortcut: Tensor, shortcut_weight, shortcut_bias) -> None:
    check_batch(_NAME, input)
    check_same(_NAME, "shortcut", shortcut, input)
    check_norm(_NAME, input, weight=weight, bias=bias)
    check_norm(_NAME, input, prefix="shortcut_", weight=shortcut_weight, bias=shortcut_bias)


def _fake(input, weight, bias, shortcut, shortcut_weight, shortcut_bias, eps, shortcut_eps) -> tuple[Tensor, ...]:
    _check(input, weight, bias, shortcut, shortcut_weight, shortcut_bias)
    return empty_map_like(input), empty_mask(input, True), *(empty_statistics(input) for _ in range(4))


def _kernel(input, weight, bias, shortcut, shortcut_weight, shortcut_bias, eps, shortcut_eps) -> tuple[Tensor, ...]:
    _check(input, weight, bias, shortcut, shortcut_weight, shortcut_bias)
    backend = choose(_NAME, input.device.type, input.dtype).backend
    norm = Norm(*statistics_kernel(input, backend), weight, bias, eps)
    shortcut_norm = Norm(*statistics_kernel(shortcut, backend), shortcut_weight, shortcut_bias, shortcut_eps)
    out, mask = apply_kernel(backend, input, norm, shortcut, shortcut_norm, with_mask=True)
    return out, mask, *norm[:2], *shortcut_norm[:2]


def _setup_context(ctx, inputs, output) -> None:
    input, weight, bias, shortcut, shortcut_weight, shortcut_bias, *ctx.eps = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, weight, bias, shortcut, shortcut_weight, shortcut_bias, *output[1:])


def _backward(ctx, grad: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    *inputs, mask, mean, var, shortcut_mean, shortcut_var = ctx.saved_tensors
    input, weight, _, shortcut, shortcut_weight, _ = inputs
    needs = ctx.needs_input_grad
    if torch.is_grad_enabled():
        grad = torch.where(unpack_bits(mask, input.shape[1]), grad, 0)
        branches = (inputs[:3], needs[:3], ctx.eps[0]), (inputs[3:], needs[3:6], ctx.eps[1])
        found = [
            double_backward(lambda *t, eps=eps: batch_norm_ref(*t, eps), tensors, asked, grad)
            for tensors, asked, eps in branches
        ]
        return (*found[0], *found[1], None, None)
    of_input, of_weight, of_bias, of_shortcut, of_shortcut_weight = dispatch_gradient(
        _backward_op,
        grad,
        input,
        mean,
        var,
        weight,
        shortcut,
        shortcut_mean,
        shortcut_var,
        shortcut_weight,
        mask,
        *ctx.eps,
    )
    grads = (of_input, of_weight, of_bias, of_shortcut, of_shortcut_weight, of_bias)
    found = (
        g.to(t.dtype) if need and t is not None else None for g, t, need in zip(grads, inputs, needs, strict=False)
    )
    return (*found, None, None)


def _autocast(device_type: str, *args) -> tuple:
    return args  # torch's batch_norm keeps its map's dtype


register(
    _NAME,
    kernel=_kernel,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)


def _backward_fake(grad, input, mean, var, weight, shortcut, *_) -> tuple[Tensor, ...]:
    check_same(_NAME, "grad", grad, input)
    vectors = [empty_statistics(input) for _ in range(3)]
    return empty_map_like(input), vectors[0], vectors[1], empty_map_like(input), vectors[2]


def _backward_kernel(
    grad, input, mean, var, weight, shortcut, shortcut_mean, shortcut_var, shortcut_weight, mask, eps, shortcut_eps
) -> tuple[Tensor, ...]:
    check_same(_NAME, "grad", grad, input)
    backend = choose(_NAME, input.device.type, input.dtype).backend
    norm = Norm(mean, var, weight, None, eps)
    shortcut_norm = Norm(shortcut_mean, shortcut_var, shortcut_weight, None, shortcut_eps)
    return backward_kernel(backend, grad, input, norm, mask, shortcut, shortcut_norm)


_backward_op = torch.ops.resnet_fast._batch_norm_relu_projection_backward.default

register("_batch_norm_relu_projection_backward", kernel=_backward_kernel, fake=_backward_fake)


_op = torch.ops.resnet_fast.batch_norm_relu_projection.default


def batch_norm_relu_projection(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shortcut: Tensor,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    eps: float = 1e-5,
    shortcut_eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """relu(batch_norm(input) + batch_norm(shortcut)) with the statistics of the batch, applied in one pass.

    For its gradient it keeps both maps and one bit a value.

    Args:
        input: [N, C, H, W] with at least 2 values per channel; float32, float16, bfloat16 (float64 runs on the
            reference); any strides, channels_last is the fast one.
        weight, bias: [C] or None, any floating-point dtype.
        shortcut: [N, C, H, W], what the shortcut's convolution returned, input's dtype, any strides.
        shortcut_weight, shortcut_bias: [C] or None, any floating-point dtype.
        eps, shortcut_eps: added to the variances.

    Returns:
        out: [N, C, H, W] in channels_last, input's dtype. Differentiable in every tensor, twice.
        mask: as `batch_norm_relu`'s.
        mean, var, shortcut_mean, shortcut_var: [C] each, as `batch_norm_relu`'s.

    Raises:
        RuntimeError: an argument breaks a rule above, or a backend forced by `resnet_fast.use_backend` cannot run it.
        ValueError: there is one value per channel.

    References:
        NVIDIA's ResNet-50 in MLPerf Training, whose add with two normalisations it is.
    """
    args = (input, weight, bias, shortcut, shortcut_weight, shortcut_bias, eps, shortcut_eps)
    if under_transform():
        out = batch_norm_relu_projection_ref(*args)
        statistics = (
            *statistics_kernel(input.detach(), "reference"),
            *statistics_kernel(shortcut.detach(), "reference"),
        )
        return out, pack_bits(~(out <= 0)), *statistics
    return dispatch(_op, args, typed=None)
