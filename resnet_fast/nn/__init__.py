"""Blocks. The textbook `Residual` needs torch alone; torchvision's blocks are in `resnet_fast.models`."""

from .residual import Residual, resnet_block

__all__ = ["Residual", "resnet_block"]
