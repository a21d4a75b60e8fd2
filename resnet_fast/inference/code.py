"""What the generated code of a plan is written with: arguments as text, and copies with given strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten


def fresh(t: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """A copy with these strides; where elements would share memory, without holes in it."""
    if any(n > 1 and s == 0 for n, s in zip(shape, strides, strict=True)):
        return t.reshape(shape).clone()
    return torch.empty_strided(shape, strides, dtype=t.dtype).copy_(t.reshape(shape))


def like(t: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """``t`` itself if it has these strides, else a copy that has."""
    return t if t.stride() == strides else fresh(t, shape, strides)


# A map in channels_last has no view as one dimension.
SAFE_FOR_ANY_STRIDES = {
    _aten.view.default: _aten.reshape.default,
    _aten._unsafe_view.default: _aten.reshape.default,
}
NEEDS_CONTIGUOUS = {_aten.as_strided.default}


def literal(value: Any, text: Callable[[fx.Node], str]) -> str:
    """An argument of an operator as source text; ``text``: that of a node."""
    if isinstance(value, fx.Node):
        return text(value)
    if isinstance(value, (list, tuple)):
        inner = ", ".join(literal(v, text) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)"
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return f"__import__('torch').{str(value).removeprefix('torch.')}"
    if isinstance(value, torch.device):
        return repr(str(value))
    if isinstance(value, float) and not torch.tensor(value).isfinite():
        return f"float('{value}')"
    return repr(value)
