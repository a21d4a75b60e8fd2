"""conv2d: torch.nn.functional.conv2d whose gradients run on this package's kernels too, for training.

The pieces and their order are explained in add_relu.py; that the gradient is an operator of its own, in
batch_norm_relu.py. On CUDA the convolutions are cuDNN's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import forced
from ..choose import choose, choose_on_cuda
from .arguments import as_channels_last, empty_channels_last
from .batch_norm_relu import Norm, apply_kernel
from .conv_bn_relu import Names, cast_conv, check_conv_args, conv_pairs
from .registration import dispatch, dispatch_gradient, double_backward, register, under_transform

FEW_CHANNELS = 4
_NAMES = Names("conv2d")


def conv2d_ref(
    input: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C / groups, R, S]
    bias: Tensor | None = None,  # [K]
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """conv2d in plain torch, any device and dtype; [N, K, P, Q]."""
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def check_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, pairs: list, groups: int, names=_NAMES) -> list:
    """Checks everything that the kernels rely on; returns the output's size [N, K, P, Q]."""
    return check_conv_args(input, weight, bias, None, None, None, None, None, *pairs, groups, names)


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int) -> Tensor:
    pairs = conv_pairs(stride, padding, dilation, _NAMES)
    return empty_channels_last(input, check_conv2d(input, weight, bias, pairs, groups))


def _is_stem_in_triton(backend: str, input: Tensor, weight: Tensor, stride: list[int], groups: int) -> bool:
    """Whether a convolution is of few channels, of which cuDNN pads each to 8: 0.66 ms against 1.76 in ResNet-50's."""
    if weight.shape[1] > FEW_CHANNELS or backend == "reference" or not input.is_cuda or forced() is not None:
        return False
    return choose_on_cuda(input, weight, stride, groups, False, False) == "triton"


def forward_kernel(
    backend: str,
    input: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C / groups, R, S]
    bias: Tensor | None,  # [K]
    size: list[int],  # [N, K, P, Q]
    pairs: list,
    groups: int,
) -> Tensor:
    """The convolution on one backend; the arguments have been checked."""
    if 0 in size:
        return empty_channels_last(input, size)
    if backend == "cpu":
        from ..kernels.conv_training import conv_cpu

        return conv_cpu(input, weight, bias, size, *pairs, groups)
    if _is_stem_in_triton(backend, input, weight, pairs[0], groups):
        from ..kernels.conv_bn_relu import conv_bn_relu_triton

        out = empty_channels_last(input, size)
        return conv_bn_relu_triton(input, weight, bias, *[None] * 5, *pairs, groups, 0.0, False, out, False)
    return as_channels_last(conv2d_ref(input, weight, bias, *pairs, groups))


def backward_kernel(
    backend: str,
    grad: Tensor,  # [N, K, P, Q]
    input: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C / groups, R, S]
    pairs: list,
    groups: int,
    needs: Sequence[bool],
    norm: Norm | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the convolution's map, of weight and bias on one backend; empty where ``needs`` says that one is
    not asked for. The map is input or, with a ``norm``, relu(norm(input))."""
    empty = input.new_empty(0)
    if 0 in grad.shape:
        zeros = as_channels_last(torch.zeros_like(input)) if needs[0] else empty
        of_weight = torch.zeros_like(weight) if needs[1] else empty
        return zeros, of_weight, weight.new_zeros(weight.shape[0]) if needs[2] else empty
    if backend == "cpu":
        from ..kernels.conv_training import conv_gradients_cpu

        return conv_gradients_cpu(grad, input, weight, *pairs, groups, needs, norm)
    if norm is not None and needs[1]:
        input = apply_kernel(backend, input, norm)[0]
    sizes = [weight.shape[0]] if needs[2] else None
    grads = torch.ops.aten.convolution_backward(grad, input, weight, sizes, *pairs, False, [0, 0], groups, list(needs))
    of_input, of_weight, of_bias = (g if need else empty for g, need in zip(grads, needs, strict=True))
    if needs[1] and of_weight.stride() != weight.stride():
        of_weight = torch.empty_like(weight).copy_(of_weight)
    return as_channels_last(of_input) if needs[0] else empty, of_weight, of_bias


def add_input_gradient(
    backend: str,
    to: Tensor | None,  # [N, C, H, W]
    grad: Tensor,  # [N, K, P, Q]
    input: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C / groups, R, S]
    pairs: list,
    groups: int,
    overwrites: bool,
) -> Tensor:
    """``to`` and the convolution's gradient of input added up, on one backend. ``overwrites``: ``to`` may be the
    result."""
    if backend == "cpu" and 0 not in grad.shape:
        from ..kernels.conv_training import Geometry, input_gradient_cpu

        return input_gradient_cpu(grad, input, weight, Geometry(*pairs, groups), to, overwrites)
    found = backward_kernel(backend, grad, input, weight, pairs, groups, (True, False, False))[0]
    return found if to is None else found.add_(to)


def _kernel(input: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int) -> Tensor:
    pairs = conv_pairs(stride, padding, dilation, _NAMES)
    size = check_conv2d(input, weight, bias, pairs, groups)
    backend = choose("conv2d", input.device.type, input.dtype).backend
    return forward_kernel(backend, input, weight, bias, size, pairs, groups)


def _setup_context(ctx, inputs, output: Tensor) -> None:
    input, weight, _, stride, padding, dilation, ctx.groups = inputs
    ctx.pairs = conv_pairs(stride, padding, dilation)
    ctx.save_for_backward(input, weight)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    if torch.is_grad_enabled():
        found = double_backward(
            lambda x, w: conv2d_ref(x, w, None, *ctx.pairs, ctx.groups), (input, weight), needs[:2], grad
        )
        return (*found, grad.sum((0, 2, 3)) if needs[2] else None, *[None] * 4)
    grads = dispatch_gradient(_backward_op, grad, input, weight, *ctx.pairs, ctx.groups, needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 4)


def _autocast(device_type: str, input, weight, bias, *geometry) -> tuple:
    return (*cast_conv(device_type, input, weight, bias), *geometry)


register(
    "conv2d",
    kernel=_kernel,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)


def empty_conv_gradients(input: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    empty = input.new_empty(0)
    return (
        empty_channels_last(input, input.shape) if needs[0] else empty,
        torch.empty_like(weight) if needs[1] else empty,
        weight.new_empty(weight.shape[0]) if needs[2] else empty,
    )


def _backward_fake(grad, input, weight, stride, padding, dilation, groups, needs) -> tuple[Tensor, ...]:
    return empty_conv_gradients(input, weight, needs)


def _backward_kernel(grad, input, weight, stride, padding, dilation, groups, needs) -> tuple[Tensor, ...]:
    backend = choose("conv2d", input.device.type, input.dtype).backend
    return backward_kernel(backend, grad, input, weight, [stride, padding, dilation], groups, needs)


_backward_op = torch.ops.resnet_fast._conv2d_backward.default

register("_conv2d_backward", kernel=_backward_kernel, fake=_backward_fake)


_op = torch.ops.resnet_fast.conv2d.default


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """torch.nn.functional.conv2d for weights that change: on the CPU the map and both gradients by Winograd's algorithm
    and matrix products of our own where these win, and always in channels_last.

    Args:
        input: [N, C, H, W], float32, float16, bfloat16 (float64 runs on the reference), any strides. N may be 0.
        weight: [K, C / groups, R, S], input's dtype.
        bias: [K] or None, input's dtype.
        stride, padding, dilation: a number, or a sequence of 1 or 2 (height, width).
        groups: divides C and K.

    Returns:
        [N, K, P, Q] in channels_last, input's dtype. Differentiable in every tensor, twice.

    Raises:
        RuntimeError: an argument breaks a rule above, or a backend forced by `resnet_fast.use_backend` cannot run it.
    """
    args = (input, weight, bias, stride, padding, dilation, groups)
    return conv2d_ref(*args) if under_transform() else dispatch(_op, args, typed=None)
