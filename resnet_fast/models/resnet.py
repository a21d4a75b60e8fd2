"""The ten ResNets of torchvision.models.resnet, fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision.models import resnet as tv
from torchvision.models._utils import _ovewrite_named_param, handle_legacy_interface
from torchvision.models.resnet import (
    ResNet18_Weights,
    ResNet34_Weights,
    ResNet50_Weights,
    ResNet101_Weights,
    ResNet152_Weights,
    ResNeXt50_32X4D_Weights,
    ResNeXt101_32X8D_Weights,
    ResNeXt101_64X4D_Weights,
    Wide_ResNet50_2_Weights,
    Wide_ResNet101_2_Weights,
)

from ..nn.blocks import BasicBlock, Bottleneck
from ..nn.ends import FusedEnds
from ..nn.fused import (
    conv_bn,
    conv_bn_max_pool,
    is_plain_tensor,
    may_fuse_input,
    may_max_pool,
    may_pool,
    uses_batch_statistics,
    why_plain_max_pool,
)
from ..nn.training import conv, max_pool, norm

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ResNeXt50_32X4D_Weights",
    "ResNeXt101_32X8D_Weights",
    "ResNeXt101_64X4D_Weights",
    "ResNet",
    "ResNet18_Weights",
    "ResNet34_Weights",
    "ResNet50_Weights",
    "ResNet101_Weights",
    "ResNet152_Weights",
    "Wide_ResNet50_2_Weights",
    "Wide_ResNet101_2_Weights",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


class ResNet(FusedEnds, tv.ResNet):
    """torchvision's ResNet with a fused stem and average pooling; its blocks are fused if they are this package's.

    Arguments, attributes and state_dict are torchvision's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layer4[-1].hands_out_contiguous = True

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self._stem(x)

        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)

        x = self._average(x)
        return self.fc(x)

    def _stem(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if is_plain_tensor(x) and self.why_plain() is None:
                training = uses_batch_statistics(self.bn1)
                if not may_fuse_input(x, self.conv1, training, has_residual=False):
                    return self._plain_stem(x)
                if training:
                    out = norm(conv(x, self.conv1), self.bn1)
                    return max_pool(out, self.maxpool) if self.why_plain_max_pool() is None else self.maxpool(out)
                if self.why_plain_max_pool() is None and may_max_pool(x):
                    return conv_bn_max_pool(x, self.conv1, self.bn1, self.maxpool)
                out = conv_bn(x, self.conv1, self.bn1)
                ours = self.why_plain_max_pool() is None and may_pool("max_pool", out)
                return max_pool(out, self.maxpool) if ours else self.maxpool(out)
        return self._plain_stem(x)

    def _plain_stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))

    @torch.jit.unused
    def why_plain_max_pool(self) -> str | None:
        """Why maxpool runs torch's operator behind a fused stem, judged by the module, or None if it is fused too."""
        return why_plain_max_pool("maxpool", self.maxpool)


def _builder(name: str, block: type, layers: list[int], weights_enum: Any, **defaults: int) -> Callable[..., ResNet]:
    @handle_legacy_interface(weights=("pretrained", weights_enum.IMAGENET1K_V1))
    def build(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
        weights = weights_enum.verify(weights)
        for key, value in defaults.items():
            _ovewrite_named_param(kwargs, key, value)
        if weights is not None:
            _ovewrite_named_param(kwargs, "num_classes", len(weights.meta["categories"]))
        model = ResNet(block, layers, **kwargs)
        if weights is not None:
            model.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""torchvision.models.{name}, fused.

    Args:
        weights: a member of `{weights_enum.__name__}`, its name, or None for random weights.
        progress: whether a download of weights shows a progress bar.
        **kwargs: what `ResNet` takes: num_classes, zero_init_residual, groups, width_per_group,
            replace_stride_with_dilation, norm_layer.

    Raises:
        ValueError: an argument contradicts the model or its weights, as in torchvision.
    """
    return build


resnet18 = _builder("resnet18", BasicBlock, [2, 2, 2, 2], ResNet18_Weights)
resnet34 = _builder("resnet34", BasicBlock, [3, 4, 6, 3], ResNet34_Weights)
resnet50 = _builder("resnet50", Bottleneck, [3, 4, 6, 3], ResNet50_Weights)
resnet101 = _builder("resnet101", Bottleneck, [3, 4, 23, 3], ResNet101_Weights)
resnet152 = _builder("resnet152", Bottleneck, [3, 8, 36, 3], ResNet152_Weights)
resnext50_32x4d = _builder(
    "resnext50_32x4d", Bottleneck, [3, 4, 6, 3], ResNeXt50_32X4D_Weights, groups=32, width_per_group=4
)
resnext101_32x8d = _builder(
    "resnext101_32x8d", Bottleneck, [3, 4, 23, 3], ResNeXt101_32X8D_Weights, groups=32, width_per_group=8
)
resnext101_64x4d = _builder(
    "resnext101_64x4d", Bottleneck, [3, 4, 23, 3], ResNeXt101_64X4D_Weights, groups=64, width_per_group=4
)
wide_resnet50_2 = _builder("wide_resnet50_2", Bottleneck, [3, 4, 6, 3], Wide_ResNet50_2_Weights, width_per_group=128)
wide_resnet101_2 = _builder(
    "wide_resnet101_2", Bottleneck, [3, 4, 23, 3], Wide_ResNet101_2_Weights, width_per_group=128
)
