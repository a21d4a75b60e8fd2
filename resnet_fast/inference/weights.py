"""The folded and packed weights of a model, each made once and shared by the plans of all input shapes."""

from __future__ import annotations

import ctypes
import hashlib
from typing import NamedTuple

import torch
from torch import Tensor, fx

from ..choose import ConvKernel
from ..kernels.packing import Geometry, pack_for_onednn, pack_weight
from .capture import Captured
from .fuse import Affine, Conv

# Floats behind a bias that kernels may read: those of a panel of filters, at every level.
_BEHIND_BIAS = 64


class PackedConv(NamedTuple):
    weight: Tensor  # as the kernel wants it
    bias: Tensor  # [K + what the kernels may read behind it], float32, or [K] in oneDNN's dtype


def fold(weight: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
    """weight [K, ...] and bias [K], float32, of the convolution with ``affine`` behind it."""
    scale = affine.scale.float().view(-1, *[1] * (weight.dim() - 1))
    return weight.float() * scale, affine.shift.float()


def is_usable(weight: Tensor, affine: Affine) -> bool:
    """Whether folding keeps which results are finite."""
    folded, bias = fold(weight, affine)
    return bool(folded.isfinite().all() and bias.isfinite().all())


def source(node: fx.Node, captured: Captured) -> str:
    """What stays the same from one capture to the next and changes with the values."""
    if node in captured.names:
        return captured.names[node]
    return _digest(captured.constants[node]).hex()


class Weights:
    """``find(...)`` packs what it has not met; ``keep_only`` drops what no plan uses any more."""

    def __init__(self) -> None:
        self._packed: dict[tuple, PackedConv] = {}

    def find(
        self, conv: Conv, captured: Captured, kernel: ConvKernel, input_size: list[int], dtype: torch.dtype
    ) -> tuple[tuple, PackedConv]:
        """Key and value; ``dtype`` is the one that oneDNN would compute in."""
        key = self._key(conv, captured, kernel)
        if kernel.name == "onednn":
            key += (tuple(input_size), dtype)
        if key not in self._packed:
            self._packed[key] = self._pack(conv, captured, kernel, input_size, dtype)
        return key, self._packed[key]

    def has(self, conv: Conv, captured: Captured, kernel: ConvKernel) -> bool:
        """Whether one of our kernels' weight is here already."""
        return self._key(conv, captured, kernel) in self._packed

    @staticmethod
    def _key(conv: Conv, captured: Captured, kernel: ConvKernel) -> tuple:
        scale, shift = (_digest(v) for v in (conv.affine.scale, conv.affine.shift))
        return (kernel, source(conv.weight, captured), scale, shift, conv.kernel, repr(_geometry(conv)))

    def _pack(self, conv, captured, kernel, input_size, dtype) -> PackedConv:
        geometry = _geometry(conv)
        folded, bias = fold(captured.constants[conv.weight], conv.affine)
        folded = folded.reshape(folded.shape[0], -1, *conv.kernel)
        if kernel.name == "onednn":
            return PackedConv(pack_for_onednn(folded.to(dtype), geometry, input_size), bias.to(dtype))
        padded = torch.zeros(len(bias) + _BEHIND_BIAS, dtype=torch.float32)
        padded[: len(bias)] = bias
        return PackedConv(pack_weight(folded.contiguous(), kernel, geometry), padded)

    def keep_only(self, keys: set[tuple]) -> None:
        self._packed = {key: value for key, value in self._packed.items() if key in keys}

    def bytes(self) -> int:
        return sum(_bytes(t) for packed in self._packed.values() for t in packed)

    def winograd_bytes(self) -> int:
        """Of the transformed weights alone."""
        return sum(_bytes(packed.weight) for key, packed in self._packed.items() if key[0].is_winograd)


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _geometry(conv: Conv) -> Geometry:
    return Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)


def _digest(t: Tensor) -> bytes:
    t = t.contiguous()
    return hashlib.blake2b(ctypes.string_at(t.data_ptr(), _bytes(t)), digest_size=16).digest()  # needs no numpy
