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
from typing import Any

import torch
from torch import Tensor

# Different uses of one weight kept side by side (a convolution shared by several BatchNorms, another stride).
_USES_PER_WEIGHT = 8


_matches = torch.ops.resnet_fast._fingerprint_matches.default


def _stamp(weight: Tensor) -> tuple:
    version = None if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.shape, weight.stride(), weight.dtype


def _use_key(vectors: list[Tensor], key: tuple) -> tuple:
    return (key, *[v.data_ptr() for v in vectors])


@dataclass
class _WeightEntry:
    alive: weakref.ref
    stamp: tuple
    uses: OrderedDict[tuple, tuple[Tensor, Any]] = field(default_factory=OrderedDict)  # key -> (fingerprint, value)


class WeightCache:
    """Values made from a weight and a few vectors, remade whenever either changes. Thread-safe."""

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
        with self._lock:
            entry = self._entries.get(id(weight))
            if entry is None or entry.stamp != _stamp(weight):
                return None
            use = entry.uses.get(_use_key(vectors, key))
        return use[1] if use is not None and _matches(use[0], weight, groups, vectors) else None

    def get(self, weight: Tensor, vectors: list[Tensor], groups: int, key: tuple, make: Callable[[], Any]) -> Any:
        """What `find` returns, or else ``make()``, kept for the next call."""
        value = self.find(weight, vectors, groups, key)
        if value is not None:
            return value
        # Stamp and fingerprint first: a write that comes while make() runs is then seen at the next call.
        stamp = _stamp(weight)
        fingerprint = torch.ops.resnet_fast._fingerprint(weight, groups, vectors)
        value = make()
        with self._lock:
            entry = self._entries.get(id(weight))
            if entry is None or entry.stamp != stamp:
                entry = self._entries[id(weight)] = _WeightEntry(self._watch(weight), stamp)
            entry.uses[_use_key(vectors, key)] = (fingerprint, value)
            if len(entry.uses) > _USES_PER_WEIGHT:
                entry.uses.popitem(last=False)
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
            return sum(len(entry.uses) for entry in self._entries.values())


packed_weights = WeightCache()
cast_weights = WeightCache()


def cached_cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight.to(dtype)`` without gradient, kept until the weight changes, so that packing it pays under autocast."""
    return cast_weights.get(weight, [], 1, (dtype,), lambda: weight.detach().to(dtype))


def clear_cache() -> None:
    """Forgets every packed weight of the operators' and modules' CPU path.

    Needed in one case only: single elements of a convolution weight were written through ``.data`` (or by another
    process sharing its memory). Optimizer steps, `load_state_dict`, replaced parameters, writes through ``.data`` that
    touch a whole tensor, filter or input channel, and any change of a BatchNorm tensor are noticed without it.
    """
    packed_weights.clear()
    cast_weights.clear()
