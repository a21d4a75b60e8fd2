"""Where the maps of a plan lie: one block of memory, each map in it from the step that makes it to the last that reads
it."""

from __future__ import annotations

from dataclasses import dataclass

ALIGNMENT = 64  # a cache line, and a vector


@dataclass
class Map:
    """A map that lives from step ``first`` to step ``last``, both included; `place` sets ``at``, in bytes."""

    size: int
    first: int
    last: int
    at: int = -1


def place(maps: list[Map]) -> int:
    """Gives every map its place and returns the bytes that all need; maps that live at a time do not overlap.

    Greedy by size (Pisarchyk and Lee, "Efficient memory management for deep neural net inference", 2020): the largest
    first, each at the lowest place that is free for its whole life.
    """
    total = 0
    placed: list[Map] = []
    for m in sorted(maps, key=lambda m: (-m.size, m.first)):
        at = 0
        for other in sorted(placed, key=lambda other: other.at):
            if other.last < m.first or m.last < other.first:
                continue
            if at + m.size <= other.at:
                break
            at = max(at, _aligned(other.at + other.size))
        m.at = at
        placed.append(m)
        total = max(total, at + m.size)
    return _aligned(total)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
