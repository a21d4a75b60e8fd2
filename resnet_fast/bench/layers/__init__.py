"""The convolutions of torchvision's ten ResNets at 224x224 pixels, as data: one table a model, checked in here.

``python -m resnet_fast.bench.layers`` writes the tables anew from torchvision.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import torch
from torch import nn

_FOLDER = Path(__file__).parent
IMAGE_SIZE = 224
MODELS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A convolution (padding kernel // 2) with its BatchNorm and what follows: a residual and a ReLU, or not.

    ``block`` is where it stands ("stem", "layer1.0"), ``name`` what it is called there ("conv1", "downsample").
    ``size`` is that of the square input map.
    """

    block: str
    name: str
    channels: int
    filters: int
    kernel: int
    stride: int
    groups: int
    size: int
    residual: bool
    relu: bool

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        return (self.size - 1) // self.stride + 1

    @property
    def weights(self) -> int:
        return self.filters * self.channels // self.groups * self.kernel**2

    @property
    def shape(self) -> tuple:
        """What decides its speed: two layers of one shape run the same kernel."""
        return astuple(self)[2:]

    def __str__(self) -> str:
        tail = ("+res" if self.residual else "") + ("+relu" if self.relu else "")
        groups = f" g{self.groups}" if self.groups > 1 else ""
        return f"{self.kernel}x{self.kernel} {self.channels}->{self.filters} s{self.stride} @{self.size}{groups}{tail}"


def read(model: str) -> tuple[Layer, ...]:
    """The layers of one of MODELS in the order in which they run, from its table."""
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    return _read(model)


@lru_cache
def _read(model: str) -> tuple[Layer, ...]:
    with open(_FOLDER / f"{model}.csv", newline="") as file:
        return tuple(Layer(r["block"], r["name"], *(int(r[f]) for f in _NUMBERS), *(r[f] == "1" for f in _FLAGS))
                     for r in csv.DictReader(file))  # fmt: skip


_NUMBERS = ("channels", "filters", "kernel", "stride", "groups", "size")
_FLAGS = ("residual", "relu")


def distinct(models: tuple[str, ...] | list[str]) -> list[Layer]:
    """One layer of every shape that occurs in the models, in the order of its first occurrence."""
    found: dict[tuple, Layer] = {}
    for model in models:
        for layer in read(model):
            found.setdefault(layer.shape, layer)
    return list(found.values())


@dataclass(frozen=True)
class Block:
    """A residual block: the convolutions of its branch in order, and of its shortcut if that has one."""

    name: str
    branch: tuple[Layer, ...]
    projection: Layer | None

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.branch + ((self.projection,) if self.projection else ())

    @property
    def kind(self) -> str:
        kind = "bottleneck" if len(self.branch) == 3 else "basic"
        return f"{kind}_projection" if self.projection else kind

    @property
    def shape(self) -> tuple:
        return tuple(layer.shape for layer in self.layers)


def stem(model: str) -> Layer:
    return read(model)[0]


def blocks(model: str) -> Iterator[Block]:
    """The residual blocks of a model in the order in which they run."""
    for name, group in groupby(read(model)[1:], key=lambda layer: layer.block):
        found = list(group)
        projection = next((layer for layer in found if layer.name == "downsample"), None)
        yield Block(name, tuple(layer for layer in found if layer is not projection), projection)


def derive(model: str, size: int = IMAGE_SIZE) -> tuple[Layer, ...]:
    """The layers of torchvision's model for images of size x size pixels, from a run on shapes alone."""
    import torchvision

    found = []

    def visit(path: str):
        block, _, name = path.rpartition(".")
        if "downsample" in path:
            block, name = block.removesuffix(".downsample"), "downsample"

        def hook(conv: nn.Conv2d, args: tuple) -> None:
            residual = bool(block) and name == last
            shape = (conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], conv.groups)
            found.append(Layer(block or "stem", name, *shape, args[0].shape[2], residual, name != "downsample"))

        return hook

    with torch.device("meta"):
        net, image = getattr(torchvision.models, model)(), torch.empty(1, 3, size, size)
    last = "conv3" if hasattr(net.layer1[0], "conv3") else "conv2"
    for path, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(visit(path))
    net(image)
    return tuple(found)


def write(model: str) -> None:
    """Writes the table of a model."""
    with open(_FOLDER / f"{model}.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(field.name for field in fields(Layer))
        table.writerows([*row[:2], *map(int, row[2:])] for row in map(astuple, derive(model)))
