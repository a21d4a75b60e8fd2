"""Files of results and tables for a reader."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns under their headings, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]) for r in rows)
    return "\n".join(line.rstrip() for line in lines)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join(["---", *["---:"] * (len(rows[0]) - 1)]) + " |", *lines[1:]])


def per_second(value: float, unit: str) -> str:
    """A rate in the prefix that fits: 8.04e14, "FLOP" gives "804 TFLOP/s"."""
    prefix, scale = ("T", 1e12) if value >= 1e12 else ("G", 1e9)
    return f"{value / scale:,.3g} {prefix}{unit}/s"


def short_reason(peer: dict) -> str:
    """Why a peer has no time, for a cell of a table: "absent", "wrong output" or "does not run here"."""
    return (peer.get("refused") or "not timed").split(":")[0].split(" (")[0]


def to_json(value: Any) -> str:
    """With five significant digits, which is more than any measurement here has."""
    return json.dumps(json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.5g}")))


def write_json(path: str | os.PathLike | None, value: dict) -> None:
    """Writes a file of results, a line for each fact, cell and peer, so that its changes can be read; None: nowhere."""
    if path is None:
        return
    cells = []
    for cell in value["cells"]:
        facts = to_json({key: item for key, item in cell.items() if key != "peers"})
        peers = ",\n".join(f"   {json.dumps(name)}: {to_json(peer)}" for name, peer in cell["peers"].items())
        cells.append(f'  {facts[:-1]}, "peers": {{\n{peers}}}}}')
    head = [f" {json.dumps(key)}: {to_json(item)}," for key, item in value.items() if key != "cells"]
    with open(path, "w") as file:
        file.write("\n".join(["{", *head, ' "cells": [', ",\n".join(cells), " ]", "}"]) + "\n")
