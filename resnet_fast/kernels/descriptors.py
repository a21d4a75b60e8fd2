"""Tensor descriptors: what the copy engine of sm_90 and later (TMA) is told about a tensor, made on the host.

A descriptor says where a tensor begins, its sizes and strides, and the box that one load or store moves. The engine
computes the addresses, fills what lies outside of the tensor with zeros and leaves it alone in stores: kernels need
neither masks nor registers for addresses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..backends import triton_interpreted


@dataclass(frozen=True)
class _Place:
    """As much of a tensor as Triton's launcher asks a descriptor for: it keeps no memory alive."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


@lru_cache(maxsize=4096)
def _kept(address: int, dtype: torch.dtype, shape: tuple, strides: tuple, box: tuple) -> TensorDescriptor:
    return TensorDescriptor(_Place(address, dtype), list(shape), list(strides), list(box))


def descriptor(t: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> TensorDescriptor:
    """``t``'s memory seen as ``shape`` with ``strides``, moved in boxes of ``box``.

    Kept by address and sizes, of which it is a function: in a network that runs again and again torch hands out the
    same addresses. (Triton's checks of a new one take 3 us.)
    """
    if t.is_cuda:
        return _kept(t.data_ptr(), t.dtype, shape, strides, box)
    assert triton_interpreted() or t.is_meta
    return TensorDescriptor(t, list(shape), list(strides), list(box))
