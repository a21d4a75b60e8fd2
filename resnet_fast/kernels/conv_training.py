"""Convolutions on the CPU whose weights change with every step: the weight is packed in each call, and gradients are
convolutions and matrix products of the same kernels (csrc/cpu/)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..choose import ConvKernel, choose_conv_on_cpu, choose_weight_gradient_on_cpu, onednn_runs
from .packing import Geometry, pack_weight, without_winograd

if TYPE_CHECKING:
    from ..ops.batch_norm_relu import Norm

_all_finite = torch.ops.resnet_fast._all_finite.default
_apply = torch.ops.resnet_fast._batch_norm_relu_cpu.default
_depthwise = torch.ops.resnet_fast._conv_depthwise.default
_few_channels = torch.ops.resnet_fast._conv_few_channels.default
_gemm = torch.ops.resnet_fast._conv_gemm.default
_grouped = torch.ops.resnet_fast._conv_grouped.default
_weight_grad = torch.ops.resnet_fast._conv_weight_grad.default
_pack_gemm = torch.ops.resnet_fast._pack_gemm.default
_winograd = torch.ops.resnet_fast._conv_winograd_packing.default
_winograd_stem = torch.ops.resnet_fast._conv_winograd_stem.default


def normalised(input: Tensor, norm: Norm) -> Tensor:
    """relu(norm(input)), [N, C, H, W]."""
    return _apply(input, *norm, None, None, None, None, None, 0.0, True, False)[0]


def _vectors(norm: Norm) -> Tensor:
    """Mean, scale and shift, [3, C], as the kernels take them that normalise what they load."""
    bias = torch.zeros_like(norm.mean) if norm.bias is None else norm.bias.float()
    return torch.stack([norm.mean, norm.factors()[1], bias])


def conv_cpu(
    input: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C / groups, R, S]
    bias: Tensor | None,  # [K]
    size: Sequence[int],  # [N, K, P, Q]
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    norm: Norm | None = None,
) -> Tensor:
    """conv2d of input or, with a ``norm``, of relu(norm(input)); [N, K, P, Q] in channels_last."""
    geometry = Geometry(stride, padding, dilation, groups)
    kernel = choose_conv_on_cpu(input.shape, weight.shape, size, *geometry, False, input.dtype, True)
    vectors = None
    if norm is not None:
        if kernel.name == "winograd" or (kernel.name == "gemm" and _is_pointwise(weight, geometry)):
            vectors = _vectors(norm)
        else:
            input = normalised(input, norm)
    return _run(kernel, input, weight, bias, geometry, vectors)


def _is_pointwise(weight: Tensor, geometry: Geometry) -> bool:
    return weight.shape[2] == weight.shape[3] == 1 and max(geometry.padding) == 0 and geometry.groups == 1


def _run(
    kernel: ConvKernel,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    norm: Tensor | None = None,
    turned: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """The convolution; ``turned``: that of the input's gradient, whose ``input`` is the output's gradient; residual:
    added by the kernel "gemm"."""
    if kernel.name == "onednn":
        return _run_torch(input, _turned(weight) if turned else weight, bias, geometry)
    filters = weight.shape[1] if turned else weight.shape[0]
    bias = torch.zeros(filters) if bias is None else bias.float()
    full = weight.float()
    if kernel.name == "winograd":
        out, finite = _winograd(input, full, bias, geometry.padding, kernel.tile, kernel.bfloat16, turned, norm)
    elif kernel.name == "winograd stem":
        packed = pack_weight(full.contiguous(), kernel, geometry)
        out, finite = _winograd_stem(input, packed, bias, geometry.padding, False)
    else:
        return _run_direct(kernel, input, full, bias, geometry, norm, turned, residual)
    if finite:
        return out
    if norm is not None:
        mean, scale, shift = (v.view(1, -1, 1, 1) for v in norm)
        input = torch.relu((input.float() - mean) * scale + shift).to(input.dtype)
    return _run_direct(without_winograd(kernel), input, full, bias, geometry, None, turned)


def _turned(weight: Tensor) -> Tensor:
    """The weight of the convolution that computes the input's gradient."""
    return weight.transpose(0, 1).flip(2, 3)


def _run_torch(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    dtype = input.dtype if onednn_runs(input.dtype) else torch.float32
    bias = None if bias is None else bias.to(dtype)
    stride, padding, dilation, groups = geometry
    out = torch.conv2d(input.to(dtype), weight.to(dtype), bias, stride, padding, dilation, groups)
    return out.to(input.dtype).contiguous(memory_format=torch.channels_last)


def _run_direct(
    kernel: ConvKernel,
    input: Tensor,
    weight: Tensor,  # float32
    bias: Tensor,
    geometry: Geometry,
    norm: Tensor | None,
    turned: bool,
    residual: Tensor | None = None,
) -> Tensor:
    if max(geometry.padding) > 0 and not _all_finite(
        weight
    ):  # whether padding times infinity is NaN, is torch's to say
        return _run_torch(input, _turned(weight) if turned else weight, bias, geometry)
    if kernel.name == "gemm":
        packed = _pack_gemm(weight, geometry.groups, kernel.bfloat16, turned, True)
        return _gemm(input, packed, bias, residual, *geometry, False, norm)
    packed = pack_weight(weight.contiguous(), kernel, geometry)
    if kernel.name == "depthwise":
        return _depthwise(input, packed, bias, None, *geometry[:3], False)
    if kernel.name == "grouped":
        return _grouped(input, packed, bias, None, *geometry, False)
    return _few_channels(input, packed, bias, *geometry[:3], False)


def conv_gradients_cpu(
    grad: Tensor,  # [N, K, P, Q]
    input: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C / groups, R, S]
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs: Sequence[bool],
    norm: Norm | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the convolution's map (input or relu(norm(input))), of weight and bias; empty where not needed."""
    geometry, empty = Geometry(stride, padding, dilation, groups), input.new_empty(0)
    of_map = input_gradient_cpu(grad, input, weight, geometry) if needs[0] else empty
    of_weight = _weight_gradient(grad, input, weight, geometry, norm) if needs[1] else empty
    of_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(weight.dtype) if needs[2] else empty
    return of_map, of_weight, of_bias


def input_gradient_cpu(
    grad: Tensor,  # [N, K, P, Q]
    input: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C / groups, R, S]
    geometry: Geometry,
    to: Tensor | None = None,  # [N, C, H, W]
    overwrites: bool = False,
) -> Tensor:
    """The convolution's gradient of input, added to ``to`` where there is one, in a kernel's store if it can;
    ``overwrites``: ``to`` may be the result."""
    if set(geometry.dilation) == {1} and geometry.groups == 1:
        kernel, stride = weight.shape[2:], geometry.stride
        flipped = [kernel[d] - 1 - geometry.padding[d] for d in (0, 1)]
        if max(stride) == 1 and min(flipped) >= 0:
            found = _convolved_back(grad, weight, input.shape, flipped, to)
            if found is not None:
                return found
        if _is_pointwise(weight, geometry):
            found = _convolved_back(grad, weight, [*input.shape[:2], *grad.shape[2:]], [0, 0])
            if found is not None:
                if to is None:
                    to = torch.empty_like(input, memory_format=torch.channels_last).zero_()
                elif not overwrites:
                    to = to.clone()
                to[:, :, :: stride[0], :: stride[1]] += found
                return to
    found = _torch_gradients(grad, input, weight, geometry, (True, False))[0]
    found = found.contiguous(memory_format=torch.channels_last)
    return found if to is None else found.add_(to)


def _convolved_back(
    grad: Tensor, weight: Tensor, size: Sequence[int], padding: list[int], to: Tensor | None = None
) -> Tensor | None:
    """``to`` and the gradient of ``size``, as a convolution of the output's gradient with the filters turned around;
    None where neither Winograd nor GEMM is chosen for it."""
    back = Geometry([1, 1], padding, [1, 1], 1)
    turned = (weight.shape[1], weight.shape[0], *weight.shape[2:])
    kernel = choose_conv_on_cpu(grad.shape, turned, size, *back, to is not None, grad.dtype, True)
    if kernel.name == "gemm":
        return _run(kernel, grad, weight, None, back, turned=True, residual=to)
    if kernel.name != "winograd":
        return None
    found = _run(kernel, grad, weight, None, back, turned=True)
    return found if to is None else found.add_(to)


def _weight_gradient(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, norm: Norm | None) -> Tensor:
    kernel = choose_weight_gradient_on_cpu(
        weight.shape, grad.shape, *geometry[:3:2], geometry.groups, norm is not None, input.dtype
    )
    if kernel != "onednn":
        like = weight if weight.dtype == torch.float32 else torch.empty_like(weight, dtype=torch.float32)
        vectors = None if norm is None else _vectors(norm)
        found, finite = _weight_grad(grad, input, like, *geometry[:3], kernel == "winograd", vectors)
        if finite:
            return found.to(weight.dtype)
    if norm is not None:
        input = normalised(input, norm)
    found = _torch_gradients(grad, input, weight, geometry, (False, True))[1]
    return found if found.stride() == weight.stride() else torch.empty_like(weight).copy_(found)


def _torch_gradients(grad, input, weight, geometry: Geometry, needs: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    dtype = input.dtype if onednn_runs(input.dtype) else torch.float32
    stride, padding, dilation, groups = geometry
    maps = grad.to(dtype), input.to(dtype), weight.to(dtype)
    found = torch.ops.aten.convolution_backward(
        *maps, None, stride, padding, dilation, False, [0, 0], groups, [*needs, False]
    )
    return tuple(None if g is None else g.to(input.dtype) for g in found[:2])
