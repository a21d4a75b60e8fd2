"""Models: torchvision's ten ResNets, fused, with the same names, weights, initialisation, arguments and numbers.

>>> from resnet_fast.models import resnet50, ResNet50_Weights
>>> model = resnet50(weights=ResNet50_Weights.DEFAULT).eval()

`resnet_fast.models.cifar` has the small ones for CIFAR-10, and their twins without shortcuts.
"""

import torch

try:
    import torchvision  # noqa: F401
except ImportError as error:
    _minor = int(torch.__version__.split(".")[1]) + 15  # torch 2.N is released with torchvision 0.(N + 15)
    raise ImportError(
        f"resnet_fast.models needs torchvision, which does not import here ({error}). For torch {torch.__version__}: "
        f'pip install --no-deps "torchvision==0.{_minor}.*" && pip install numpy pillow'
    ) from error

from . import cifar
from .resnet import (
    BasicBlock,
    Bottleneck,
    ResNet,
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
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)

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
    "cifar",
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
