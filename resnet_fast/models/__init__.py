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

from . import cifar, resnet
from .resnet import *  # noqa: F403

__all__ = ["cifar", *resnet.__all__]
