"""The small ResNets for CIFAR-10 of the paper, fused, and their plain twins without shortcuts.

>>> from resnet_fast.models.cifar import resnet20, plain20
>>> logits = resnet20(num_classes=10)(images)  # [N, 3, 32, 32]; any other size and number of channels too

References:
    He et al., Deep Residual Learning for Image Recognition (2015), section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.blocks import BasicBlock, PlainBlock
from ..nn.ends import FusedEnds

__all__ = [
    "PaddedShortcut",
    "PlainBlock",
    "ResNet",
    "plain20",
    "plain32",
    "plain44",
    "plain56",
    "plain110",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
]


class PaddedShortcut(nn.Module):
    """A shortcut without parameters (the paper's option A): every ``stride``-th pixel, and channels of zeros.

    Half of the new channels stand in front of the old ones, half behind.

    Shape: [N, C, H, W] -> [N, C + added_channels, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(self, added_channels: int, stride: int) -> None:
        super().__init__()
        self.added_channels = added_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        front = self.added_channels // 2
        return F.pad(x, [0, 0, 0, 0, front, self.added_channels - front])

    def extra_repr(self) -> str:
        return f"added_channels={self.added_channels}, stride={self.stride}"


class ResNet(FusedEnds, nn.Module):
    """The paper's network for small images: a 3x3 convolution, three stages of (depth - 2) / 6 blocks of two 3x3
    convolutions, the second and third at half the size with twice the channels, average pooling, and a linear layer.

    Attributes are named as in torchvision's ResNet, which has a fourth stage; so are a projection's, ``downsample.0``
    and ``downsample.1``. Weights published for CIFAR-10 under these names load.

    Args:
        depth: number of layers with weights on the way from image to logits (projections not counted): 6 n + 2.
        num_classes: number of logits.
        in_channels: channels of the images.
        width: channels of the first stage.
        shortcut: what goes past a block where its output has another size or more channels: "A" every second pixel,
            and zeros for the new channels; "B" a 1x1 convolution with BatchNorm. "C": that in every block. None: a
            plain network, in which nothing goes past any block.

    Shape: [N, in_channels, H, W] -> [N, num_classes].

    Raises:
        ValueError: depth is not 6 n + 2 with n at least 1, or shortcut is none of these.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 16,
        shortcut: str | None = "A",
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6 n + 2 with n at least 1 (20, 32, 44, 56, 110), got {depth}")
        if shortcut not in ("A", "B", "C", None):
            raise ValueError(f'shortcut must be "A", "B", "C" or None, got {shortcut!r}')
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(width, width, blocks, 1, shortcut)
        self.layer2 = _stage(width, 2 * width, blocks, 2, shortcut)
        self.layer3 = _stage(2 * width, 4 * width, blocks, 2, shortcut)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(4 * width, num_classes)

        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self._stem(x)

        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)

        x = self._average(x)
        return self.fc(x)


def _stage(in_channels: int, channels: int, blocks: int, stride: int, shortcut: str | None) -> nn.Sequential:
    block = PlainBlock if shortcut is None else BasicBlock
    first = block(in_channels, channels, stride, _shortcut(in_channels, channels, stride, shortcut))
    rest = [block(channels, channels, 1, _shortcut(channels, channels, 1, shortcut)) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def _shortcut(in_channels: int, channels: int, stride: int, option: str | None) -> nn.Module | None:
    if option is None or (option != "C" and stride == 1 and in_channels == channels):
        return None
    if option == "A":
        return PaddedShortcut(channels - in_channels, stride)
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


def _builder(name: str, depth: int, **fixed: Any) -> Callable[..., ResNet]:
    def build(**kwargs: Any) -> ResNet:
        return ResNet(depth, **kwargs, **fixed)

    what = "without shortcuts" if fixed else "with shortcuts past every block"
    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""The paper's network of {depth} layers {what}.

    Args:
        **kwargs: what `ResNet` takes besides depth: num_classes, in_channels, width{"" if fixed else ", shortcut"}.
    """
    return build


resnet20 = _builder("resnet20", 20)
resnet32 = _builder("resnet32", 32)
resnet44 = _builder("resnet44", 44)
resnet56 = _builder("resnet56", 56)
resnet110 = _builder("resnet110", 110)
plain20 = _builder("plain20", 20, shortcut=None)
plain32 = _builder("plain32", 32, shortcut=None)
plain44 = _builder("plain44", 44, shortcut=None)
plain56 = _builder("plain56", 56, shortcut=None)
plain110 = _builder("plain110", 110, shortcut=None)
