"""Blocks. The textbook `Residual` needs torch alone; torchvision's blocks are in `resnet_fast.models`."""

from .residual import Residual, resnet_block
from .training import set_activation_memory

__all__ = ["Residual", "resnet_block", "set_activation_memory"]
