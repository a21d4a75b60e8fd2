"""conv_bn_relu_projection: relu(batch_norm(conv2d(input)) + batch_norm(conv2d(shortcut))), the end of a residual block
with a projection shortcut.

The pieces and their order are explained in add_relu.py. Checks, kernels and gradients are those of conv_bn_relu.py,
once for each convolution. In Triton one kernel computes both (without groups), so that the shortcut's map is never
written; everywhere else they run as two calls of conv_bn_relu, the second of which adds the first's result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..choose import choose
from .arguments import empty_channels_last
from .conv_bn_relu import (
    Names,
    cast_conv,
    check_conv_args,
    conv_bn_relu_ref,
    conv_gradients,
    conv_kernel,
    conv_pairs,
)
from .conv_bn_relu import kernel_for as conv_kernel_for
from .registration import dispatch, register, under_transform

_NAME = "conv_bn_relu_projection"
_MAIN, _SHORTCUT = Names(_NAME), Names(_NAME, "shortcut", "shortcut_")


def conv_bn_relu_projection_ref(
    input: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C / groups, R, S]
    bias: Tensor | None,  # [K]
    bn_weight: Tensor | None,  # [K]
    bn_bias: Tensor | None,  # [K]
    running_mean: Tensor,  # [K]
    running_var: Tensor,  # [K]
    shortcut: Tensor,  # [N, D, I, J]
    shortcut_weight: Tensor,  # [K, D / shortcut_groups, T, U]
    shortcut_bias: Tensor | None = None,  # [K]
    shortcut_bn_weight: Tensor | None = None,  # [K]
    shortcut_bn_bias: Tensor | None = None,  # [K]
    shortcut_running_mean: Tensor | None = None,  # [K]
    shortcut_running_var: Tensor | None = None,  # [K]
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    eps: float = 1e-5,
    shortcut_stride: int | Sequence[int] = 1,
    shortcut_padding: int | Sequence[int] = 0,
    shortcut_dilation: int | Sequence[int] = 1,
    shortcut_groups: int = 1,
    shortcut_eps: float = 1e-5,
) -> Tensor:
    """conv_bn_relu_projection in plain torch, any device and dtype; [N, K, P, Q]."""
    conv = (shortcut, shortcut_weight, shortcut_bias)
    bn = (shortcut_bn_weight, shortcut_bn_bias, shortcut_running_mean, shortcut_running_var)
    how = (shortcut_stride, shortcut_padding, shortcut_dilation, shortcut_groups)
    _check_statistics(*bn)
    if shortcut_running_mean is None:
        residual = F.conv2d(*conv, *how)
    else:
        residual = conv_bn_relu_ref(*conv, *bn, None, *how, shortcut_eps, relu=False)
    parameters = (weight, bias, bn_weight, bn_bias, running_mean, running_var)
    return conv_bn_relu_ref(input, *parameters, residual, stride, padding, dilation, groups, eps)


class _Branch(NamedTuple):
    """The arguments of one of the two convolutions."""

    tensors: tuple  # input, weight, bias, bn_weight, bn_bias, running_mean, running_var
    geometry: tuple  # stride, padding, dilation, groups
    eps: float

    @property
    def has_batch_norm(self) -> bool:
        return self.tensors[5] is not None

    def saved(self) -> tuple:
        """What the backward pass reads. A tensor that it does not may be written before it."""
        input, weight, bias, bn_weight, _, mean, var = self.tensors
        return input, weight, bias if self.has_batch_norm else None, bn_weight, mean, var


def _branches(args: tuple) -> tuple[_Branch, _Branch]:
    """The operator's arguments as those of the last convolution of the block and of the shortcut."""
    return _Branch(args[:7], args[14:18], args[18]), _Branch(args[7:14], args[19:23], args[23])


def _check_statistics(
    bn_weight: Tensor | None, bn_bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None
) -> None:
    """Whether these are the shortcut's BatchNorm, or none at all."""
    if (running_mean is None) != (running_var is None):
        given = "shortcut_running_mean" if running_var is None else "shortcut_running_var"
        _SHORTCUT.refuse(
            f"shortcut_running_mean and shortcut_running_var must both be given or both be None, got {given} alone"
        )
    for name, t in (("bn_weight", bn_weight), ("bn_bias", bn_bias)):
        if running_mean is None and t is not None:
            _SHORTCUT.refuse(
                f"shortcut_{name} must be None where shortcut_running_mean and shortcut_running_var are, "
                f"got shape {tuple(t.shape)}"
            )


def check_projection_args(*args) -> tuple[list[int], list[list[int]], list[list[int]]]:
    """Checks everything that the kernels rely on. Returns the output's size [N, K, P, Q], and stride, padding and
    dilation of both convolutions, with 2 elements each. Raises RuntimeError as `check_conv_args` does."""
    main, shortcut = _branches(args)
    checked = []
    for branch, names in ((main, _MAIN), (shortcut, _SHORTCUT)):
        *geometry, groups = branch.geometry
        pairs = conv_pairs(*geometry, names)
        checked.append((check_conv_args(*branch.tensors, None, *pairs, groups, names), pairs))
    _check_statistics(*shortcut.tensors[3:])
    input, other = main.tensors[0], shortcut.tensors[0]
    if other.dtype != input.dtype:
        _SHORTCUT.refuse(f"shortcut must have input's dtype {input.dtype}, got {other.dtype}")
    if other.device != input.device:
        _SHORTCUT.refuse(f"shortcut must be on input's device {input.device}, got {other.device}")
    (size, pairs), (shortcut_size, shortcut_pairs) = checked
    if shortcut_size != size:
        _SHORTCUT.refuse(
            f"shortcut must become a map of the output's shape {tuple(size)} in its convolution, "
            f"got {tuple(shortcut_size)}"
        )
    return size, pairs, shortcut_pairs


def _fake(*args) -> Tensor:
    return empty_channels_last(args[0], check_projection_args(*args)[0])


def _kernel(*args) -> Tensor:
    input = args[0]
    if choose(_NAME, "cpu" if input.is_cpu else "cuda", input.dtype).backend == "triton":
        return _triton(args)
    try:  # the two calls check what they rely on, and where a weight is packed already in far less time
        return conv_kernel(*args[:7], _shortcut_map(*args[7:14], *args[19:]), *args[14:19], True)
    except RuntimeError:
        check_projection_args(*args)  # says what is wrong by the names that this operator's arguments have
        raise


def _shortcut_map(
    shortcut, weight, bias, bn_weight, bn_bias, running_mean, running_var, stride, padding, dilation, groups, eps
) -> Tensor:
    """[N, K, P, Q], any strides."""
    if running_mean is not None and running_var is not None:
        parameters = (weight, bias, bn_weight, bn_bias, running_mean, running_var)
        return conv_kernel(shortcut, *parameters, None, stride, padding, dilation, groups, eps, False)
    _check_statistics(bn_weight, bn_bias, running_mean, running_var)
    return F.conv2d(shortcut, weight, bias, stride, padding, dilation, groups)


def _triton(args: tuple) -> Tensor:
    size, pairs, shortcut_pairs = check_projection_args(*args)
    out = empty_channels_last(args[0], size)
    if 0 in size:
        return out
    from ..kernels.conv_bn_relu import conv_bn_relu_projection_triton

    return conv_bn_relu_projection_triton(*args[:14], *pairs, *args[17:19], *shortcut_pairs, *args[22:], out)


def kernel_for(*args) -> tuple[tuple[str, bool], tuple[str, bool]]:
    """For the last convolution of the block and for the shortcut's: the kernel, in words, that computes it for these
    arguments, and whether that is this package's."""
    main, shortcut = _branches(args)
    input = main.tensors[0]
    if choose(_NAME, "cpu" if input.is_cpu else "cuda", input.dtype).backend == "triton":
        if main.geometry[3] == shortcut.geometry[3] == 1:
            return ("Triton, with the projection", True), ("Triton, in the same kernel", True)
        return (("Triton", True),) * 2  # with groups two kernels
    # Of the residual it asks only whether there is one.
    words = conv_kernel_for(*main.tensors, shortcut.tensors[0], *main.geometry, main.eps, True)
    if not shortcut.has_batch_norm:
        return words, ("torch", False)
    return words, conv_kernel_for(*shortcut.tensors, None, *shortcut.geometry, shortcut.eps, False)


def _setup_context(ctx, inputs, output: Tensor) -> None:
    branches = _branches(inputs)
    ctx.numbers = [(conv_pairs(*b.geometry[:3]), b.geometry[3], b.eps) for b in branches]
    ctx.dtypes = [[None if t is None else t.dtype for t in (b.tensors[2], b.tensors[4])] for b in branches]
    ctx.save_for_backward(output, *branches[0].saved(), *branches[1].saved())


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    output, *saved = ctx.saved_tensors
    grad = torch.ops.aten.threshold_backward(grad, output, 0)  # passes where the output is positive or NaN
    needs = ctx.needs_input_grad
    main = conv_gradients(grad, saved[:6], needs[:7], *ctx.numbers[0], ctx.dtypes[0])
    has_batch_norm = saved[10] is not None
    gradients = conv_gradients if has_batch_norm else _gradients_without_batch_norm
    shortcut = gradients(grad, saved[6:], needs[7:14], *ctx.numbers[1], ctx.dtypes[1])
    return (*main, None, None, *shortcut, None, None, *[None] * 10)


def _gradients_without_batch_norm(
    grad: Tensor, saved: Sequence, needs: Sequence[bool], pairs: list, groups: int, eps: float, dtypes: list
) -> tuple[Tensor | None, ...]:
    """As `conv_gradients`, of a convolution alone: torch's own."""
    input, weight = saved[:2]
    bias_size = None if dtypes[0] is None else [weight.shape[0]]
    mask = list(needs[:3])
    if not any(mask):
        return (None,) * 5
    grads = torch.ops.aten.convolution_backward(grad, input, weight, bias_size, *pairs, False, [0, 0], groups, mask)
    return (*grads, None, None)


def _autocast(device_type: str, *args) -> tuple:
    cast, shortcut_cast = cast_conv(device_type, *args[:3]), cast_conv(device_type, *args[7:10])
    return (*cast, *args[3:7], *shortcut_cast, *args[10:])


register(
    _NAME,
    kernel=_kernel,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)


_op = torch.ops.resnet_fast.conv_bn_relu_projection.default


def conv_bn_relu_projection(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    shortcut: Tensor,
    shortcut_weight: Tensor,
    shortcut_bias: Tensor | None = None,
    shortcut_bn_weight: Tensor | None = None,
    shortcut_bn_bias: Tensor | None = None,
    shortcut_running_mean: Tensor | None = None,
    shortcut_running_var: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    eps: float = 1e-5,
    shortcut_stride: int | Sequence[int] = 1,
    shortcut_padding: int | Sequence[int] = 0,
    shortcut_dilation: int | Sequence[int] = 1,
    shortcut_groups: int = 1,
    shortcut_eps: float = 1e-5,
) -> Tensor:
    """relu(batch_norm(conv2d(input, weight, bias)) + batch_norm(conv2d(shortcut, shortcut_weight, shortcut_bias))) with
    inference statistics: the last convolution of a residual block together with its projection shortcut.

    Outside Triton the result has the bits of two calls of `conv_bn_relu`, the first without ReLU on the shortcut, the
    second with the first's result as the residual.

    Args:
        input, weight, bias, bn_weight, bn_bias, running_mean, running_var, stride, padding, dilation, groups, eps: as
            `conv_bn_relu` takes them.
        shortcut: [N, D, I, J], input's dtype, any strides; what the block began with.
        shortcut_weight, shortcut_bias, ..., shortcut_eps: the same of its convolution and BatchNorm, whose result must
            have the output's shape. With both running statistics None (and then shortcut_bn_weight and shortcut_bn_bias
            too) it is a convolution without BatchNorm.

    Returns:
        [N, K, P, Q] in channels_last, input's dtype. Differentiable in every argument but the running statistics,
        twice.

    Raises:
        RuntimeError: an argument breaks a rule of `conv_bn_relu` or one above, or a backend forced by
            `resnet_fast.use_backend` cannot run it.

    References:
        He et al., Deep Residual Learning for Image Recognition (2015), option B of the shortcuts.
    """
    tensors = (input, weight, bias, bn_weight, bn_bias, running_mean, running_var)
    shortcut_tensors = (
        shortcut, shortcut_weight, shortcut_bias, shortcut_bn_weight, shortcut_bn_bias,
        shortcut_running_mean, shortcut_running_var,
    )  # fmt: skip
    how = (stride, padding, dilation, groups, eps)
    shortcut_how = (shortcut_stride, shortcut_padding, shortcut_dilation, shortcut_groups, shortcut_eps)
    args = (*tensors, *shortcut_tensors, *how, *shortcut_how)
    return conv_bn_relu_projection_ref(*args) if under_transform() else dispatch(_op, args)
