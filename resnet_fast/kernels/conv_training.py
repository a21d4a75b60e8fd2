"""Convolutions on the CPU whose weights change with every step: the weight is packed in each call, and gradients are
convolutions and matrix products of the same kernels (csrc/cpu/)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..choose import ConvKernel, choose_conv_on_cpu, onednn_runs
from .packing import Geometry, pack_weight, without_winograd

if TYPE_CHECKING:
    from ..ops.batch_norm_relu import Norm

_apply = torch.ops.resnet_fast._batch_norm_relu_cpu.default
_depthwise = torch.ops.resnet_fast._conv_depthwise.default
_few_channels = torch.ops.resnet_fast._conv_few_channels.default
_gemm = torch.ops.resnet_fast._conv_gemm.default
_grouped = torch.ops.resnet_fast._conv_grouped.default
_winograd = torch.ops.resnet_fast._conv_winograd.default
_winograd_stem = torch.ops.resnet_fast._conv_winograd_stem.default


def normalised(input: Tensor, norm: Norm) -> Tensor:
    """relu(norm(input)), [N, C, H, W]."""
    return _apply(input, *norm, None, None, None, None, None, 0.0, True, False)[0]


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
    if norm is not None:
        input = normalised(input, norm)
    kernel = choose_conv_on_cpu(input.shape, weight.shape, size, *geometry, False, input.dtype)
    return _run(kernel, input, weight, bias, geometry)


def _run(kernel: ConvKernel, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    if kernel.name == "onednn":
        dtype = input.dtype if onednn_runs(input.dtype) else torch.float32
        bias = None if bias is None else bias.to(dtype)
        stride, padding, dilation, groups = geometry
        out = torch.conv2d(input.to(dtype), weight.to(dtype), bias, stride, padding, dilation, groups)
        return out.to(input.dtype).contiguous(memory_format=torch.channels_last)
    bias = weight.new_zeros(weight.shape[0], dtype=torch.float32) if bias is None else bias.float()
    full = weight.float().contiguous()
    packed = pack_weight(full, kernel, geometry)
    if kernel.name == "winograd":
        out, finite = _winograd(input, packed, bias, None, geometry.padding, False)
    elif kernel.name == "winograd stem":
        out, finite = _winograd_stem(input, packed, bias, geometry.padding, False)
    else:
        return _run_packed(kernel, input, packed, bias, geometry)
    if finite:
        return out
    kernel = without_winograd(kernel)
    return _run_packed(kernel, input, pack_weight(full, kernel, geometry), bias, geometry)


def _run_packed(kernel: ConvKernel, input: Tensor, packed: Tensor, bias: Tensor, geometry: Geometry) -> Tensor:
    if kernel.name == "depthwise":
        return _depthwise(input, packed, bias, None, *geometry[:3], False)
    if kernel.name == "grouped":
        return _grouped(input, packed, bias, None, *geometry, False)
    if kernel.name == "few channels":
        return _few_channels(input, packed, bias, *geometry[:3], False)
    return _gemm(input, packed, bias, None, *geometry, False)


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
    of_map = _input_gradient(grad, input, weight, geometry) if needs[0] else empty
    of_weight = empty
    if needs[1]:
        of_weight = _weight_gradient(grad, input if norm is None else normalised(input, norm), weight, geometry)
    of_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(weight.dtype) if needs[2] else empty
    return of_map, of_weight, of_bias


def _input_gradient(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    kernel, size = weight.shape[2:], input.shape
    unit = set(geometry.stride) == set(geometry.dilation) == {1} and geometry.groups == 1
    flipped = [kernel[d] - 1 - geometry.padding[d] for d in (0, 1)]
    if unit and min(flipped) >= 0:
        # A convolution of the gradient with the filters turned around.
        turned = weight.transpose(0, 1).flip(2, 3)
        back = Geometry([1, 1], flipped, [1, 1], 1)
        chosen = choose_conv_on_cpu(grad.shape, turned.shape, size, *back, False, grad.dtype)
        return _run(chosen, grad, turned, None, back)
    return _torch_gradients(grad, input, weight, geometry, (True, False))[0].contiguous(
        memory_format=torch.channels_last
    )


def _weight_gradient(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
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
