"""What a plan consists of: calls of kernels and lines of Python, and where the values between them lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch

from . import memory
from .fuse import Step
from .weights import PackedConv


@dataclass
class Place:
    """Where a node's value lies: in a map of the arena, or in a variable of the generated code."""

    size: tuple[int, int, int, int]  # [N, C, H, W]; a matrix has H = W = 1
    dtype: torch.dtype
    map: memory.Map | None = None
    variable: str = ""

    def image_bytes(self) -> int:
        return prod(self.size[1:]) * self.dtype.itemsize


@dataclass
class Kernel:
    """A call of a kernel in csrc/cpu/."""

    step: Step
    kind: str
    input: Place
    output: Place
    fields: dict[str, int]
    residual: Place | None = None
    packed: PackedConv | None = None

    def places(self) -> list[Place]:
        return [p for p in (self.input, self.residual, self.output) if p is not None]


@dataclass
class Code:
    """A line of Python; ``reads``: the maps that it, or what it makes, looks at."""

    step: Step | None
    text: str
    reads: set[int] = field(default_factory=set)


def four(shape: torch.Size) -> tuple[int, int, int, int]:
    """[N, C, H, W], also of a matrix."""
    return (*shape, *[1] * (4 - len(shape)))
