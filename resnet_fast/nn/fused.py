"""What every fused block is made of: deciding whether convolution -> BatchNorm -> ReLU may be fused, and calling it.

A block is fused as a whole or takes exactly torch's path. Both answers come with a reason in words, for `explain`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

from ..choose import Choice, choose, is_small_to_train
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


def why_plain_conv(name: str, conv: nn.Module) -> str | None:
    """Why a convolution must run as it is, judged by the module alone, or None if it need not."""
    if type(conv) is not nn.Conv2d:
        return f"{name} is {type(conv).__name__}, not Conv2d"
    if conv.padding_mode != "zeros":
        return f"{name} pads with {conv.padding_mode!r}, not zeros"
    if isinstance(conv.padding, str):
        return f"{name} has padding {conv.padding!r}, not numbers"
    parameters = conv._parameters
    if "bias" not in parameters or "weight" not in parameters:
        return f"{name} keeps its weight or bias elsewhere than in its parameters"
    if not is_plain_tensor(parameters["weight"]):
        return f"{name}.weight is {type(parameters['weight']).__name__}"
    return altered(name, conv)


def uses_batch_statistics(bn: nn.Module) -> bool:
    """Whether BatchNorm normalises by the batch's own statistics: its own mode decides, not the block's."""
    if type(bn) is not nn.BatchNorm2d:
        return False
    buffers = bn._buffers
    return bn.training or (buffers.get("running_mean") is None and buffers.get("running_var") is None)


def why_plain_conv_bn(conv_name: str, conv: nn.Module, bn_name: str, bn: nn.Module, training: bool) -> str | None:
    """Why convolution -> BatchNorm cannot be fused, judged by the modules alone, or None if it can. ``training``:
    whether it is to be fused with batch statistics."""
    why = why_plain_conv(conv_name, conv)
    if why is not None:
        return why
    if type(bn) is nn.BatchNorm2d:
        if uses_batch_statistics(bn) != training:
            uses = "running" if training else "batch"
            return f"{bn_name} uses {uses} statistics, unlike the first BatchNorm of the block"
        running = [bn._buffers.get(name) is None for name in ("running_mean", "running_var")]
        if any(running) and not (training and all(running)):
            return f"{bn_name} has no running statistics"
        affine = bn._parameters
    elif _is_frozen_batch_norm(bn):
        if training:
            return f"{bn_name} is frozen, unlike the first BatchNorm of the block"
        affine = bn._buffers
    else:
        return f"{bn_name} is {type(bn).__name__}, not BatchNorm2d"
    if "weight" not in affine or "bias" not in affine:
        return f"{bn_name} keeps its weight or bias elsewhere than in its parameters"
    return altered(bn_name, bn)


def why_plain_relu(name: str, relu: nn.Module) -> str | None:
    """Why the ReLU cannot be fused, or None if it can."""
    if type(relu) is not nn.ReLU:
        return f"{name} is {type(relu).__name__}, not ReLU"
    return altered(name, relu)


def why_plain_max_pool(name: str, pool: nn.Module) -> str | None:
    """Why the max-pooling behind a convolution cannot be fused into it, or None if it can."""
    if type(pool) is not nn.MaxPool2d:
        return f"{name} is {type(pool).__name__}, not MaxPool2d"
    if pool.return_indices or pool.ceil_mode or pool.dilation not in (1, (1, 1)):
        return f"{name} has return_indices, ceil_mode or dilation"
    if not all(_is_one_or_two(v) for v in (pool.kernel_size, pool.stride, pool.padding)):
        return f"{name} has sizes that are neither a number nor a tuple of two"
    return altered(name, pool)


def _is_one_or_two(value: object) -> bool:
    return type(value) is int or (type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int)


def why_plain_avg_pool(name: str, pool: nn.Module) -> str | None:
    """Why the average pooling in front of a classifier must run as it is, or None if it need not."""
    if type(pool) is not nn.AdaptiveAvgPool2d:
        return f"{name} is {type(pool).__name__}, not AdaptiveAvgPool2d"
    if pool.output_size not in (1, (1, 1), [1, 1]):
        return f"{name} has the output size {pool.output_size}, not 1"
    return altered(name, pool)


def why_plain_projection(projection: nn.Module | None, training: bool) -> str | None:
    """Why a shortcut of convolution and BatchNorm must run as it is, with its whole block; None if it need not."""
    if is_conv_bn(projection):
        return altered("downsample", projection) or why_plain_conv_bn(
            "downsample.0", projection[0], "downsample.1", projection[1], training
        )
    return None


def is_conv_bn(module: nn.Module | None) -> bool:
    """Whether this is torchvision's projection shortcut: Sequential(convolution, normalisation)."""
    return type(module) is nn.Sequential and len(module) == 2 and isinstance(module[0], nn.Conv2d)


def choice_for(conv: nn.Conv2d, operator: str) -> Choice:
    """The kernel that a convolution's own device and dtype get; a backend that cannot becomes plain torch, with why."""
    weight = conv.weight
    try:
        choice = choose(operator, weight.device.type, weight.dtype)
    except RuntimeError as error:
        return Choice("reference", "torch", str(error))
    return choice


@constant_when_compiled
def fused_backend(operator: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether ``operator`` runs on something else than plain torch."""
    try:
        return choose(operator, device_type, dtype).backend != "reference"
    except RuntimeError:
        return False


def _in_onnx_export() -> bool:
    # The question takes 2 us (it imports), so it is asked only where an export can be under way.
    tracing = torch._C._get_tracing_state() is not None or torch.compiler.is_compiling()
    return tracing and torch.onnx.is_in_onnx_export()


def _may_not_fuse(x: Tensor) -> bool:
    return x.dim() != 4 or under_transform() or _has_any_global_hook() or _in_onnx_export()


def may_fuse_input(x: Tensor, conv: nn.Conv2d, training: bool = False, has_residual: bool = True) -> bool:
    """Whether a fused block may run on this plain tensor; the modules have been judged already.

    training: with batch statistics; has_residual: whether x is added to the block's result. False under ONNX export,
    torch.func transforms and forward-mode AD, and for whatever plain torch refuses or runs as fast.
    """
    # Few questions, and cheap ones first: after a convolution none of this code is in the CPU's cache any more, and
    # each costs microseconds.
    if _may_not_fuse(x):
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
        cast = torch.get_autocast_dtype(device)
        if (dtype != cast and (has_residual or not training)) or dtype == torch.float64:
            return False
        dtype = cast
    elif dtype != weight.dtype:
        return False
    return fused_backend("batch_norm_relu_conv" if training else "conv_bn_relu", device, dtype)


def fused_block(block: nn.Module, x: Tensor) -> Tensor | None:
    """What a block's fused form makes of x, or None where the block must run as torch does.

    The block has conv1, bn1 and conv2 first, `why_plain`, and `_fused` and `_fused_training` for either kind of
    statistics.
    """
    if not is_plain_tensor(x) or block.why_plain() is not None:
        return None
    training = uses_batch_statistics(block.bn1)
    if not may_fuse_input(x, block.conv1, training) or (training and _is_small(block, x)):
        return None
    return block._fused_training(x) if training else block._fused(x)


def _is_small(block: nn.Module, x: Tensor) -> bool:
    """Whether torch's operators train ``block`` faster on x [N, C, H, W]. Where its memory is to be lean nobody asks,
    nor in a compiled graph, which would hold for some batches only."""
    if not x.is_cpu or torch.compiler.is_compiling() or getattr(block, "activation_memory", "default") == "lean":
        return False
    convs = [block.conv1, block.conv2, getattr(block, "conv3", None)]
    weights = sum(conv.weight.numel() for conv in convs if conv is not None)
    (down, right), (down2, right2) = block.conv1.stride, block.conv2.stride
    pixels = x.shape[0] * (x.shape[2] // (down * down2)) * (x.shape[3] // (right * right2))  # of the result
    return is_small_to_train(pixels * weights, is_channels_last(block.conv2))


def may_max_pool(x: Tensor) -> bool:
    """Whether the max-pooling behind a fused convolution of ``x`` is worth fusing too; `may_fuse_input` has said yes.

    Not where a gradient is asked for: it would compute the map between the two again.
    """
    return not torch.is_grad_enabled() and fused_backend("conv_bn_relu_max_pool", x.device.type, x.dtype)


def may_pool(operator: str, x: Tensor) -> bool:
    """Whether max_pool or avg_pool_flatten of this plain tensor may be ours; with a gradient they are torch's, to the
    last bit."""
    if torch.is_grad_enabled() or _may_not_fuse(x):
        return False
    return fused_backend(operator, x.device.type, x.dtype)


def conv_bn(x: Tensor, conv: nn.Conv2d, bn: nn.Module, residual: Tensor | None = None, relu: bool = True) -> Tensor:
    """relu(bn(conv(x)) + residual) by one fused operator. x [N, C, H, W], residual and result [N, K, P, Q].

    `may_fuse_input` has said yes, so that conv_bn_relu need not ask again for torch.func transforms.
    """
    args = (x, *_tensors(conv, bn), residual, *_geometry(conv, bn), relu)
    return dispatch(torch.ops.resnet_fast.conv_bn_relu.default, args, _is_typed(conv, bn))


def conv_bn_max_pool(x: Tensor, conv: nn.Conv2d, bn: nn.Module, pool: nn.MaxPool2d) -> Tensor:
    """pool(relu(bn(conv(x)))) by one fused operator; x [N, C, H, W]. `may_max_pool` has said yes."""
    args = (x, *_tensors(conv, bn), *_geometry(conv, bn), pool.kernel_size, pool.stride, pool.padding)
    return dispatch(torch.ops.resnet_fast.conv_bn_relu_max_pool.default, args, _is_typed(conv, bn))


def conv_bn_projection(
    x: Tensor, conv: nn.Conv2d, bn: nn.Module, shortcut: Tensor, projection: nn.Conv2d, projection_bn: nn.Module | None
) -> Tensor:
    """relu(bn(conv(x)) + projection_bn(projection(shortcut))) by one fused operator; without projection_bn the
    projection is a convolution alone. x [N, C, H, W], shortcut [N, D, I, J], result [N, K, P, Q]."""
    tensors, typed = _tensors(conv, bn), _is_typed(conv, bn) and _is_typed(projection, projection_bn)
    geometry = (*_geometry(conv, bn), *_geometry(projection, projection_bn))
    args = (x, *tensors, shortcut, *_tensors(projection, projection_bn), *geometry)
    return dispatch(torch.ops.resnet_fast.conv_bn_relu_projection.default, args, typed)


def conv_bn_shortcut(
    x: Tensor, conv: nn.Conv2d, bn: nn.Module, shortcut: Tensor, downsample: nn.Module | None
) -> Tensor:
    """relu(bn(conv(x)) + downsample(shortcut)), the end of a block, with whatever module stands in its shortcut, or
    none. `why_plain_projection` has said that it may."""
    if is_conv_bn(downsample):
        return conv_bn_projection(x, conv, bn, shortcut, downsample[0], downsample[1])
    return conv_bn(x, conv, bn, residual=shortcut if downsample is None else downsample(shortcut))


def _tensors(conv: nn.Conv2d, bn: nn.Module | None) -> tuple[Tensor | None, ...]:
    own = conv._parameters
    if bn is None:
        return (own["weight"], own["bias"], None, None, None, None)
    affine = bn._parameters or bn._buffers  # FrozenBatchNorm2d's weight and bias are buffers
    statistics = bn._buffers
    running = (statistics["running_mean"], statistics["running_var"])
    return (own["weight"], own["bias"], affine["weight"], affine["bias"], *running)


def _geometry(conv: nn.Conv2d, bn: nn.Module | None) -> tuple:
    return (conv.stride, conv.padding, conv.dilation, conv.groups, 0.0 if bn is None else bn.eps)


def _is_typed(conv: nn.Conv2d, bn: nn.Module | None) -> bool:
    tuples = type(conv.stride) is type(conv.padding) is type(conv.dilation) is tuple
    return tuples and (bn is None or type(bn.eps) is float)


def is_channels_last(conv: nn.Conv2d) -> bool:
    """Whether the model was moved to channels_last, judged by a kernel larger than 1x1."""
    w = conv.weight
    return w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous()
