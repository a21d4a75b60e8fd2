"""Packed weights that never go stale.

Packing a convolution weight (folding BatchNorm into it, reordering it for the kernel) costs milliseconds, so it is done
once and kept as long as the parameter lives. What may change a parameter: optimizer steps and `load_state_dict` (these
change its version), ``weight = nn.Parameter(...)`` and ``load_state_dict(assign=True)`` (another object),
``weight.data = ...`` (another data_ptr), and in-place writes through ``.data`` or by tensors made in inference mode,
which leave no trace but their values: those are found by a fingerprint of the values (csrc/cpu/fingerprint.cpp).
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Different uses of one weight kept side by side: another stride or dtype; a convolution shared by several BatchNorms.
_KEYS_PER_WEIGHT = 8
_USES_PER_KEY = 8

_matches = torch.ops.resnet_fast._fingerprint_matches.default


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


class _Use(NamedTuple):
    addresses: tuple[int, ...]  # of the weight and the vectors
    fingerprint: Tensor
    value: Any


@dataclass
class _WeightEntry:
    alive: weakref.ref
    version: int | None
    uses: OrderedDict[tuple, tuple[_Use, ...]] = field(default_factory=OrderedDict)  # by key; see WeightCache

    def add(self, key: tuple, new: _Use) -> None:
        # What lay at the same addresses, or belongs to a weight that moved, is stale.
        kept = [
            use
            for use in self.uses.get(key, ())
            if use.addresses != new.addresses and use.addresses[0] == new.addresses[0]
        ]
        self.uses[key] = (*kept[1 - _USES_PER_KEY :], new)
        if len(self.uses) > _KEYS_PER_WEIGHT:
            self.uses.popitem(last=False)


class WeightCache:
    """Values made from a weight and a few vectors, remade whenever either changes.

    Thread-safe: writers hold a lock and replace what readers, who hold none, may be looking at as a whole.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _WeightEntry] = {}
        self._lock = threading.RLock()  # reentrant: a weakref callback may run while this thread holds it

    def find(self, weight: Tensor, vectors: list[Tensor], groups: int, key: tuple) -> Any | None:
        """The value made from these arguments, or None if there is none or the weight or a vector changed since.

        Args:
            weight: [K, C / groups, R, S], on the CPU.
            vectors: 1-D tensors whose every bit counts (bias, BatchNorm tensors).
            key: what else the value depends on; hashable.
        """
        entry = self._entries.get(id(weight))
        if entry is None or entry.version != _version(weight):
            return None
        for _, fingerprint, value in entry.uses.get(key, ()):
            if _matches(fingerprint, weight, groups, vectors):
                return value
        return None

    def get(self, weight: Tensor, vectors: list[Tensor], groups: int, key: tuple, make: Callable[[], Any]) -> Any:
        """What `find` returns, or else ``make()``, kept for the next call."""
        value = self.find(weight, vectors, groups, key)
        if value is not None:
            return value
        # Version and fingerprint first: a write that comes while make() runs is then seen at the next call.
        version = _version(weight)
        fingerprint = torch.ops.resnet_fast._fingerprint(weight, groups, vectors)
        addresses = (weight.data_ptr(), *(v.data_ptr() for v in vectors))
        value = make()
        with self._lock:
            entry = self._entries.get(id(weight))
            if entry is None or entry.version != version:
                entry = self._entries[id(weight)] = _WeightEntry(self._watch(weight), version)
            entry.add(key, _Use(addresses, fingerprint, value))
        return value

    def _watch(self, weight: Tensor) -> weakref.ref:
        name = id(weight)

        def forget(dead: weakref.ref) -> None:
            with self._lock:
                entry = self._entries.get(name)
                if entry is not None and entry.alive is dead:
                    del self._entries[name]

        return weakref.ref(weight, forget)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        with self._lock:
            return sum(len(uses) for entry in self._entries.values() for uses in entry.uses.values())


packed_weights = WeightCache()
cast_weights = WeightCache()


def cached_cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight.to(dtype)`` without gradient, kept until the weight changes, so that packing it pays under autocast."""
    return cast_weights.get(weight, [], 1, (dtype,), lambda: weight.detach().to(dtype))


def clear_cache() -> None:
    """Forgets every packed weight of the operators' and modules' CPU path, and gives the idle memory of feature maps
    back to the system.

    The former is needed in one case only: single elements of a convolution weight were written through ``.data`` (or
    by another process sharing its memory). Optimizer steps, `load_state_dict`, replaced parameters, writes through
    ``.data`` that touch a whole tensor, filter or input channel, and any change of a BatchNorm tensor are noticed
    without it.
    """
    packed_weights.clear()
    cast_weights.clear()
    torch.ops.resnet_fast._clear_map_pool()
