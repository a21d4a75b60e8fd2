"""Plots of results, as SVG that is the same for the same results. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import cpu_layers, limits
from .peers import OURS
from .results import per_second, short_reason

_OURS, _OTHERS, _GREY = "#d1495b", "#8d99ae", "#555555"
_KINDS = {"1x1": "#00798c", "3x3": "#edae49", "7x7": "#66a182"}


def load_pyplot() -> Any:
    """matplotlib.pyplot for files, with the fonts and colours of this project's plots.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "resnet_fast", "svg.fonttype": "none", "font.size": 9,
                            "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> None:
    """Writes a figure in the format that the ending of ``path`` names, and closes it."""
    svg = path.suffix == ".svg"
    figure.savefig(path, metadata={"Date": None} if svg else None, bbox_inches="tight", dpi=150)
    load_pyplot().close(figure)
    if not svg:
        return
    # matplotlib ends lines with spaces, which every whitespace check complains of.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def layers(found: Any, path: Path) -> None:
    """Bars of microseconds for every layer of a `LayerTable`; grey ones run on torch."""
    pyplot, rows = load_pyplot(), found.layers
    figure, axis = pyplot.subplots(figsize=(7.5, 1.0 + 0.17 * len(rows)))
    positions = range(len(rows))[::-1]
    axis.barh(positions, [row.microseconds for row in rows], color=[_OURS if row.ours else _OTHERS for row in rows])
    for y, row in zip(positions, rows, strict=True):
        peak = f", {row.of_peak:.2f} of peak" if row.flops else ""
        axis.text(row.microseconds, y, f" {row.kernel}{peak}", va="center", fontsize=6, color=_GREY)
    axis.set_yticks(positions, [row.name for row in rows], fontsize=7)
    axis.set_ylim(-0.7, len(rows) - 0.3)
    axis.set_xlim(0, 1.6 * max(row.microseconds for row in rows))
    axis.set_xlabel("microseconds")
    axis.set_title(f"{found.microseconds / 1e3:.2f} ms on {found.threads} threads", fontsize=9)
    save(figure, path)


def peers(found: dict, path: Path) -> None:
    """Bars of images a second for every peer, with the span of 20 to 80 % of its samples; one panel a cell."""
    pyplot, cells = load_pyplot(), found["cells"]
    columns = min(len(cells), 2)
    lines = -(-len(cells) // columns)
    most = max(len(cell["peers"]) for cell in cells)
    figure, axes = pyplot.subplots(lines, columns, figsize=(4.6 * columns, (0.8 + 0.24 * most) * lines), squeeze=False)
    for axis in axes.flat[len(cells) :]:
        axis.set_visible(False)
    for axis, cell in zip(axes.flat, cells, strict=False):
        names = list(cell["peers"])[::-1]
        for y, name in enumerate(names):
            peer, color = cell["peers"][name], _OURS if name.startswith(OURS) else _OTHERS
            if not peer.get("median_ms"):
                axis.text(0, y, " " + short_reason(peer), va="center", color=_GREY, fontsize=7)
                continue
            rate = 1e3 * cell["batch"] / peer["median_ms"]
            span = [1e3 * cell["batch"] / peer[key] for key in ("p80_ms", "p20_ms") if key in peer]
            error = [[max(0.0, rate - span[0])], [max(0.0, span[1] - rate)]] if span else None
            axis.barh(y, rate, color=color, xerr=error, error_kw={"elinewidth": 1, "ecolor": "#222222"})
            label = f" {rate:,.3g}" if rate < 1000 else f" {rate:,.0f}"
            axis.text(max([rate, *span]), y, label, va="center", fontsize=7)
        axis.set_yticks(range(len(names)), names)
        axis.set_title(f"{cell['model']}, {cell['dtype']}, batch {cell['batch']}", fontsize=9)
        axis.set_xlabel("images / s")
        axis.margins(x=0.15)
    figure.suptitle(found["device"], fontsize=11)
    figure.tight_layout()
    save(figure, path)


def model_ratios(device: str, found: Sequence[tuple[dict, tuple[float, str] | None]], path: Path) -> None:
    """Bars of the fastest other's time over ours for every model; one panel a dtype and batch.

    found: cells, each with that ratio and the other's name, or None.
    """
    pyplot = load_pyplot()
    panels = list(dict.fromkeys((cell["dtype"], cell["batch"]) for cell, _ in found))
    names = list(dict.fromkeys(cell["model"] for cell, _ in found))[::-1]
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    size = (2.9 * columns + 1.2, (0.24 * len(names) + 0.9) * lines)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, sharex=True, sharey=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for cell, ratio in found:
            if (cell["dtype"], cell["batch"]) != panel or ratio is None:
                continue
            y = names.index(cell["model"])
            axis.barh(y, ratio[0], color=_OURS if ratio[0] >= 1 else _OTHERS)
            axis.text(ratio[0], y, f" {ratio[0]:.2f} {ratio[1]}", va="center", fontsize=6, color=_GREY)
        axis.axvline(1, color=_GREY, linewidth=0.8)
        axis.set_title(f"{panel[0]}, batch {panel[1]}", fontsize=8)
        axis.set_xlabel("fastest other's time / ours", fontsize=8)
        axis.margins(x=0.35)
    axes[0][0].set_yticks(range(len(names)), names, fontsize=7)
    figure.suptitle(device, fontsize=10)
    figure.tight_layout()
    save(figure, path)


def _kind(row: dict) -> str:
    return row["name"].split()[0]


def roofline(rows: Sequence[dict], ceilings: dict, path: Path) -> None:
    """Every measured layer at its operations a byte and its GFLOP/s, under the machine's two ceilings.

    rows: of the step "kernels", all with operations (add_relu has next to none). Filled: ours; hollow: torch's.
    """
    pyplot = load_pyplot()
    figure, axis = pyplot.subplots(figsize=(7.5, 4.8))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    xs = [row["flops"] / row["bytes"] for row in rows]
    left, right = min(xs) / 2, max(xs) * 2
    for dtype in dict.fromkeys(dtypes):
        peak, bandwidth = ceilings["flops"][dtype], ceilings["bandwidth"]
        knee = peak / bandwidth
        line = [left, min(max(knee, left), right), right]
        axis.plot(line, [min(peak, x * bandwidth) / 1e9 for x in line], color=_GREY, linewidth=1.2)
        axis.text(right, peak / 1e9, " " + per_second(peak, "FLOP"), va="center", fontsize=8, color=_GREY)
        axis.text(left, left * bandwidth / 1e9, per_second(bandwidth, "B") + " ", ha="right", fontsize=8, color=_GREY)
    for kind, color in _KINDS.items():
        of_kind = [row for row in rows if _kind(row) == kind]
        for way, style in (("torch", {"facecolors": "none"}), ("ours", {"facecolors": color})):
            points = [(r["flops"] / r["bytes"], r["flops"] / r["ms"][way] / 1e6) for r in of_kind if way in r["ms"]]
            if points:
                label = f"{kind}, {way}"
                axis.scatter(*zip(*points, strict=True), s=22, edgecolors=color, linewidths=0.9, label=label, **style)
    axis.set(xscale="log", yscale="log", xlabel="direct-convolution FLOP per least byte", ylabel="GFLOP/s")
    axis.set_title(
        f"Fused layers, {', '.join(dtypes)}, batch {', '.join(map(str, sorted({r['batch'] for r in rows})))}"
    )
    axis.legend(fontsize=7, loc="lower right")
    save(figure, path)


def layer_ratios(found: dict, path: Path) -> None:
    """Bars of oneDNN's time over ours for every layer, from minima, and points from medians; one panel a level, dtype
    and batch."""
    pyplot, groups = load_pyplot(), cpu_layers.groups([cell for cell in found["cells"] if "refused" not in cell])
    names = list(dict.fromkeys(cell["layer"] for cells in groups.values() for cell in cells))[::-1]
    size = (2.6 * len(groups) + 2, 0.17 * len(names) + 1.2)
    figure, axes = pyplot.subplots(1, max(len(groups), 1), figsize=size, squeeze=False, sharey=True)
    for axis, (title, cells) in zip(axes.flat, groups.items(), strict=False):
        ys = [names.index(cell["layer"]) for cell in cells]
        colors = [_OTHERS if cpu_layers.is_slower(cell) else _OURS for cell in cells]
        axis.barh(ys, [cell["ratio"] for cell in cells], color=colors)
        axis.plot([cell["ratio_median"] for cell in cells], ys, ".", color="#222222", markersize=3)
        axis.axvline(1, color=_GREY, linewidth=0.8)
        axis.set_title(title, fontsize=8)
        axis.set_xlabel("oneDNN's time / ours", fontsize=8)
    axes[0][0].set_yticks(range(len(names)), names, fontsize=7)
    figure.suptitle(f"{found['device']}{', cold weights' if found['cold'] else ''}", fontsize=10)
    figure.tight_layout()
    save(figure, path)


def traffic(models: Sequence[str], path: Path) -> None:
    """Megabytes of 16-bit feature maps and weights an image (batch 256) for every traffic pattern: arithmetic alone."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(2, len(models), figsize=(3.6 * len(models), 4.6), squeeze=False)
    for column, model in enumerate(models):
        for line, (make, patterns, title) in enumerate((
            (limits.inference, limits.INFERENCE, "inference"), (limits.training, limits.TRAINING, "training"),
        )):  # fmt: skip
            axis = axes[line][column]
            for y, pattern in enumerate(patterns[::-1]):
                megabytes = sum(k.total_bytes(256, 2) for k in make(model, pattern)) / 256e6
                axis.barh(y, megabytes, color=_OURS if (title, pattern) == ("inference", "epilogue") else _OTHERS)
                axis.text(megabytes, y, f" {megabytes:.1f}", va="center", fontsize=8)
            axis.set_yticks(range(len(patterns)), patterns[::-1])
            axis.set_title(f"{model}, {title}", fontsize=9)
            axis.set_xlabel("MB / image")
            axis.margins(x=0.15)
    figure.tight_layout()
    save(figure, path)
