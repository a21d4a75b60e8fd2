"""Packed weights that never go stale.

Packing a convolution weight (folding BatchNorm into it, reordering it for the kernel) costs milliseconds, so it is done
once and kept as long as the parameter lives. What may change a parameter: optimizer steps and `load_state_dict` (these
change its version), ``weight = nn.Parameter(...)`` and ``load_state_dict(assign=True)`` (another object),
``weight.data = ...`` (another data_ptr), and in-place writes through ``.data`` or by tensors made in inference mode,
which leave no trace but their values: those are found by a fingerprint of the values (csrc/cpu/fingerprint.cpp).

The memory is bounded by ``RESNET_FAST_CACHE_BYTES`` (default: a quarter of the machine's memory, at least a gigabyte).
In float32 and for images of 224x224 the models need 1 to 4.7 times their parameters' bytes: ResNet-18 208 MiB,
ResNet-152 672 MiB, Wide ResNet-101 1.7 GiB (Winograd's weights for batches of 1 and 8).
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# Different uses of one weight kept side by side: another stride or dtype; a convolution shared by several BatchNorms.
_KEYS_PER_WEIGHT = 8
_USES_PER_KEY = 8


def _limit() -> int:
    text = os.environ.get("RESNET_FAST_CACHE_BYTES")
    if not text:
        return max(2**30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
    if not text.isdecimal():
        raise ValueError(f"RESNET_FAST_CACHE_BYTES must be a number of bytes, got {text!r}")
    return int(text)


_matches = torch.ops.resnet_fast._fingerprint_matches.default


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


class HasTensors(Protocol):
    def tensors(self) -> list[Tensor]: ...


class _Use(NamedTuple):
    addresses: tuple[int, ...]  # of the weight and the vectors
    fingerprint: Tensor
    value: HasTensors | Tensor

    def tensors(self) -> list[Tensor]:
        value = self.value
        return [self.fingerprint, *([value] if isinstance(value, Tensor) else value.tensors())]


@dataclass
class _WeightEntry:
    name: int  # id of the weight
    alive: weakref.ref
    version: int | None
    used: int  # when, by the cache's clock
    bytes: int = 0
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

    def count(self) -> None:
        tensors = (t for uses in self.uses.values() for use in uses for t in use.tensors())
        self.bytes = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


class WeightCache:
    """Values made from a weight and a few vectors, remade whenever either changes.

    Above ``limit`` bytes the least recently used weights' values are dropped; the last one used stays, whatever its
    size. Thread-safe: writers hold a lock and replace what readers, who hold none, may be looking at as a whole.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: dict[int, _WeightEntry] = {}
        self._clock = 0  # ticks when something is made, not at every use: readers only copy it
        self._new_lock()
        os.register_at_fork(after_in_child=self._new_lock)  # another thread may have held the old one

    def _new_lock(self) -> None:
        self._lock = threading.RLock()  # reentrant: a weakref callback may run while this thread holds it

    def find(self, weight: Tensor, vectors: list[Tensor], groups: int, key: tuple) -> Any | None:
        """The value made from these arguments, or None if there is none or the weight or a vector changed since.

        Args:
            weight: [K, C / groups, R, S], on the CPU.
            vectors: 1-D tensors whose every bit counts (bias, BatchNorm tensors).
            key: what else the value depends on; hashable.
        """
        entry = self._entries.get(id(weight))
        # _version, without a call: what a call costs pays for noting the use below.
        if entry is None or entry.version != (None if weight.is_inference() else weight._version):
            return None
        for _, fingerprint, value in entry.uses.get(key, ()):
            if _matches(fingerprint, weight, groups, vectors):
                entry.used = self._clock
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
                entry = _WeightEntry(id(weight), self._watch(weight), version, self._clock)
                self._entries[id(weight)] = entry
            entry.add(key, _Use(addresses, fingerprint, value))
            self.bound(weight)
        return value

    def bound(self, weight: Tensor) -> None:
        """To be called when a value of ``weight`` has grown: counts its bytes anew, drops others' above the limit."""
        with self._lock:
            entry = self._entries.get(id(weight))
            if entry is None:
                return
            entry.count()
            self._clock += 1
            entry.used = self._clock
            surplus = self.bytes - self.limit
            if surplus <= 0:
                return
            for other in sorted(self._all(), key=lambda e: e.used)[:-1]:
                self._entries.pop(other.name, None)  # it may be gone, with a cast weight that was dropped before
                surplus -= other.bytes
                if surplus <= 0:
                    break

    def _all(self) -> list[_WeightEntry]:
        return list(self._entries.values())  # a copy: garbage collection may forget a weight at any time

    @property
    def bytes(self) -> int:
        """Of the values and their fingerprints; tensors that a weight's values share count once."""
        with self._lock:
            return sum(entry.bytes for entry in self._all())

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
            return sum(len(uses) for entry in self._all() for uses in entry.uses.values())


packed_weights = WeightCache(_limit())


def cached_cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight.to(dtype)`` without gradient, kept until the weight changes, so that packing it pays under autocast."""
    return packed_weights.get(weight, [], 1, (dtype,), lambda: weight.detach().to(dtype))


class CacheInfo(NamedTuple):
    """Bytes that resnet_fast keeps for later calls on the CPU."""

    weights: int  # packed weights
    limit: int  # of packed weights: RESNET_FAST_CACHE_BYTES
    idle_maps: int  # memory of feature maps that nobody holds any more

    def __str__(self) -> str:
        weights, limit, idle = (f"{n / 2**20:.1f} MiB" for n in self)
        return f"packed weights {weights} (at most {limit}), idle feature maps {idle}"


def cache_info() -> CacheInfo:
    """The memory that `clear_cache` would free, and the bound of the packed weights."""
    return CacheInfo(packed_weights.bytes, packed_weights.limit, torch.ops.resnet_fast._map_pool_bytes())


def clear_cache() -> None:
    """Forgets every packed weight of the operators' and modules' CPU path, and gives the idle memory of feature maps
    back to the system.

    The former is needed in one case only: single elements of a convolution weight were written through ``.data`` (or
    by another process sharing its memory). Optimizer steps, `load_state_dict`, replaced parameters, writes through
    ``.data`` that touch a whole tensor, filter or input channel, and any change of a BatchNorm tensor are noticed
    without it.
    """
    packed_weights.clear()
    torch.ops.resnet_fast._clear_map_pool()
