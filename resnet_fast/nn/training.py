"""What a fused block is made of where BatchNorm uses the statistics of the batch: training.

A block is convolution -> (normalisation, ReLU, convolution)... -> normalisation with the shortcut and ReLU. For the
gradient it keeps what convolutions return and what blocks return; the normalised maps between are computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.max_pool_with_indices import MOST_TAPS
from .fused import is_conv_bn


def conv(x: Tensor, module: nn.Conv2d) -> Tensor:
    """module(x); x [N, C, H, W], result [N, K, P, Q]."""
    weights = module._parameters
    geometry = (module.stride, module.padding, module.dilation, module.groups)
    return ops.conv2d(x, weights["weight"], weights["bias"], *geometry)


def norm_conv(x: Tensor, bn: nn.BatchNorm2d, module: nn.Conv2d) -> Tensor:
    """module(relu(bn(x))); x [N, C, H, W], result [N, K, P, Q]."""
    with torch.no_grad():  # the gradient goes through them all the same: see batch_norm_relu_conv
        mean, var = ops.batch_norm_statistics(x)
    _track(bn, mean, var, x)
    affine, weights = bn._parameters, module._parameters
    geometry = (module.stride, module.padding, module.dilation, module.groups)
    return ops.batch_norm_relu_conv(
        x, mean, var, affine["weight"], affine["bias"], weights["weight"], weights["bias"], *geometry, bn.eps
    )


def norm(x: Tensor, bn: nn.BatchNorm2d, residual: Tensor | None = None) -> Tensor:
    """relu(bn(x) + residual), all [N, C, H, W]."""
    affine = bn._parameters
    out, _, mean, var = ops.batch_norm_relu(x, affine["weight"], affine["bias"], residual, bn.eps)
    _track(bn, mean, var, x)
    return out


def norm_shortcut(x: Tensor, bn: nn.BatchNorm2d, shortcut: Tensor, downsample: nn.Module | None) -> Tensor:
    """relu(bn(x) + downsample(shortcut)), the end of a block, with whatever module stands in its shortcut, or none.
    `why_plain_projection` has said that it may."""
    if not is_conv_bn(downsample):
        return norm(x, bn, shortcut if downsample is None else downsample(shortcut))
    other, other_bn = conv(shortcut, downsample[0]), downsample[1]
    affine, other_affine = bn._parameters, other_bn._parameters
    out, _, *statistics = ops.batch_norm_relu_projection(
        x, affine["weight"], affine["bias"], other, other_affine["weight"], other_affine["bias"], bn.eps, other_bn.eps
    )
    _track(bn, *statistics[:2], x)
    _track(other_bn, *statistics[2:], other)
    return out


def max_pool(x: Tensor, pool: nn.MaxPool2d) -> Tensor:
    """pool(x), which keeps 8-bit indices where a gradient is asked for. `why_plain_max_pool` has said that it may."""
    args = (x, pool.kernel_size, pool.stride, pool.padding)
    wants_indices = torch.is_grad_enabled() and x.requires_grad and _taps(pool.kernel_size) <= MOST_TAPS
    return ops.max_pool_with_indices(*args)[0] if wants_indices else ops.max_pool(*args)


def _taps(kernel_size: int | tuple[int, int]) -> int:
    return kernel_size**2 if isinstance(kernel_size, int) else kernel_size[0] * kernel_size[-1]


def _track(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor, x: Tensor) -> None:
    """Does to the buffers of ``bn`` what torch.nn.BatchNorm2d does."""
    buffers = bn._buffers
    if not bn.training or not bn.track_running_stats or buffers["running_mean"] is None:
        return
    momentum, batches = bn.momentum, buffers["num_batches_tracked"]
    if batches is not None:
        batches.add_(1)
    if momentum is None:
        momentum = 0.0 if batches is None else 1.0 / float(batches)
    ops.update_running_stats_(
        buffers["running_mean"], buffers["running_var"], mean, var, momentum, x.numel() // x.shape[1]
    )
