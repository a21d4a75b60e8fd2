"""What `OptimizedModel.explain` returns: every layer with its kernel, its time and its share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from ..nn.explain import table_lines
from .plan import Layer


@dataclass(frozen=True)
class LayerRow:
    """One layer. ``size``: of its result; ``flops``: multiplications and additions of a direct convolution, so that
    Winograd's algorithm may pass the peak; ``ours``: a kernel of this package; ``reason``: why it is not fused."""

    name: str
    size: tuple[int, ...]
    kernel: str
    ours: bool
    microseconds: float
    share: float  # of the time of all
    gflops: float  # GFLOP/s
    of_peak: float  # of what this machine reaches in registers, 0 where there are no multiplications
    flops: int
    reason: str


@dataclass(frozen=True)
class LayerTable:
    """Prints as a table. ``peak``: operations a second of this machine in the model's dtype."""

    layers: tuple[LayerRow, ...]
    peak: float
    threads: int

    @property
    def own_share(self) -> float:
        """The share of the operations of convolutions and linear layers that this package's kernels compute."""
        total = sum(row.flops for row in self.layers)
        return sum(row.flops for row in self.layers if row.ours) / total if total else 0.0

    @property
    def microseconds(self) -> float:
        return sum(row.microseconds for row in self.layers)

    def __str__(self) -> str:
        rows = [
            (
                row.name, "x".join(map(str, row.size)), f"{row.microseconds:.0f}", f"{100 * row.share:.1f} %",
                f"{row.gflops:.0f}" if row.flops else "", f"{row.of_peak:.2f}" if row.flops else "",
                row.kernel + (f" ({row.reason})" if row.reason else ""),
            )
            for row in self.layers
        ]  # fmt: skip
        lines = table_lines(("layer", "result", "us", "share", "GFLOP/s", "of peak", "kernel"), rows)
        total = sum(row.flops for row in self.layers)
        rate = total / max(self.microseconds, 1e-9) / 1e3
        lines.append(
            f"{self.microseconds / 1e3:.2f} ms on {self.threads} threads, {rate:.0f} GFLOP/s of {self.peak / 1e9:.0f}; "
            f"{100 * self.own_share:.1f} % of the operations in kernels of resnet_fast"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict:
        head = {"peak_flops": self.peak, "threads": self.threads, "microseconds": self.microseconds}
        return head | {"own_share": self.own_share, "layers": [asdict(row) for row in self.layers]}

    def plot(self, path: str | Path) -> None:
        """Draws a bar of microseconds for each layer into a file of matplotlib's formats. Needs matplotlib."""
        from ..bench.plots import layers

        layers(self, Path(path))


def layer_table(layers: Sequence[Layer], times: Sequence[dict[int, float]], dtype: torch.dtype) -> LayerTable:
    """times: seconds by the number of the layer, one dictionary a call; of each layer the median counts."""
    from ..bench.limits import ceilings  # measures for a second

    seconds = [median(t.get(i, 0.0) for t in times) for i in range(len(layers))]
    total, peak = sum(seconds), ceilings("cpu").flops.get(str(dtype).removeprefix("torch."), 0.0)
    rows = []
    for layer, s in zip(layers, seconds, strict=True):
        rate = layer.flops / s if s else 0.0
        figures = (1e6 * s, s / total if total else 0.0, rate / 1e9, rate / peak if peak else 0.0, layer.flops)
        rows.append(LayerRow(layer.name, layer.size, layer.kernel, layer.ours, *figures, layer.reason))
    return LayerTable(tuple(rows), peak, torch.get_num_threads())
