"""What a fused block is made of where BatchNorm uses the statistics of the batch: training.

A block is convolution -> (normalisation, ReLU, convolution)... -> normalisation with the shortcut and ReLU. For the
gradient it keeps what convolutions return and what blocks return; the normalised maps between are computed again. Where
`set_activation_memory` says "lean", so are the results of the 1x1 convolutions that widen a block.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.batch_norm_relu import check_batch
from ..ops.conv2d import FEW_CHANNELS
from ..ops.conv2d_fork import Convolution, conv2d_fork
from ..ops.max_pool_with_indices import MOST_TAPS
from .fused import is_conv_bn

ACTIVATION_MEMORY = ("default", "lean")


def set_activation_memory(model: nn.Module, mode: str) -> nn.Module:
    """Says what the fused blocks of ``model`` keep of a forward pass for the backward pass.

    "default" keeps what convolutions return and what blocks return; torch's ResNet-50 also keeps every normalised map
    (1.25 times as many bytes). "lean" drops the results of the 1x1 convolutions in front of a block's sum, expansions
    and projections, and computes them again (8 % more operations): 0.47 of torch's bytes in ResNet-50. The numbers are
    the same, bit for bit.

    Args:
        model: any module; blocks of this package in it are set, wherever they are.
        mode: "default" or "lean".

    Returns:
        model.

    Raises:
        ValueError: mode is neither, or the model has no block of this package.

    A graph of `torch.compile` decides for itself what it keeps: there "lean" changes nothing.
    """
    if mode not in ACTIVATION_MEMORY:
        raise ValueError(f"mode must be one of {', '.join(ACTIVATION_MEMORY)}, got {mode!r}")
    blocks = [m for m in model.modules() if hasattr(m, "activation_memory")]
    if not blocks:
        raise ValueError(f"model must have blocks of resnet_fast, got {type(model).__name__} without any")
    for block in blocks:
        block.activation_memory = mode
    return model


class Raw(NamedTuple):
    """What a convolution returned, [N, K, P, Q], and how to compute it again."""

    map: Tensor
    again: Callable[[], Tensor]


def conv(x: Tensor, module: nn.Conv2d) -> Raw:
    """module(x); x [N, C, H, W]."""
    return _raw(ops.conv2d if x.is_cpu or x.shape[1] <= FEW_CHANNELS else _cudnn_conv, (x,), module)


def fork(x: Tensor, module: nn.Conv2d, other: nn.Module | None) -> tuple[Raw, Tensor | Raw]:
    """What a block begins with: module(x), and for its shortcut x itself or, of a convolution with a normalisation,
    what that convolution makes of x. The gradients of both are added up in a kernel's store."""
    projects = is_conv_bn(other)
    if not x.is_cpu:
        return conv(x, module), conv(x, other[0]) if projects else x
    found = conv2d_fork(x, _convolution(module), _convolution(other[0]) if projects else None)
    out = _raw_of(found[0], ops.conv2d, (x,), module)
    return out, _raw_of(found[1], ops.conv2d, (x,), other[0]) if projects else found[1]


def _convolution(module: nn.Conv2d) -> Convolution:
    parameters, geometry = module._parameters, (module.stride, module.padding, module.dilation, module.groups)
    return Convolution(parameters["weight"], parameters["bias"], *geometry)


def _cudnn_conv(*args) -> Tensor:
    """What ops.conv2d runs on CUDA, without what an operator with a gradient in Python costs the CPU."""
    return ops.conv2d_ref(*args).contiguous(memory_format=torch.channels_last)


def norm_conv(raw: Raw, bn: nn.BatchNorm2d, module: nn.Conv2d) -> Raw:
    """module(relu(bn(raw)))."""
    x = raw.map
    check_batch("batch_norm_relu_conv", x)  # before the buffers change
    with torch.no_grad():  # the gradient goes through them all the same: see batch_norm_relu_conv
        mean, var = ops.batch_norm_statistics(x)
    _track(bn, mean, var, x)
    affine = bn._parameters
    return _raw(ops.batch_norm_relu_conv, (x, mean, var, affine["weight"], affine["bias"]), module, bn.eps)


def _raw(operator: Callable[..., Tensor], inputs: tuple, module: nn.Conv2d, *eps: float) -> Raw:
    return _raw_of(operator(*inputs, *_convolution(module), *eps), operator, inputs, module, *eps)


def _raw_of(out: Tensor, operator: Callable[..., Tensor], inputs: tuple, module: nn.Conv2d, *eps: float) -> Raw:
    weight, bias, *geometry = _convolution(module)
    return Raw(out, partial(_again, operator, inputs, weight, weight._version, bias, (*geometry, *eps), out.dtype))


@torch.no_grad()
def _again(
    operator: Callable[..., Tensor], inputs: tuple, weight: Tensor, version: int, bias: Tensor | None, geometry: tuple,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    if weight._version != version:
        raise RuntimeError(
            "a convolution's weight was modified in place between the forward and the backward pass, which computes "
            f'the convolution again (activation memory "lean"): version {weight._version}, expected {version}'
        )
    x, *rest = inputs  # cast as autocast did, if it was on
    bias = None if bias is None else bias.to(dtype)
    return operator(x.to(dtype), *rest, weight.to(dtype), bias, *geometry)


def norm(raw: Raw, bn: nn.BatchNorm2d, residual: Tensor | None = None, lean: bool = False) -> Tensor:
    """relu(bn(raw) + residual), all [N, C, H, W]."""
    x, affine = raw.map, bn._parameters
    with _forgetting(lean, raw):
        out, _, mean, var = ops.batch_norm_relu(x, affine["weight"], affine["bias"], residual, bn.eps)
    _track(bn, mean, var, x)
    return out


def norm_shortcut(
    raw: Raw, bn: nn.BatchNorm2d, shortcut: Tensor | Raw, downsample: nn.Module | None, memory: str, widens: bool
) -> Tensor:
    """relu(bn(raw) + the shortcut of `fork`), the end of a block, with whatever module stands in its shortcut, or none.
    `why_plain_projection` has said that it may. ``widens``: whether raw comes from a 1x1 convolution."""
    lean = memory == "lean"
    if not isinstance(shortcut, Raw):
        return norm(raw, bn, shortcut if downsample is None else downsample(shortcut), lean and widens)
    other, other_bn = shortcut, downsample[1]
    affine, other_affine = bn._parameters, other_bn._parameters
    with _forgetting(lean, other, *([raw] if widens else [])):
        out, _, *statistics = ops.batch_norm_relu_projection(
            raw.map, affine["weight"], affine["bias"], other.map, other_affine["weight"], other_affine["bias"],
            bn.eps, other_bn.eps,
        )  # fmt: skip
    _track(bn, *statistics[:2], raw.map)
    _track(other_bn, *statistics[2:], other.map)
    return out


def _forgetting(lean: bool, *raws: Raw) -> AbstractContextManager:
    """Inside, an operator that keeps one of these maps for its gradient keeps how to compute it again."""
    if not lean or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return nullcontext()
    again = {raw.map.data_ptr(): raw.again for raw in raws}

    def pack(t: Tensor) -> Tensor | Callable[[], Tensor]:
        return again.get(t.data_ptr(), t) if t.dim() == 4 and t.is_floating_point() else t

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


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
