"""What moved between two files of results, beyond the spread of its samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from .peers import OURS

# What makes times comparable at all; a difference is told, not refused.
_ENVIRONMENT = ("cpu", "cuda_devices", "threads", "isa_level", "omp_proc_bind", "torch", "triton", "commit")


@dataclass(frozen=True)
class Change:
    """A peer of one cell in both files, and how many times as long each other peer of the cell takes now.

    What the others have in common is the machine's drift, not the code's doing.
    """

    cell: str
    peer: str
    old: dict
    new: dict
    others: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Time now over time then."""
        return self.new["median_ms"] / self.old["median_ms"]

    @property
    def drift(self) -> float:
        return median(self.others) if self.others else 1.0

    @property
    def mark(self) -> str:
        """ "slower" or "faster" than all the others have become, with spans from the 20 % to the 80 % quantile that do
        not touch once the drift is taken off; else nothing."""
        if self.ratio > max(self.others, default=1.0) and self.new["p20_ms"] / self.drift > self.old["p80_ms"]:
            return "slower"
        if self.ratio < min(self.others, default=1.0) and self.new["p80_ms"] / self.drift < self.old["p20_ms"]:
            return "faster"
        return ""


def _key(cell: dict) -> tuple:
    return cell["model"], cell["batch"], cell["dtype"], cell["device"]


def _timed(cell: dict) -> dict[str, dict]:
    return {name: peer for name, peer in cell["peers"].items() if peer.get("median_ms")}


def changes(old: dict, new: dict) -> Iterator[Change]:
    """Every peer that both files have a time of, cell by cell."""
    before = {_key(cell): _timed(cell) for cell in old["cells"]}
    for cell in new["cells"]:
        then, now = before.get(_key(cell), {}), _timed(cell)
        both = [name for name in now if name in then]
        ratios = {name: now[name]["median_ms"] / then[name]["median_ms"] for name in both}
        for name in both:
            others = tuple(r for other, r in ratios.items() if other not in (name, OURS))
            title = f"{cell['model']}, batch {cell['batch']}, {cell['dtype']}"
            yield Change(title, name, then[name], now[name], others)


def differences(old: dict, new: dict) -> list[str]:
    """What differs between the two environments, one line each."""
    then, now = old["environment"], new["environment"]
    return [f"{k}: {then.get(k)} then, {now.get(k)} now" for k in _ENVIRONMENT if then.get(k) != now.get(k)]


def updated(old: dict, new: dict) -> dict:
    """``new`` with the cells that only ``old`` has, in their old order; what it has anew stands where it stood.

    Of the ceilings the higher ones stay: the machine is the same, and a slow moment measures less than it can.
    """
    fresh = {_key(cell): cell for cell in new["cells"]}
    kept = [fresh.pop(_key(cell), {"commit": old["environment"].get("commit")} | cell) for cell in old["cells"]]
    return new | {"ceilings": _highest(old["ceilings"], new["ceilings"]), "cells": [*kept, *fresh.values()]}


def _highest(old: dict, new: dict) -> dict:
    flops = {dtype: max(rate, old["flops"].get(dtype, 0)) for dtype, rate in new["flops"].items()}
    return new | {"flops": flops, "bandwidth": max(old["bandwidth"], new["bandwidth"])}


def rows(old: dict, new: dict) -> list[tuple[str, ...]]:
    """A table for a reader, headings first; only those that moved carry a mark."""
    found = [("", "then ms", "now ms", "now / then", "drift", "less drift", "")]
    for c in changes(old, new):
        figures = (f"{c.old['median_ms']:.1f}", f"{c.new['median_ms']:.1f}", f"{c.ratio:.2f}", f"{c.drift:.2f}")
        found.append((f"{c.cell}, {c.peer}", *figures, f"{c.ratio / c.drift:.2f}", c.mark))
    return found
