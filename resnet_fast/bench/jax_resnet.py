"""torchvision's ResNet in JAX: the same weights and numbers, convolutions by XLA in NHWC."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import torch
from jax import Array, lax
from torch import Tensor, nn
from torch.utils import dlpack

LAYOUT = ("NHWC", "HWIO", "NHWC")


def _array(tensor: Tensor) -> Array:
    return jnp.from_dlpack(tensor.detach().contiguous())


def _convolution(x: Array, weight: Array, conv: nn.Conv2d) -> Array:
    padding = [(p, p) for p in conv.padding]
    return lax.conv_general_dilated(
        x, weight, conv.stride, padding, rhs_dilation=conv.dilation, dimension_numbers=LAYOUT,
        feature_group_count=conv.groups,
    )  # fmt: skip


def _forward(model: nn.Module, w: dict[str, Array], x: Array) -> Array:
    """Logits [N, classes] of images [N, H, W, 3]. w: the model's tensors by name, filters in HWIO."""

    def conv_bn(x: Array, conv: str, bn: str) -> Array:
        x = _convolution(x, w[f"{conv}.weight"], model.get_submodule(conv))
        var, eps = w[f"{bn}.running_var"].astype(jnp.float32), model.get_submodule(bn).eps
        scale = w[f"{bn}.weight"].astype(jnp.float32) * lax.rsqrt(var + eps)
        shift = w[f"{bn}.bias"].astype(jnp.float32) - w[f"{bn}.running_mean"].astype(jnp.float32) * scale
        return (x.astype(jnp.float32) * scale + shift).astype(x.dtype)

    x = jax.nn.relu(conv_bn(x, "conv1", "bn1"))
    around = ((0, 0), (1, 1), (1, 1), (0, 0))
    x = lax.reduce_window(x, jnp.array(-jnp.inf, x.dtype), lax.max, (1, 3, 3, 1), (1, 2, 2, 1), around)
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for name, block in model.get_submodule(stage).named_children():
            path = f"{stage}.{name}"
            count = 3 if hasattr(block, "conv3") else 2
            y = x
            for i in range(1, count + 1):
                y = conv_bn(y, f"{path}.conv{i}", f"{path}.bn{i}")
                y = jax.nn.relu(y) if i < count else y
            if block.downsample is not None:
                x = conv_bn(x, f"{path}.downsample.0", f"{path}.downsample.1")
            x = jax.nn.relu(y + x)
    x = x.astype(jnp.float32).mean((1, 2)).astype(x.dtype)
    return x @ w["fc.weight"].T + w["fc.bias"]


def prepare(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """A call that runs the model, one of torchvision's ResNets, on images [N, 3, H, W] of its device and dtype."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            weights[name] = _array(tensor.permute(2, 3, 1, 0) if tensor.dim() == 4 else tensor)
    x = _array(images.permute(0, 2, 3, 1))
    run = jax.jit(lambda w, x: _forward(model, w, x))

    def call() -> Tensor:
        return torch.as_tensor(dlpack.from_dlpack(run(weights, x).block_until_ready()))

    return call
