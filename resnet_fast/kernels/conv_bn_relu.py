"""conv_bn_relu and its relatives in Triton: which kernel computes a convolution, and what it is handed.

    few channels (a network's first layer)                      conv_few_channels.py
    sm_90 and later, 16 divides the channels, stride 1 or 2     conv_tma.py
    everything else                                             conv_pointers.py

All of them put BatchNorm, shortcut and ReLU into their store. They rely on the checks of ops/conv_bn_relu.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import conv_few_channels, conv_pointers, conv_tma
from .shared import Conv


def _in_channels_last(conv: Conv) -> Conv:
    return conv._replace(
        input=conv.input.contiguous(memory_format=torch.channels_last), weight=conv_pointers.with_vectors(conv.weight)
    )


def _run(
    conv: Conv, shortcut: Conv | None, residual: Tensor | None, relu: bool, out: Tensor, descriptors: bool = True
) -> Tensor:
    conv = _in_channels_last(conv)
    shortcut = None if shortcut is None else _in_channels_last(shortcut)
    kernel = conv_tma if descriptors and conv_tma.takes(conv, shortcut, residual, out) else conv_pointers
    return kernel.run(conv, shortcut, residual, relu, out)


def conv_bn_relu_triton(
    input: Tensor,  # [N, C, H, W], any strides
    weight: Tensor,  # [K, C / groups, R, S], any strides
    bias: Tensor | None,  # [K]
    bn_weight: Tensor | None,  # [K]
    bn_bias: Tensor | None,  # [K]
    running_mean: Tensor,  # [K]
    running_var: Tensor,  # [K]
    residual: Tensor | None,  # [N, K, P, Q], any strides
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    relu: bool,
    out: Tensor,  # [N, K, P, Q], channels_last, not empty
    descriptors: bool = True,
) -> Tensor:
    """Writes relu(batch_norm(conv2d(input, weight, bias)) + residual) into ``out`` and returns it. ``descriptors``:
    whether conv_tma.py may compute it."""
    vectors = (bias, bn_weight, bn_bias, running_mean, running_var)
    conv = Conv.of(input, weight, *vectors, stride, padding, dilation, groups, eps)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    if conv_few_channels.takes(conv, list(out.shape)):
        return conv_few_channels.run(conv, residual, relu, out)
    return _run(conv, None, residual, relu, out, descriptors)


def conv_bn_relu_max_pool_triton(
    input: Tensor,  # [N, C, H, W], any strides
    weight: Tensor,  # [K, C / groups, R, S], any strides
    bias: Tensor | None,  # [K]
    bn_weight: Tensor | None,  # [K]
    bn_bias: Tensor | None,  # [K]
    running_mean: Tensor,  # [K]
    running_var: Tensor,  # [K]
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    pool: list[list[int]],  # kernel_size, stride, padding
    size: list[int],  # [N, K, P, Q] of the map before the pooling
    out: Tensor,  # [N, K, pooled P, pooled Q], channels_last, not empty
) -> Tensor | None:
    """Writes max_pool(relu(batch_norm(conv2d(input, weight, bias)))) into ``out`` and returns it; None if no kernel
    does both."""
    vectors = (bias, bn_weight, bn_bias, running_mean, running_var)
    conv = Conv.of(input, weight, *vectors, stride, padding, dilation, groups, eps)
    return (
        conv_few_channels.run_max_pool(conv, size, out) if conv_few_channels.takes_max_pool(conv, size, pool) else None
    )


def conv_bn_relu_projection_triton(
    input: Tensor,  # [N, C, H, W], any strides
    weight: Tensor,  # [K, C / groups, R, S], any strides
    bias: Tensor | None,  # [K]
    bn_weight: Tensor | None,  # [K]
    bn_bias: Tensor | None,  # [K]
    running_mean: Tensor,  # [K]
    running_var: Tensor,  # [K]
    shortcut: Tensor,  # [N, C2, H2, W2], any strides
    shortcut_weight: Tensor,  # [K, C2 / groups, R2, S2], any strides
    shortcut_bias: Tensor | None,  # [K]
    shortcut_bn_weight: Tensor | None,  # [K]
    shortcut_bn_bias: Tensor | None,  # [K]
    shortcut_running_mean: Tensor | None,  # [K]; None: no BatchNorm behind the shortcut's convolution
    shortcut_running_var: Tensor | None,  # [K], likewise
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    shortcut_stride: list[int],
    shortcut_padding: list[int],
    shortcut_dilation: list[int],
    shortcut_groups: int,
    shortcut_eps: float,
    out: Tensor,  # [N, K, P, Q], channels_last, not empty
) -> Tensor:
    """Writes relu(batch_norm(conv2d(input)) + batch_norm(conv2d(shortcut))) into ``out`` and returns it.

    One kernel with two accumulators in float32: the shortcut's map is neither written nor rounded. With groups it is
    two kernels.
    """
    vectors = (bias, bn_weight, bn_bias, running_mean, running_var)
    vectors2 = (
        shortcut_bias, shortcut_bn_weight, shortcut_bn_bias, shortcut_running_mean, shortcut_running_var
    )  # fmt: skip
    conv = Conv.of(input, weight, *vectors, stride, padding, dilation, groups, eps)
    second = Conv.of(
        shortcut, shortcut_weight, *vectors2, shortcut_stride, shortcut_padding, shortcut_dilation, shortcut_groups,
        shortcut_eps,
    )  # fmt: skip
    if groups == shortcut_groups == 1:
        return _run(conv, second, None, True, out)
    return _run(conv, None, _run(second, None, None, False, torch.empty_like(out)), True, out)
