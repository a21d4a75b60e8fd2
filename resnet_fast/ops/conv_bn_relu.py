"""conv_bn_relu: relu(batch_norm(conv2d(input, weight, bias)) + residual) with inference statistics.

The pieces and their order are explained in add_relu.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import cpu_level, forced
from ..choose import (
    MEASURED,
    ConvKernel,
    choose,
    choose_conv_on_cpu,
    choose_for_large,
    choose_on_cuda,
    cuda_architecture,
    onednn_runs,
)
from ..kernels.packing import FoldedConv, Geometry, Packed
from .arguments import as_channels_last, empty_channels_last, pair
from .registration import autocast_tensor, dispatch, register, under_transform
from .weight_cache import cached_cast, packed_weights

_PAIRS = ("stride", "padding", "dilation")


def conv_bn_relu_ref(
    input: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C / groups, R, S]
    bias: Tensor | None,  # [K]
    bn_weight: Tensor | None,  # [K]
    bn_bias: Tensor | None,  # [K]
    running_mean: Tensor,  # [K]
    running_var: Tensor,  # [K]
    residual: Tensor | None = None,  # [N, K, P, Q]
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    eps: float = 1e-5,
    relu: bool = True,
) -> Tensor:
    """conv_bn_relu in plain torch, any device and dtype; [N, K, P, Q]."""
    out = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    vectors = (bn_weight, bn_bias, running_mean, running_var)
    if {v.dtype for v in vectors if v is not None} != {input.dtype}:
        # torch takes BatchNorm tensors of the map's dtype, or float32 ones with a 16-bit map; widening loses nothing.
        wide = torch.promote_types(torch.float32, input.dtype)
        vectors = tuple(None if v is None else v.to(wide) for v in vectors)
    # Not F.batch_norm: in torch 2.11 it refuses eps = 0, which the operator takes.
    out = torch.batch_norm(out, *vectors, False, 0.0, eps, torch.backends.cudnn.enabled)
    if residual is not None:
        out = out + residual
    return torch.relu(out) if relu else out


class Names(NamedTuple):
    """What an error calls the operator, the input of its convolution, and (as a prefix) all other arguments."""

    operator: str = "conv_bn_relu"
    input: str = "input"
    prefix: str = ""

    def refuse(self, text: str) -> None:
        raise RuntimeError(f"{self.operator}: {text}")


_OWN_NAMES = Names()


def conv_output_size(input: Tensor, weight: Tensor, stride, padding, dilation, names: Names = _OWN_NAMES) -> list[int]:
    """[N, K, P, Q]; raises RuntimeError where a kernel does not fit into the padded input."""
    size = [input.shape[0], weight.shape[0]]
    for d in (0, 1):
        extent = dilation[d] * (weight.shape[2 + d] - 1) + 1
        padded = input.shape[2 + d] + 2 * padding[d]
        if padded < extent:
            where = f"the padded {names.input} ({padded}) in {'HW'[d]}"
            names.refuse(f"the dilated kernel ({extent}) must not be larger than {where}")
        size.append((padded - extent) // stride[d] + 1)
    return size


def check_conv_args(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    names: Names = _OWN_NAMES,
) -> list[int]:
    """Checks everything that the kernels rely on; returns the output's size [N, K, P, Q].

    Raises RuntimeError with the argument, the rule and what came. stride, padding and dilation must have 2 elements;
    the running statistics may be None where the caller has a use for a convolution alone.
    """
    x, at, refuse = names.input, names.prefix, names.refuse
    if input.dim() != 4:
        refuse(f"{x} must have 4 dimensions [N, C, H, W], got shape {tuple(input.shape)}")
    if weight.dim() != 4:
        refuse(f"{at}weight must have 4 dimensions [K, C / groups, R, S], got shape {tuple(weight.shape)}")
    if not input.is_floating_point():
        refuse(f"{x} must be floating point, got {input.dtype}")
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if min(values) < least:
            refuse(f"{at}{name} must be at least {least}, got {tuple(values)}")
    filters = weight.shape[0]
    if groups < 1 or filters % groups != 0:
        refuse(f"{at}groups must be positive and divide the {filters} filters, got {groups}")
    if input.shape[1] != weight.shape[1] * groups:
        refuse(
            f"{x} must have {weight.shape[1] * groups} channels ({at}weight {tuple(weight.shape)}, {at}groups "
            f"{groups}), got shape {tuple(input.shape)}"
        )
    if 0 in weight.shape:
        refuse(f"{at}weight must not be empty, got shape {tuple(weight.shape)}")

    size = conv_output_size(input, weight, stride, padding, dilation, names)
    for name, t in (("weight", weight), ("bias", bias), ("residual", residual)):
        if t is not None and t.dtype != input.dtype:
            refuse(f"{at}{name} must have {x}'s dtype {input.dtype}, got {t.dtype}")
    vectors = (
        ("bias", bias),
        ("bn_weight", bn_weight),
        ("bn_bias", bn_bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    )
    for name, t in vectors:
        if t is None:
            continue
        if t.dim() != 1 or t.shape[0] != filters:
            refuse(f"{at}{name} must have shape ({filters},), one value per filter, got {tuple(t.shape)}")
        if not t.is_floating_point():
            refuse(f"{at}{name} must be floating point, got {t.dtype}")
    if residual is not None and list(residual.shape) != size:
        refuse(f"residual must have the output's shape {tuple(size)}, got {tuple(residual.shape)}")
    for name, t in (("weight", weight), ("residual", residual), *vectors):
        if t is not None and t.device != input.device:
            refuse(f"{at}{name} must be on {x}'s device {input.device}, got {t.device}")
    return size


def conv_pairs(stride, padding, dilation, names: Names = _OWN_NAMES) -> list[list[int]]:
    values = zip(_PAIRS, (stride, padding, dilation), strict=True)
    return [pair(names.operator, names.prefix + name, value) for name, value in values]


def _fake(
    input, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual,
    stride, padding, dilation, groups, eps, relu,
) -> Tensor:  # fmt: skip
    pairs = conv_pairs(stride, padding, dilation)
    parameters = (weight, bias, bn_weight, bn_bias, running_mean, running_var)
    return empty_channels_last(input, check_conv_args(input, *parameters, residual, *pairs, groups))


def _vectors_and_key(dtype: torch.dtype, parameters: tuple, geometry: tuple, eps: float, has_residual: bool) -> tuple:
    """What `packed_weights` keeps a folded convolution under."""
    _, bias, bn_weight, bn_bias, _, _ = parameters
    key = (dtype, geometry, eps, bias is None, bn_weight is None, bn_bias is None, not has_residual)
    return [v for v in parameters[1:] if v is not None], geometry[3], key


def find_folded(
    input: Tensor, parameters: tuple, stride, padding, dilation, groups: int, eps: float, has_residual: bool
) -> FoldedConv | None:
    """The convolution, folded by an earlier call with these arguments; None if there was none or something changed.

    ``parameters``: weight, bias, bn_weight, bn_bias, running_mean, running_var.
    """
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    return packed_weights.find(parameters[0], *_vectors_and_key(input.dtype, parameters, geometry, eps, has_residual))


def folded_and_packed(
    input: Tensor, size: list[int], parameters: tuple, pairs: list, groups: int, eps: float, has_residual: bool
) -> tuple[FoldedConv, Packed | None]:
    """The convolution, folded, and packed for input's shape where it is usable; ``size`` [N, K, P, Q]. The arguments
    have been checked."""
    geometry = (*(tuple(p) for p in pairs), groups)
    folded = packed_weights.get(
        parameters[0],
        *_vectors_and_key(input.dtype, parameters, geometry, eps, has_residual),
        lambda: FoldedConv.make(input.dtype, Geometry(*pairs, groups), has_residual, *parameters, eps),
    )
    if not folded.usable:
        return folded, None
    packed = folded.pack(input.shape, size, *parameters, eps)
    packed_weights.bound(parameters[0])
    return folded, packed


_ops_cuda = {
    "cuda": torch.ops.resnet_fast._conv_bn_relu_cuda.default,
    "cudnn": torch.ops.resnet_fast._conv_bn_relu_cudnn.default,
}


def conv_kernel(
    input, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual,
    stride, padding, dilation, groups, eps, relu,
) -> Tensor:  # fmt: skip
    parameters = (weight, bias, bn_weight, bn_bias, running_mean, running_var)
    backend = choose("conv_bn_relu", "cpu" if input.is_cpu else "cuda", input.dtype).backend
    if backend == "cpu":
        # What is packed has passed the checks below, and they take longer than all the rest of this function.
        folded = find_folded(input, parameters, stride, padding, dilation, groups, eps, residual is not None)
        if folded is not None and folded.usable:
            out = folded.run(input, residual, relu)
            if out is not None:
                return out

    elif backend in _ops_cuda:
        try:  # the C++ operators check what they rely on; only the functions below do it in words
            if forced() is None:
                backend = choose_on_cuda(input, weight, stride, groups, residual is not None, relu)
            if backend in _ops_cuda:
                return _ops_cuda[backend](input, *parameters, residual, stride, padding, dilation, groups, eps, relu)
        except (RuntimeError, ValueError, IndexError, ZeroDivisionError):
            pass

    pairs = conv_pairs(stride, padding, dilation)
    size = check_conv_args(input, *parameters, residual, *pairs, groups)
    if 0 in size:
        return empty_channels_last(input, size)
    if backend == "cudnn" and forced() is None:
        backend = choose_for_large(max(input.numel(), prod(size)))
    if backend in _ops_cuda:
        return _ops_cuda[backend](input, *parameters, residual, *pairs, groups, eps, relu)
    if backend == "triton":
        from ..kernels.conv_bn_relu import conv_bn_relu_triton

        # What `choose_on_cuda` sends to Triton was measured on the kernel without descriptors, the other one not yet.
        out, descriptors = empty_channels_last(input, size), forced() is not None
        return conv_bn_relu_triton(input, *parameters, residual, *pairs, groups, eps, relu, out, descriptors)
    if backend == "cpu":
        folded, packed = folded_and_packed(input, size, parameters, pairs, groups, eps, residual is not None)
        if packed is not None:
            out = folded.run(input, residual, relu, packed)
            if out is None:
                folded.pack_direct(packed.kernel, *parameters, eps)
                packed_weights.bound(weight)
                out = folded.run(input, residual, relu, packed)
            return out
    return as_channels_last(conv_bn_relu_ref(input, *parameters, residual, *pairs, groups, eps, relu))


def cpu_kernel(input, weight, stride, padding, dilation, groups: int, has_residual: bool) -> ConvKernel:
    """What computes the operator where `choose` says "cpu"."""
    stride, padding, dilation = conv_pairs(stride, padding, dilation)
    size = conv_output_size(input, weight, stride, padding, dilation)
    geometry = (stride, padding, dilation, groups)
    return choose_conv_on_cpu(input.shape, weight.shape, size, *geometry, has_residual, input.dtype)


def kernel_for(
    input, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual,
    stride, padding, dilation, groups, eps, relu,
) -> tuple[str, bool]:  # fmt: skip
    """The kernel, in words, that computes the operator for these arguments, and whether it is this package's."""
    choice = choose("conv_bn_relu", "cpu" if input.is_cpu else "cuda", input.dtype)
    backend = choice.backend
    if backend == "cpu":
        kernel = cpu_kernel(input, weight, stride, padding, dilation, groups, residual is not None)
        return (str(kernel), False) if kernel.name == "onednn" else (f"C++ {cpu_level()}, {kernel}", True)
    if backend == "cudnn" and forced() is None:
        backend = choose_on_cuda(input, weight, stride, groups, residual is not None, relu)
        architecture = cuda_architecture(input.get_device())
        if architecture not in MEASURED:
            return f"cuDNN (unmeasured: the other kernels on {architecture})", False
    words = {"reference": "torch", "cuda": "CUDA C++", "cudnn": "cuDNN", "triton": "Triton"}[backend]
    return words, backend in ("cuda", "triton")


def _setup_context(ctx, inputs, output: Tensor) -> None:
    (input, weight, bias, bn_weight, bn_bias, running_mean, running_var, _,
     stride, padding, dilation, ctx.groups, ctx.eps, ctx.relu) = inputs  # fmt: skip
    ctx.pairs = conv_pairs(stride, padding, dilation)
    ctx.dtypes = [None if t is None else t.dtype for t in (bias, bn_bias)]
    ctx.save_for_backward(input, weight, bias, bn_weight, running_mean, running_var, output if ctx.relu else None)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    *saved, output = ctx.saved_tensors
    if output is not None:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)  # passes where the output is positive or NaN
    grads = conv_gradients(grad, saved, ctx.needs_input_grad, ctx.pairs, ctx.groups, ctx.eps, ctx.dtypes)
    return (*grads, None, None, grad if ctx.needs_input_grad[7] else None, *[None] * 6)


def conv_gradients(
    grad: Tensor,
    saved: Sequence[Tensor | None],
    needs: Sequence[bool],
    pairs: list,
    groups: int,
    eps: float,
    dtypes: list,
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight, bias, bn_weight and bn_bias behind ``grad``, that of the map before the ReLU;
    differentiable again.

    saved: input, weight, bias, bn_weight, running_mean, running_var; needs: which gradients are asked for; dtypes: of
    bias and bn_bias. With g = grad, scale = bn_weight / sqrt(running_var + eps) and dW the gradient of the weight for
    the *unscaled* g:

        input:     conv_transpose(g, weight * scale)
        weight:    dW * scale
        bn_weight: sum(g * (conv(input) + bias - running_mean)) * invstd
                   = (<weight, dW> + (bias - running_mean) * sum(g)) * invstd       per filter

    so that the convolution need not be computed again: sum(g * conv(input)) is linear in the weight.
    """
    input, weight, bias, bn_weight, running_mean, running_var = saved
    need_input, need_weight, need_bias, need_gamma, need_beta = needs[:5]

    # Sums over the map in at least float32; on a CPU without 16-bit convolutions everything.
    wide = torch.promote_types(torch.float32, input.dtype)
    dtype = input.dtype
    if input.device.type == "cpu" and not onednn_runs(dtype):
        dtype = wide
    invstd = torch.rsqrt(running_var.to(wide) + eps)  # [K]
    scale = invstd if bn_weight is None else invstd * bn_weight.to(wide)  # [K]

    grad_input = grad_weight = grad_bias = grad_gamma = grad_beta = None
    if need_input or need_weight or need_gamma:
        g, x, w = grad.to(dtype), input.to(dtype), (weight.to(wide) * scale.view(-1, 1, 1, 1)).to(dtype)
        grad_input, dw, _ = torch.ops.aten.convolution_backward(
            g, x, w, None, *pairs, False, [0, 0], groups, [need_input, need_weight or need_gamma, False]
        )
        grad_input = grad_input.to(input.dtype) if need_input else None
    if need_weight:
        grad_weight = (dw * scale.view(-1, 1, 1, 1)).to(weight.dtype)
    if need_bias or need_gamma or need_beta:
        total = grad.sum((0, 2, 3), dtype=wide)  # [K]
    if need_bias:
        grad_bias = (total * scale).to(dtypes[0])
    if need_beta:
        grad_beta = total.to(dtypes[1])
    if need_gamma:
        mean = running_mean.to(wide) if bias is None else running_mean.to(wide) - bias.to(wide)
        grad_gamma = ((dw.to(wide) * weight.to(wide)).sum((1, 2, 3)) - mean * total) * invstd
        grad_gamma = grad_gamma.to(bn_weight.dtype)
    return grad_input, grad_weight, grad_bias, grad_gamma, grad_beta


def cast_conv(device_type: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple:
    """The arguments of a convolution as they are under autocast."""
    dtype = torch.get_autocast_dtype(device_type)
    plain = type(weight) in (Tensor, torch.nn.Parameter)
    differentiable = torch.is_grad_enabled() and weight.requires_grad
    if plain and not differentiable and weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float16):
        weight = cached_cast(weight, dtype) if weight.dtype != dtype else weight
    else:
        weight = autocast_tensor(weight, device_type)
    return autocast_tensor(input, device_type), weight, autocast_tensor(bias, device_type)


def _autocast(device_type: str, input, weight, bias, *rest) -> tuple:
    bn, residual, geometry = rest[:4], rest[4], rest[5:]
    cast = cast_conv(device_type, input, weight, bias)
    return (*cast, *bn, autocast_tensor(residual, device_type), *geometry)


register(
    "conv_bn_relu",
    kernel=conv_kernel,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)


_op = torch.ops.resnet_fast.conv_bn_relu.default


def conv_bn_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    eps: float = 1e-5,
    relu: bool = True,
) -> Tensor:
    """relu(batch_norm(conv2d(input, weight, bias)) + residual) with inference statistics, one pass over the output.

    BatchNorm's scale and shift are computed in float32 (float64 for float64) from its tensors in every call, whatever
    their dtype, and go into the convolution's store with bias, residual and ReLU.

    Args:
        input: [N, C, H, W], float32, float16, bfloat16 (float64 runs on the reference); any strides, channels_last is
            the fast one. N may be 0.
        weight: [K, C / groups, R, S], input's dtype.
        bias: [K] or None, input's dtype.
        bn_weight, bn_bias: [K] or None (BatchNorm without affine), any floating-point dtype.
        running_mean, running_var: [K], any floating-point dtype; they get no gradient.
        residual: [N, K, P, Q] or None, input's dtype, any strides; may be input itself.
        stride, padding, dilation: a number, or a sequence of 1 or 2 (height, width).
        groups: divides C and K.
        eps: added to running_var.
        relu: whether the ReLU is applied; NaN stays NaN.

    Returns:
        [N, K, P, Q] in channels_last, input's dtype. Differentiable in every argument but the running statistics,
        twice.

    Raises:
        RuntimeError: an argument breaks a rule above, or a backend forced by `resnet_fast.use_backend` cannot run it.

    References:
        He et al., Deep Residual Learning for Image Recognition (2015); Ioffe and Szegedy, Batch Normalization (2015).
    """
    args = (input, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual)
    geometry = (stride, padding, dilation, groups, eps, relu)
    return conv_bn_relu_ref(*args, *geometry) if under_transform() else dispatch(_op, (*args, *geometry))
