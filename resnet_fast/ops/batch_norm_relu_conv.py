"""batch_norm_relu_conv: conv2d(relu(batch_norm(input))), the step from one convolution of a block to the next.

Only the raw map is kept: the normalised one is computed again where the weight's gradient needs it. The pieces and
their order are explained in add_relu.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..choose import choose
from .arguments import empty_channels_last
from .batch_norm_relu import Norm, apply_kernel, batch_norm_relu_ref, check_batch, check_norm
from .batch_norm_relu import backward_kernel as batch_norm_backward_kernel
from .batch_norm_statistics import empty_statistics
from .conv2d import backward_kernel as conv_backward_kernel
from .conv2d import check_conv2d, conv2d_ref, empty_conv_gradients, forward_kernel
from .conv_bn_relu import Names, cast_conv, conv_pairs
from .registration import dispatch, dispatch_gradient, double_backward, register, under_transform

_NAME = "batch_norm_relu_conv"
_NAMES = Names(_NAME)


def batch_norm_relu_conv_ref(
    input: Tensor,  # [N, C, H, W]
    bn_weight: Tensor | None,  # [C]
    bn_bias: Tensor | None,  # [C]
    weight: Tensor,  # [K, C / groups, R, S]
    bias: Tensor | None = None,  # [K]
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    eps: float = 1e-5,
) -> Tensor:
    """batch_norm_relu_conv in plain torch, any device and dtype, with statistics of its own; [N, K, P, Q]."""
    return conv2d_ref(
        batch_norm_relu_ref(input, bn_weight, bn_bias, None, eps), weight, bias, stride, padding, dilation, groups
    )


def _check(input, mean, var, bn_weight, bn_bias, weight, bias, pairs: list, groups: int) -> list[int]:
    check_batch(_NAME, input)
    check_norm(_NAME, input, mean=mean, var=var, bn_weight=bn_weight, bn_bias=bn_bias)
    return check_conv2d(input, weight, bias, pairs, groups, _NAMES)


def _fake(
    input, mean, var, bn_weight, bn_bias, weight, bias, stride, padding, dilation, groups, eps
) -> Tensor:  # fmt: skip
    pairs = conv_pairs(stride, padding, dilation, _NAMES)
    return empty_channels_last(input, _check(input, mean, var, bn_weight, bn_bias, weight, bias, pairs, groups))


def _kernel(
    input, mean, var, bn_weight, bn_bias, weight, bias, stride, padding, dilation, groups, eps
) -> Tensor:  # fmt: skip
    pairs = conv_pairs(stride, padding, dilation, _NAMES)
    size = _check(input, mean, var, bn_weight, bn_bias, weight, bias, pairs, groups)
    backend = choose(_NAME, input.device.type, input.dtype).backend
    norm = Norm(mean, var, bn_weight, bn_bias, eps)
    if backend == "cpu" and 0 not in size:
        from ..kernels.conv_training import conv_cpu

        return conv_cpu(input, weight, bias, size, *pairs, groups, norm)
    return forward_kernel(backend, apply_kernel(backend, input, norm)[0], weight, bias, size, pairs, groups)


def _setup_context(ctx, inputs, output: Tensor) -> None:
    input, mean, var, bn_weight, bn_bias, weight, _, stride, padding, dilation, ctx.groups, ctx.eps = inputs
    ctx.pairs = conv_pairs(stride, padding, dilation)
    ctx.save_for_backward(input, mean, var, bn_weight, bn_bias, weight)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, mean, var, bn_weight, bn_bias, weight = ctx.saved_tensors
    asked = ctx.needs_input_grad
    needs = [asked[0], asked[3], asked[4], asked[5], asked[6]]
    if torch.is_grad_enabled():
        found = double_backward(
            lambda x, g, b, w: batch_norm_relu_conv_ref(x, g, b, w, None, *ctx.pairs, ctx.groups, ctx.eps),
            (input, bn_weight, bn_bias, weight),
            needs[:4],
            grad,
        )
        grads = (*found, grad.sum((0, 2, 3)) if needs[4] else None)
    else:
        grads = dispatch_gradient(
            _backward_op, grad, input, mean, var, bn_weight, bn_bias, weight, *ctx.pairs, ctx.groups, ctx.eps, needs
        )
        dtypes = (input, bn_weight, bn_bias, weight, weight)
        grads = [g.to(t.dtype) if need else None for g, t, need in zip(grads, dtypes, needs, strict=True)]
    return (grads[0], None, None, *grads[1:], *[None] * 5)


def _autocast(device_type: str, input, mean, var, bn_weight, bn_bias, weight, bias, *rest) -> tuple:
    input, weight, bias = cast_conv(device_type, input, weight, bias)
    return (input, mean, var, bn_weight, bn_bias, weight, bias, *rest)


register(
    _NAME,
    kernel=_kernel,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)


def _backward_fake(
    grad, input, mean, var, bn_weight, bn_bias, weight, stride, padding, dilation, groups, eps, needs
) -> tuple[Tensor, ...]:  # fmt: skip
    of_input, of_weight, of_bias = empty_conv_gradients(input, weight, (needs[0], *needs[3:]))
    empty = mean.new_empty(0)
    of_bn = (empty_statistics(input) if need else empty for need in needs[1:3])
    return of_input, *of_bn, of_weight, of_bias


def _backward_kernel(
    grad, input, mean, var, bn_weight, bn_bias, weight, stride, padding, dilation, groups, eps, needs
) -> tuple[Tensor, ...]:  # fmt: skip
    backend = choose(_NAME, input.device.type, input.dtype).backend
    norm, pairs = Norm(mean, var, bn_weight, bn_bias, eps), [stride, padding, dilation]
    through_norm = any(needs[:3])
    # The normalised map, computed again for the weight's gradient, is gone before BatchNorm's own gradient is made.
    of_map, of_weight, of_bias = conv_backward_kernel(
        backend, grad, input, weight, pairs, groups, (through_norm, *needs[3:]), norm
    )
    empty = mean.new_empty(0)
    if not through_norm:
        return input.new_empty(0), empty, empty, of_weight, of_bias
    of_input, of_bn_weight, of_bn_bias, _, _ = batch_norm_backward_kernel(backend, of_map, input, norm)
    return (
        of_input if needs[0] else input.new_empty(0),
        of_bn_weight if needs[1] else empty,
        of_bn_bias if needs[2] else empty,
        of_weight,
        of_bias,
    )


_backward_op = torch.ops.resnet_fast._batch_norm_relu_conv_backward.default

register("_batch_norm_relu_conv_backward", kernel=_backward_kernel, fake=_backward_fake)


_op = torch.ops.resnet_fast.batch_norm_relu_conv.default


def batch_norm_relu_conv(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    eps: float = 1e-5,
) -> Tensor:
    """conv2d(relu(batch_norm(input)), weight, bias) with the statistics of the batch, which come with the map.

    For its gradient it keeps input alone, not the normalised map. On the CPU that one is never written where the
    convolution runs on Winograd's algorithm or as a 1x1 matrix product: they normalise what they load.

    Args:
        input: [N, C, H, W] with at least 2 values per channel; float32, float16, bfloat16 (float64 runs on the
            reference); any strides, channels_last is the fast one.
        mean, var: [C], what `batch_norm_statistics` returned for input. They get no gradient: that of input already
            goes through them.
        bn_weight, bn_bias: [C] or None, any floating-point dtype.
        weight: [K, C / groups, R, S], input's dtype.
        bias: [K] or None, input's dtype.
        stride, padding, dilation: a number, or a sequence of 1 or 2 (height, width). Padding is of zeros, behind the
            ReLU.
        groups: divides C and K.
        eps: added to the variance.

    Returns:
        [N, K, P, Q] in channels_last, input's dtype. Differentiable in input, bn_weight, bn_bias, weight and bias,
        twice.

    Raises:
        RuntimeError: an argument breaks a rule above, or a backend forced by `resnet_fast.use_backend` cannot run it.
        ValueError: there is one value per channel.

    References:
        Jung et al., Restructuring Batch Normalization to Accelerate CNN Training (2018).
    """
    geometry = (stride, padding, dilation, groups, eps)
    if under_transform():
        return batch_norm_relu_conv_ref(input, bn_weight, bn_bias, weight, bias, *geometry)
    return dispatch(_op, (input, mean, var, bn_weight, bn_bias, weight, bias, *geometry), typed=None)
