"""What the arguments and results of the operators on feature maps have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pair(operator: str, name: str, value: int | Sequence[int]) -> list[int]:
    """``value`` as two numbers. A sequence of 1 or 2, as torch.nn.functional.conv2d takes."""
    if isinstance(value, int):
        return [value, value]
    if len(value) not in (1, 2):
        raise RuntimeError(f"{operator}: {name} must be one number or a sequence of 1 or 2, got {list(value)}")
    return [value[0], value[-1]]


def empty_channels_last(input: Tensor, size: Sequence[int]) -> Tensor:
    """A map of ``size`` [N, C, H, W], of input's dtype and device."""
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)


def as_channels_last(t: Tensor) -> Tensor:
    """``t`` (not an input of the operator) with exactly the strides of `empty_channels_last`."""
    _, c, h, w = t.shape
    strides = (c * h * w, 1, w * c, c)
    if t.stride() == strides:
        return t
    t = t.contiguous(memory_format=torch.channels_last)
    return t if t.stride() == strides else t.as_strided(t.shape, strides)
