"""batch_norm_relu: relu(batch_norm(input) + residual) with the statistics of the batch, as training needs it.

The pieces and their order are explained in add_relu.py. The gradient is an operator of its own, so that compiled
graphs keep it whole; asked for a gradient that can be differentiated again, it runs the reference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..choose import choose
from .arguments import as_channels_last, empty_channels_last, pack_bits, packed_bits_size, unpack_bits
from .batch_norm_statistics import check_map, empty_statistics, statistics_kernel, wide_dtype
from .registration import dispatch, dispatch_gradient, double_backward, register, under_transform


def batch_norm_ref(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """batch_norm(input) with the statistics of the batch, in plain torch."""
    vectors = (weight, bias)
    if {v.dtype for v in vectors if v is not None} - {input.dtype}:
        vectors = tuple(None if v is None else v.to(wide_dtype(input.dtype)) for v in vectors)
    return torch.batch_norm(input, *vectors, None, None, True, 0.0, eps, torch.backends.cudnn.enabled)


def batch_norm_relu_ref(
    input: Tensor,  # [N, C, H, W]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    residual: Tensor | None = None,  # [N, C, H, W]
    eps: float = 1e-5,
    relu: bool = True,
) -> Tensor:
    """The first result of batch_norm_relu in plain torch, any device and dtype; [N, C, H, W]."""
    out = batch_norm_ref(input, weight, bias, eps)
    if residual is not None:
        out = out + residual
    return torch.relu(out) if relu else out


class Norm(NamedTuple):
    """A batch normalisation whose statistics are known: (x - mean) / sqrt(var + eps) * weight + bias; [C] each."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def factors(self) -> tuple[Tensor, Tensor]:
        """1 / sqrt(var + eps), and the scale of the map."""
        invstd = torch.rsqrt(self.var + self.eps)
        return invstd, invstd if self.weight is None else invstd * self.weight.to(invstd.dtype)

    def apply(self, input: Tensor) -> Tensor:
        """The normalised map, in the dtype of the statistics."""
        out = (input.to(self.mean.dtype) - _per_channel(self.mean)) * _per_channel(self.factors()[1])
        return out if self.bias is None else out + _per_channel(self.bias.to(out.dtype))

    def gradients(self, grad: Tensor, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of input, weight and bias, behind ``grad``, that of the normalised map, in the dtype of the statistics."""
        invstd, scale = self.factors()
        centred = input.to(self.mean.dtype) - _per_channel(self.mean)
        grad_bias, grad_weight = grad.sum((0, 2, 3)), (grad * centred).sum((0, 2, 3)) * invstd
        count = input.numel() // input.shape[1]
        through = centred * _per_channel(invstd * grad_weight) + _per_channel(grad_bias)
        return (grad - through / count) * _per_channel(scale), grad_weight, grad_bias


def _per_channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def check_norm(operator: str, input: Tensor, prefix: str = "", **vectors: Tensor | None) -> None:
    """The vectors of a batch normalisation of ``input`` [N, C, H, W], by name."""
    channels = input.shape[1]
    for name, t in vectors.items():
        if t is None:
            continue
        if t.dim() != 1 or t.shape[0] != channels:
            raise RuntimeError(
                f"{operator}: {prefix}{name} must have shape ({channels},), one value per channel, got {tuple(t.shape)}"
            )
        if not t.is_floating_point():
            raise RuntimeError(f"{operator}: {prefix}{name} must be floating point, got {t.dtype}")
        if t.device != input.device:
            raise RuntimeError(f"{operator}: {prefix}{name} must be on input's device {input.device}, got {t.device}")


def check_same(operator: str, name: str, t: Tensor, input: Tensor) -> None:
    """``t`` is a map like ``input``."""
    if t.shape != input.shape:
        raise RuntimeError(f"{operator}: {name} must have input's shape {tuple(input.shape)}, got {tuple(t.shape)}")
    if t.dtype != input.dtype:
        raise RuntimeError(f"{operator}: {name} must have input's dtype {input.dtype}, got {t.dtype}")
    if t.device != input.device:
        raise RuntimeError(f"{operator}: {name} must be on input's device {input.device}, got {t.device}")


def check_batch(operator: str, input: Tensor) -> None:
    """As torch.nn.functional.batch_norm: one value has no variance."""
    check_map(operator, input)
    if input.numel() == input.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")


def check_batch_norm_relu(input: Tensor, weight, bias, residual: Tensor | None) -> None:
    check_batch("batch_norm_relu", input)
    check_norm("batch_norm_relu", input, weight=weight, bias=bias)
    if residual is not None:
        check_same("batch_norm_relu", "residual", residual, input)


def empty_map_like(input: Tensor) -> Tensor:
    return empty_channels_last(input, input.shape)


def empty_mask(input: Tensor, with_mask: bool) -> Tensor:
    return input.new_empty(packed_bits_size(input.shape) if with_mask else (0,), dtype=torch.uint8)


_forward_ops = {
    "cpu": torch.ops.resnet_fast._batch_norm_relu_cpu.default,
    "cuda": torch.ops.resnet_fast._batch_norm_relu_cuda.default,
}
_backward_ops = {
    "cpu": torch.ops.resnet_fast._batch_norm_relu_backward_cpu.default,
    "cuda": torch.ops.resnet_fast._batch_norm_relu_backward_cuda.default,
}
_NO_NORM = (None, None, None, None, 0.0)


def apply_kernel(
    backend: str,
    input: Tensor,  # [N, C, H, W]
    norm: Norm,
    residual: Tensor | None = None,  # [N, C, H, W]
    residual_norm: Norm | None = None,
    relu: bool = True,
    with_mask: bool = False,
) -> tuple[Tensor, Tensor]:
    """relu(norm(input) + residual_norm(residual)) and the mask, on one backend; the arguments have been checked."""
    args = (input, *norm, residual, *(residual_norm or _NO_NORM), relu, with_mask)
    if backend in _forward_ops:
        return _forward_ops[backend](*args)
    if backend == "triton":
        from ..kernels.batch_norm_relu import batch_norm_relu_triton

        return batch_norm_relu_triton(*args)
    out = norm.apply(input)
    if residual is not None:
        out = out + (residual if residual_norm is None else residual_norm.apply(residual))
    out = (torch.relu(out) if relu else out).to(input.dtype)
    mask = pack_bits(~(out <= 0)) if with_mask else empty_mask(input, False)
    return as_channels_last(out), mask


def backward_kernel(
    backend: str,
    grad: Tensor,  # [N, C, H, W]
    input: Tensor,  # [N, C, H, W]
    norm: Norm,
    mask: Tensor | None = None,  # [N, H, W, ceil(C / 8)]
    shortcut: Tensor | None = None,  # [N, C, H, W]
    shortcut_norm: Norm | None = None,
    relu: bool = True,
    needs_residual: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, norm's weight and bias, of the shortcut (or, without its normalisation, the residual) and of
    its weight, on one backend. Without a mask the ReLU's sign is computed again. What is not asked for is empty."""
    shortcut_args = (shortcut, *(_NO_NORM if shortcut_norm is None else shortcut_norm))
    shortcut_args = (*shortcut_args[:4], shortcut_args[5])  # its bias moves nothing
    args = (grad, input, *norm, mask, *shortcut_args, relu, needs_residual)
    if backend in _backward_ops:
        return _backward_ops[backend](*args)
    if backend == "triton":
        from ..kernels.batch_norm_relu import batch_norm_relu_backward_triton

        return batch_norm_relu_backward_triton(*args)
    g = grad.to(norm.mean.dtype)
    if relu:
        # Of the map as it was stored: what rounds to zero lets nothing through.
        passes = ~(norm.apply(input).to(input.dtype) <= 0) if mask is None else unpack_bits(mask, input.shape[1])
        g = torch.where(passes, g, 0)
    grads = norm.gradients(g, input)
    empty = input.new_empty(0)
    of_shortcut, of_weight = empty, empty.to(norm.mean.dtype)
    if shortcut_norm is not None:
        of_shortcut, of_weight, _ = shortcut_norm.gradients(g, shortcut)
    elif needs_residual:
        of_shortcut = g
    maps = [as_channels_last(t.to(input.dtype)) if t.dim() == 4 else t for t in (grads[0], of_shortcut)]
    return maps[0], grads[1], grads[2], maps[1], of_weight


def _fake(input: Tensor, weight, bias, residual, eps: float, relu: bool) -> tuple[Tensor, ...]:
    check_batch_norm_relu(input, weight, bias, residual)
    mask = empty_mask(input, relu and residual is not None)
    return empty_map_like(input), mask, empty_statistics(input), empty_statistics(input)


def _kernel(input: Tensor, weight, bias, residual, eps: float, relu: bool) -> tuple[Tensor, ...]:
    check_batch_norm_relu(input, weight, bias, residual)
    backend = choose("batch_norm_relu", input.device.type, input.dtype).backend
    mean, var = statistics_kernel(input, backend)
    norm = Norm(mean, var, weight, bias, eps)
    out, mask = apply_kernel(backend, input, norm, residual, None, relu, relu and residual is not None)
    return out, mask, mean, var


def _setup_context(ctx, inputs, output) -> None:
    input, weight, bias, _, ctx.eps, ctx.relu = inputs
    _, mask, mean, var = output
    ctx.mark_non_differentiable(mask, mean, var)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, weight, bias, mask, mean, var)


def _backward(ctx, grad: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    input, weight, bias, mask, mean, var = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if torch.is_grad_enabled():
        # The residual only moves the ReLU's sign, which the mask knows.
        return (*_differentiable(ctx, grad, input, weight, bias, mask), None, None)
    grads = dispatch_gradient(
        _backward_op, grad, input, mean, var, weight, bias, mask if mask.numel() else None, ctx.eps, ctx.relu, needs[3]
    )
    of_weight, of_bias = (
        g.to(v.dtype) if v is not None and need else None
        for g, v, need in zip(grads[1:3], (weight, bias), needs[1:3], strict=True)
    )
    return grads[0] if needs[0] else None, of_weight, of_bias, grads[3] if needs[3] else None, None, None


def _differentiable(ctx, grad: Tensor, input: Tensor, weight, bias, mask: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.relu:
        passes = unpack_bits(mask, input.shape[1]) if mask.numel() else None
        if passes is None:
            with torch.no_grad():
                passes = ~(batch_norm_ref(input, weight, bias, ctx.eps) <= 0)
        grad = torch.where(passes, grad, 0)
    of_norm = double_backward(
        lambda *t: batch_norm_ref(*t, ctx.eps), (input, weight, bias), ctx.needs_input_grad[:3], grad
    )
    return (*of_norm, grad if ctx.needs_input_grad[3] else None)


def _autocast(device_type: str, *args) -> tuple:
    return args  # torch's batch_norm keeps its map's dtype


register(
    "batch_norm_relu",
    kernel=_kernel,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)


def _backward_fake(grad, input, mean, var, weight, bias, mask, eps, relu, needs_residual) -> tuple[Tensor, ...]:
    check_same("batch_norm_relu", "grad", grad, input)
    residual = empty_map_like(input) if needs_residual else input.new_empty(0)
    return empty_map_like(input), empty_statistics(input), empty_statistics(input), residual


def _backward_kernel(grad, input, mean, var, weight, bias, mask, eps, relu, needs_residual) -> tuple[Tensor, ...]:
    check_same("batch_norm_relu", "grad", grad, input)
    backend = choose("batch_norm_relu", input.device.type, input.dtype).backend
    norm = Norm(mean, var, weight, bias, eps)
    return backward_kernel(backend, grad, input, norm, mask, relu=relu, needs_residual=needs_residual)[:4]


_backward_op = torch.ops.resnet_fast._batch_norm_relu_backward.default

register("_batch_norm_relu_backward", kernel=_backward_kernel, fake=_backward_fake)


_op = torch.ops.resnet_fast.batch_norm_relu.default


def batch_norm_relu(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    relu: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """relu(batch_norm(input) + residual) with the statistics of the batch: one read for them, one pass to apply them.

    For its gradient it keeps input and, where there is a residual, one bit a value: neither the normalised map nor the
    result. The gradient takes two reads of input and of the result's gradient.

    Args:
        input: [N, C, H, W] with at least 2 values per channel; float32, float16, bfloat16 (float64 runs on the
            reference); any strides, channels_last is the fast one.
        weight, bias: [C] or None (BatchNorm without affine), any floating-point dtype.
        residual: [N, C, H, W] or None, input's dtype, any strides.
        eps: added to the variance.
        relu: whether the ReLU is applied; NaN stays NaN.

    Returns:
        out: [N, C, H, W] in channels_last, input's dtype. Differentiable in input, weight, bias and residual, twice.
        mask: uint8 [N, H, W, ceil(C / 8)], bit c % 8 of byte c // 8 is set where the gradient passes; empty without a
            residual or a ReLU.
        mean, var: [C], float32 (float64 for float64), of the batch; var is biased. They carry no gradient.
            `update_running_stats_` takes them.

    Raises:
        RuntimeError: an argument breaks a rule above, or a backend forced by `resnet_fast.use_backend` cannot run it.
        ValueError: there is one value per channel.

    References:
        Ioffe and Szegedy, Batch Normalization (2015).
    """
    if under_transform():
        out = batch_norm_relu_ref(input, weight, bias, residual, eps, relu)
        mean, var = statistics_kernel(input.detach(), "reference")
        with_mask = relu and residual is not None
        return out, pack_bits(~(out <= 0)) if with_mask else empty_mask(input, False), mean, var
    return dispatch(_op, (input, weight, bias, residual, eps, relu), typed=None)
