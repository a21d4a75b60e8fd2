"""What every fused block is made of: deciding whether convolution -> BatchNorm -> ReLU may be fused, and calling it.

A block is fused as a whole or takes exactly torch's path. Both answers come with a reason in words, for `explain`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

from ..choose import Choice, choose
from ..ops.registration import constant_when_compiled, dispatch, under_transform


def is_plain_tensor(t: Tensor) -> bool:
    """Whether torch's own arithmetic applies. Asked of a block's input first: for an FX proxy nothing else may be read,
    since every parameter looked at becomes a node of the graph."""
    # Exact types: DTensor, quantised and other subclasses have their own arithmetic. FakeTensor: torch.export.
    return type(t) in (Tensor, nn.Parameter) or isinstance(t, FakeTensor)


def altered(name: str, module: nn.Module) -> str | None:
    """Why calling ``module`` may do more than its class's forward, or None."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has hooks"
    if "forward" in module.__dict__:
        return f"{name}.forward was replaced"
    return None


def _is_frozen_batch_norm(bn: nn.Module) -> bool:
    # By name: importing torchvision only to ask would cost every user a second.
    return type(bn).__name__ == "FrozenBatchNorm2d" and type(bn).__module__ == "torchvision.ops.misc"


def why_plain_conv_bn(conv_name: str, conv: nn.Module, bn_name: str, bn: nn.Module) -> str | None:
    """Why convolution -> BatchNorm cannot be fused, judged by the modules alone, or None if it can."""
    if type(conv) is not nn.Conv2d:
        return f"{conv_name} is {type(conv).__name__}, not Conv2d"
    if conv.padding_mode != "zeros":
        return f"{conv_name} pads with {conv.padding_mode!r}, not zeros"
    if isinstance(conv.padding, str):
        return f"{conv_name} has padding {conv.padding!r}, not numbers"
    parameters = conv._parameters
    if "bias" not in parameters or "weight" not in parameters:
        return f"{conv_name} keeps its weight or bias elsewhere than in its parameters"
    if not is_plain_tensor(parameters["weight"]):
        return f"{conv_name}.weight is {type(parameters['weight']).__name__}"
    if type(bn) is nn.BatchNorm2d:
        if bn._buffers.get("running_mean") is None or bn._buffers.get("running_var") is None:
            return f"{bn_name} has no running statistics"
        if bn.training:
            return f"{bn_name} is in training mode (batch statistics)"
        affine = bn._parameters
    elif _is_frozen_batch_norm(bn):
        affine = bn._buffers
    else:
        return f"{bn_name} is {type(bn).__name__}, not BatchNorm2d"
    if "weight" not in affine or "bias" not in affine:
        return f"{bn_name} keeps its weight or bias elsewhere than in its parameters"
    return altered(conv_name, conv) or altered(bn_name, bn)


def why_plain_relu(name: str, relu: nn.Module) -> str | None:
    """Why the ReLU cannot be fused, or None if it can."""
    if type(relu) is not nn.ReLU:
        return f"{name} is {type(relu).__name__}, not ReLU"
    return altered(name, relu)


def why_plain_projection(projection: nn.Module | None) -> str | None:
    """Why a shortcut of convolution and BatchNorm must run as it is, with its whole block; None if it need not."""
    if is_conv_bn(projection):
        return altered("downsample", projection) or why_plain_conv_bn(
            "downsample.0", projection[0], "downsample.1", projection[1]
        )
    return None


def is_conv_bn(module: nn.Module | None) -> bool:
    """Whether this is torchvision's projection shortcut: Sequential(convolution, normalisation)."""
    return type(module) is nn.Sequential and len(module) == 2 and isinstance(module[0], nn.Conv2d)


def choice_for(conv: nn.Conv2d) -> Choice:
    """The kernel that a convolution's own device and dtype get; a backend that cannot becomes plain torch, with why."""
    weight = conv.weight
    try:
        choice = choose("conv_bn_relu", weight.device.type, weight.dtype)
    except RuntimeError as error:
        return Choice("reference", "torch", str(error))
    return choice


@constant_when_compiled
def _fused_backend(device_type: str, dtype: torch.dtype) -> bool:
    try:
        return choose("conv_bn_relu", device_type, dtype).backend != "reference"
    except RuntimeError:
        return False


def _in_onnx_export() -> bool:
    # The question takes 2 us (it imports), so it is asked only where an export can be under way.
    tracing = torch._C._get_tracing_state() is not None or torch.compiler.is_compiling()
    return tracing and torch.onnx.is_in_onnx_export()


def may_fuse_input(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether a fused block may run on this plain tensor; the modules have been judged already.

    False under ONNX export, torch.func transforms and forward-mode AD, and for whatever plain torch refuses or runs as
    fast.
    """
    # Few questions, and cheap ones first: after a convolution none of this code is in the CPU's cache any more, and
    # each costs microseconds.
    if x.dim() != 4 or under_transform() or _has_any_global_hook() or _in_onnx_export():
        return False
    weight, dtype = conv._parameters["weight"], x.dtype
    if x.is_cpu and weight.is_cpu:
        device = "cpu"
    elif x.is_cuda and weight.is_cuda and x.device == weight.device:
        device = "cuda"
    else:
        return False
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device):
        # Under autocast a float32 residual would make torch's block return float32: leave that one to torch.
        if dtype != torch.get_autocast_dtype(device) or dtype == torch.float64:
            return False
    elif dtype != weight.dtype:
        return False
    return _fused_backend(device, dtype)


def conv_bn(x: Tensor, conv: nn.Conv2d, bn: nn.Module, residual: Tensor | None = None, relu: bool = True) -> Tensor:
    """relu(bn(conv(x)) + residual) by one fused operator. x [N, C, H, W], residual and result [N, K, P, Q].

    `may_fuse_input` has said yes, so that conv_bn_relu need not ask again for torch.func transforms.
    """
    affine = bn._parameters or bn._buffers  # FrozenBatchNorm2d's weight and bias are buffers
    statistics = bn._buffers
    args = (
        x,
        conv._parameters["weight"],
        conv._parameters["bias"],
        affine["weight"],
        affine["bias"],
        statistics["running_mean"],
        statistics["running_var"],
        residual,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        bn.eps,
        relu,
    )
    typed = type(conv.stride) is type(conv.padding) is type(conv.dilation) is tuple and type(bn.eps) is float
    return dispatch(torch.ops.resnet_fast.conv_bn_relu.default, args, typed)


def shortcut(x: Tensor, projection: nn.Module | None) -> Tensor:
    """The identity branch of a block: x itself, the fused projection, or whatever module stands there."""
    if projection is None:
        return x
    if is_conv_bn(projection):
        return conv_bn(x, projection[0], projection[1], relu=False)
    return projection(x)


def is_channels_last(conv: nn.Conv2d) -> bool:
    """Whether the model was moved to channels_last, judged by a kernel larger than 1x1."""
    w = conv.weight
    return w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous()
