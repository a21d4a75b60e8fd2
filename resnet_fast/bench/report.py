"""Reports from files of results alone: a page and plots for each device, and the README's section of numbers.

A folder of results is named after its device and holds, as far as they were measured,

peers.json       ``resnet-fast bench --peers --json``: whole models beside their peers
blocks.json      ``pytest benchmarks --benchmark-json``: blocks and operators
cpu_layers.json  ``benchmarks/cpu_layers.py --json``: single layers beside oneDNN, at every instruction-set level
training.json    ``resnet-fast bench --train --json``: training steps side by side
campaign.jsonl   ``benchmarks/gpu_campaign.py``: single layers, training and the rest, a row a line
NOTES.md         what a reader must know of these figures, by hand
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from . import cpu_layers, plots
from .peers import OURS
from .results import markdown, per_second, short_reason

BEGIN, END = "<!-- numbers: made by `resnet-fast report` -->", "<!-- end of numbers -->"
TRAFFIC_OF = ("resnet18", "resnet50")
WORST = 10
# Of many cells, those that the README shows in full.
_HEADLINE_MODELS, _HEADLINE_BATCHES, _MANY = ("resnet18", "resnet50"), (1, 8), 12
_LONGEST = 80  # characters of a reason
TILES = (
    "The fastest candidate for each entry of kernels/configs.py, over the models' convolutions that take it; for CUDA "
    "C++ the fastest tile of each class of layers."
)
RATIOS = "Every model: the fastest other's time over ours (which one that is); below 1 it is faster."
BLOCKS = (
    "Blocks and operators, each row by itself (`pytest benchmarks`): milliseconds of ours (time of torch / of torch "
    "channels_last over ours; below 1 torch is faster)."
)


class Folder:
    """One device's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.peers: dict = json.loads(self._read("peers.json") or "{}")
        self.blocks: list[dict] = json.loads(self._read("blocks.json") or '{"benchmarks": []}')["benchmarks"]
        self.cpu_layers: dict = json.loads(self._read("cpu_layers.json") or '{"cells": []}')
        self.training: dict = json.loads(self._read("training.json") or '{"cells": []}')
        rows = [json.loads(line) for line in self._read("campaign.jsonl").splitlines()]
        self.rows = [row for row in rows if "error_message" not in row]
        self.training["cells"] += training_cells(self.step("train"))
        self.failures = [row for row in rows if "error_message" in row]

    def _read(self, name: str) -> str:
        file = self.path / name
        return file.read_text() if file.exists() else ""

    def step(self, name: str) -> list[dict]:
        return [row for row in self.rows if row["step"] == name]

    @property
    def kernels(self) -> list[dict]:
        return [row for row in self.step("kernels") if "ms" in row]

    @property
    def farthest(self) -> list[dict]:
        """Layers and add_relu, the farthest from their bound first."""
        return sorted((r for r in self.kernels if "fraction_of_bound" in r), key=lambda r: r["fraction_of_bound"])

    @property
    def environment(self) -> dict:
        found = [row for row in self.step("doctor") if row["name"] == "environment"]
        files = (self.peers, self.cpu_layers, self.training)
        measured = next((f["environment"] for f in files if f.get("environment")), None)
        return measured or (found[0] if found else {})

    @property
    def ceilings(self) -> dict:
        found = [row for row in self.step("doctor") if row["name"] == "ceilings"]
        return self.peers.get("ceilings") or (found[0] if found else {})

    @property
    def device(self) -> str:
        measured = next((f["device"] for f in (self.peers, self.cpu_layers, self.training) if f.get("device")), None)
        return measured or ", ".join(self.environment.get("cuda_devices") or []) or self.path.name

    @property
    def title(self) -> str:
        """The device and, of a CPU, how many threads it had."""
        threads = None if self.environment.get("cuda_devices") else self.environment.get("threads")
        return f"{self.device}, {threads} thread{'s' * (threads > 1)}" if threads else self.device


# Tables


def _time_of(peer: dict, best: bool) -> str:
    if not peer.get("median_ms"):
        return short_reason(peer)
    ms = peer["median_ms"]
    text = f"{ms:.3g}" if ms < 100 else f"{ms:,.0f}"
    over = f" ({peer['time_over_ours']:.2f})" if peer.get("time_over_ours") else ""
    note = " *" if peer.get("note") else ""
    return f"**{text}{over}**{note}" if best else f"{text}{over}{note}"


def peers_table(cells: Sequence[dict]) -> str:
    """A line a cell, a column a peer: median milliseconds (time over ours), the fastest bold; * has a note."""
    fullest = max(cells, key=lambda cell: len(cell["peers"]), default={"peers": {}})  # has all in their order
    names = list(dict.fromkeys(name for cell in (fullest, *cells) for name in cell["peers"]))
    rows = [("", *names, "ours: images/s", "of bound")]
    for cell in cells:
        timed = {name: peer["median_ms"] for name, peer in cell["peers"].items() if peer.get("median_ms")}
        fastest = min(timed, key=timed.__getitem__, default=None)
        ours = cell["peers"].get(OURS, {})
        figures = [_time_of(cell["peers"][name], name == fastest) if name in cell["peers"] else "" for name in names]
        rate = f"{ours['images_per_s']:,.4g}" if ours.get("images_per_s") and ours["images_per_s"] < 1000 else ""
        rate = rate or (f"{ours['images_per_s']:,.0f}" if ours.get("images_per_s") else "")
        bound = f"{ours['fraction_of_bound']:.2g}" if ours.get("fraction_of_bound") else ""
        rows.append((f"{cell['model']}, {cell['dtype']}, batch {cell['batch']}", *figures, rate, bound))
    return markdown(rows)


TRAINING = (
    "Training steps (forward, cross entropy, backward, SGD with momentum; 16 bits under autocast): median milliseconds "
    "(time over ours), the megabytes of feature maps an image that wait for the backward pass (of torch's), and the "
    "largest batch that a GPU's memory has room for, by the peaks of two."
)


def training_cells(rows: Sequence[dict]) -> list[dict]:
    """A campaign's rows of training steps as the cells of training.json."""
    cells: dict[str, dict] = {}
    for row in rows:
        model, batch, dtype, way = row["name"].split(", ", 3)
        key = f"{model}, {batch}, {dtype}"
        head = {"model": model, "batch": int(batch.removeprefix("batch ")), "dtype": dtype}
        cell = cells.setdefault(key, head | {"train": True, "peers": {}})
        kept = 1e6 * row["kept_mb_per_image"] if "kept_mb_per_image" in row else None
        facts = {"median_ms": row["ms"], "images_per_s": row["img_s"], "kept_bytes_per_image": kept}
        cell["peers"][way] = facts | {"largest_batch": row.get("largest_batch")}
    for cell in cells.values():
        ours = cell["peers"].get(OURS)
        for way in cell["peers"].values() if ours else ():
            way["time_over_ours"] = way["median_ms"] / ours["median_ms"]
    return list(cells.values())


def training_table(cells: Sequence[dict]) -> str:
    """A line a cell, a column a way: time (over ours), memory (of torch's in channels_last)."""
    names = list(dict.fromkeys(name for cell in cells for name in cell["peers"]))
    rows = [("", *names)]
    for cell in cells:
        ways = cell["peers"]
        fastest = min((w["median_ms"] for w in ways.values() if w.get("median_ms")), default=None)
        torchs = ways.get("torch channels_last", {}).get("kept_bytes_per_image")

        def text(way: dict, fastest: float | None = fastest, torchs: float | None = torchs) -> str:
            found = _time_of(way, way.get("median_ms") == fastest)
            kept = way.get("kept_bytes_per_image")
            share = f" ({kept / torchs:.2f})" if kept and torchs else ""
            largest = f", at most {way['largest_batch']:,} images" if way.get("largest_batch") else ""
            return found + (f", {kept / 1e6:.1f} MB{share}" if kept else "") + largest

        title = f"{cell['model']}, {cell['dtype']}, batch {cell['batch']}"
        rows.append((title, *(text(ways[name]) if name in ways else "" for name in names)))
    return markdown(rows)


def headline(cells: Sequence[dict]) -> list[dict]:
    """What of many cells stands for all."""
    kept = [c for c in cells if c["model"] in _HEADLINE_MODELS and c["batch"] in _HEADLINE_BATCHES]
    return kept if kept and len(cells) > _MANY else list(cells)


def over_ours(cell: dict) -> tuple[float, str] | None:
    """The fastest other's time over ours, and its name; None where nothing else was timed."""
    found = [(p["time_over_ours"], name) for name, p in cell["peers"].items()
             if not name.startswith(OURS) and p.get("time_over_ours")]  # fmt: skip
    return min(found, default=None)


def ratios_table(cells: Sequence[dict]) -> str:
    """A line a model, a column a dtype and batch: the fastest other's time over ours, and which one that is."""
    columns = list(dict.fromkeys((cell["dtype"], cell["batch"]) for cell in cells))
    at = {(cell["model"], cell["dtype"], cell["batch"]): over_ours(cell) for cell in cells}
    rows = [("", *(f"{dtype}, batch {batch}" for dtype, batch in columns))]
    for model in dict.fromkeys(cell["model"] for cell in cells):
        found = [at.get((model, *column)) for column in columns]
        rows.append((model, *(f"{ratio[0]:.2f} ({ratio[1]})" if ratio else "" for ratio in found)))
    return markdown(rows)


def _ratios(cells: Sequence[dict]) -> list[str]:
    return [RATIOS, ratios_table(cells)] if headline(cells) != list(cells) else []


def _notes(cells: Sequence[dict]) -> list[str]:
    """What the stars and empty places of the table mean; of a long reason, the beginning."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        for name, peer in cell["peers"].items():
            if text := peer.get("note") or peer.get("refused"):
                short = text if len(text) <= _LONGEST else text[:_LONGEST] + "...)"
                found.setdefault(f"{name}: {short}", []).append(f"{cell['dtype']}, batch {cell['batch']}")
    return [f"- {text} ({'; '.join(dict.fromkeys(where))})" for text, where in found.items()]


def summary(cells: Sequence[dict]) -> str:
    """One sentence: how the fastest of ours stands against the fastest of the others, per dtype."""
    parts = []
    for dtype in dict.fromkeys(cell["dtype"] for cell in cells):
        ratios = []
        for cell in (cell for cell in cells if cell["dtype"] == dtype):
            ours = [p.get("time_over_ours") for name, p in cell["peers"].items() if name.startswith(OURS)]
            fastest = over_ours(cell)
            if any(ours) and fastest:
                ratios.append(fastest[0] / min(filter(None, ours)))
        if ratios:
            span = f"{min(ratios):.2f}" + (f" to {max(ratios):.2f}" if len(ratios) > 1 else "")
            parts.append(f"{span} times as fast as the fastest of the others in {dtype}")
    return f"{OURS} is {', '.join(parts)}." if parts else ""


def costs_table(cells: Sequence[dict]) -> str:
    """What a peer costs beside its time: error, seconds until the first output, memory; the medians over the cells."""
    rows = [("", "error, float32", "error, 16 bits", "s until ready", "peak MB running", "peak MB ever", "device MB")]
    for name in dict.fromkeys(name for cell in cells for name in cell["peers"]):
        found = [(cell, cell["peers"][name]) for cell in cells if cell["peers"].get(name, {}).get("median_ms")]

        def middle(values: Iterable[float | None], text: str) -> str:
            kept = [value for value in values if value is not None]
            return format(median(kept), text) if kept else ""

        wide = [p["relative_rms"] for c, p in found if c["dtype"] == "float32"]
        narrow = [p["relative_rms"] for c, p in found if c["dtype"] != "float32"]
        ready = [(p.get("prepare_s") or 0) + p["first_call_s"] for _, p in found if p.get("first_call_s") is not None]
        memory = [[p.get(key) for _, p in found] for key in ("running_rss_mb", "peak_rss_mb", "device_mb")]
        rows.append((name, middle(wide, ".1e"), middle(narrow, ".1e"), middle(ready, ".1f"),
                     *(middle(values, ",.0f") for values in memory)))  # fmt: skip
    kept = [i for i in range(len(rows[0])) if i == 0 or any(row[i] for row in rows[1:])]
    return markdown([[row[i] for i in kept] for row in rows])


def kernels_table(rows: Sequence[dict]) -> str:
    """A line a row of the step "kernels", in the given order."""
    ways = list(dict.fromkeys(way for row in rows for way in row["ms"]))
    lines = [("", "of bound", "bound", *(f"{way}, ms" for way in ways), "GFLOP/s", "GB/s")]
    for row in rows:
        times = [f"{row['ms'][way]:.3g}" if way in row["ms"] else "" for way in ways]
        rates = (f"{row['gflops']:,.0f}", f"{row['gb_s']:,.0f}")
        lines.append((row["name"], f"{row['fraction_of_bound']:.2f}", row["bound"], *times, *rates))
    return markdown(lines)


def tiles_table(rows: Sequence[dict]) -> str:
    """A line an entry of kernels/configs.py, from the rows of the step "tune" that are about all of its subjects."""
    lines = [("", "entry", "ms", "as it is now, ms")]
    for row in rows:
        now = f"{row['ms']['now']:.4g}" if "now" in row["ms"] else "not timed"
        lines.append((row["name"], f"`{row['entry']}`", f"{row['ms']['best']:.4g}", now))
    return markdown(lines)


def blocks_table(benchmarks: Sequence[dict]) -> str:
    """A line a block and pass, a column a batch: milliseconds of ours (torch / torch channels_last over ours)."""
    found: dict[tuple, dict[int, dict[str, float]]] = {}
    for item in benchmarks:
        facts = item["extra_info"]
        batches = found.setdefault((facts["subject"], facts["pass"], facts["dtype"]), {})
        batches.setdefault(facts["batch"], {})[facts["way"]] = item["stats"]["median"]
    columns = sorted({batch for batches in found.values() for batch in batches})
    rows = [("", *(f"batch {batch}" for batch in columns))]
    for key, batches in found.items():
        rows.append((", ".join(key), *(_ways_of(batches.get(batch, {})) for batch in columns)))
    return markdown(rows)


def _ways_of(seconds: dict[str, float]) -> str:
    ours = next((value for way, value in seconds.items() if way.startswith("ours")), None)  # the default comes first
    if ours is None:
        return ""
    over = [f"{seconds[way] / ours:.2f}" for way in ("eager", "eager_channels_last") if way in seconds]
    return f"{1e3 * ours:.3g}" + (f" ({' / '.join(over)})" if over else "")


# Pages


def _cpu_layers(found: dict) -> list[str]:
    """What the table of kinds shows, and the table."""
    cold = "memory, as in a network" if found["cold"] else "the caches, as in a loop over one layer"
    text = (
        "Our kernel beside oneDNN's fused convolution with packed weights, held to the same instructions "
        f"(`benchmarks/cpu_layers.py`); weights come from {cold}. oneDNN's time over ours, summed over the layers of a "
        "kind (the least of a layer), from the fastest rounds:"
    )
    return [text, markdown(cpu_layers.summary(found["cells"]))]


def _all_cpu_layers(found: dict) -> list[str]:
    parts = ["## Layers beside oneDNN", *_cpu_layers(found), "![layers beside oneDNN](cpu_layers.svg)"]
    parts.append("GFLOP/s are counted in direct convolutions; of peak: of the level's multiply-adds in registers.")
    for name, cells in cpu_layers.groups(found["cells"]).items():
        parts += [f"### {name}", markdown(cpu_layers.rows(cells))]
    return parts


def _about(folder: Folder) -> str:
    e, roof = folder.environment, folder.ceilings
    names = ("torch", "triton", "python", "threads", "isa_level", "commit")
    facts = ", ".join(f"{name} {e[name]}" for name in names if e.get(name))
    flops = ", ".join(f"{per_second(value, 'FLOP')} in {name}" for name, value in roof.get("flops", {}).items())
    commits = {c.get("commit"): None for c in folder.peers.get("cells", [])}
    others = [commit for commit in commits if commit not in (None, e.get("commit"))]
    facts += f" (some models: {', '.join(others)})" if others else ""
    limit = f" Ceilings: {flops}; {per_second(roof['bandwidth'], 'B')} ({roof['how']})." if roof else ""
    return f"{facts}.{limit}" if facts else limit


def page(folder: Folder) -> str:
    """Everything that was measured on one device, as Markdown."""
    parts = [f"# {folder.title}", _about(folder)]
    cells = folder.peers.get("cells", [])
    if cells:
        parts += ["## Whole models", "Median milliseconds (time over ours), forward pass at 224x224 pixels. "
                  + summary(cells), *_ratios(cells), peers_table(cells), "\n".join(_notes(cells)),
                  "![peers](peers.svg)", "![models](models.svg)" if _ratios(cells) else "",
                  "## What a peer costs beside its time", costs_table(cells)]  # fmt: skip
    if folder.training["cells"]:
        parts += ["## Training", TRAINING, training_table(folder.training["cells"])]
    if folder.blocks:
        parts += ["## Blocks and operators", BLOCKS, blocks_table(folder.blocks)]
    if folder.cpu_layers["cells"]:
        parts += _all_cpu_layers(folder.cpu_layers)
    if rows := folder.farthest:
        worst = [f"{i}. {r['name']}: {r['fraction_of_bound']:.2f} of its {r['bound']} bound"
                 for i, r in enumerate(rows[:WORST], 1)]  # fmt: skip
        parts += ["## Single layers", f"The {len(worst)} farthest from their bound:", "\n".join(worst),
                  "![roofline](roofline.svg)", kernels_table(rows)]  # fmt: skip
    if found := [row for row in folder.step("models") if "ms" in row]:
        lines = [("", "ms", "images/s")] + [(r["name"], f"{r['ms']:.4g}", f"{r['img_s']:,.4g}") for r in found]
        parts += ["## Ways to run our models", markdown(lines)]
    if found := [row for row in folder.step("tune") if "subjects" in row]:
        parts += ["## Tiles", TILES, tiles_table(found)]
    if folder.failures:
        failed = [f"- {row['step']}, {row['name']}: {row['error_message']}" for row in folder.failures]
        parts += ["## Failed", "\n".join(failed)]
    return "\n\n".join(filter(None, parts)) + "\n"


def write(path: Path, plot: bool = True) -> Folder:
    """Writes a folder's REPORT.md and, unless told not to, its plots."""
    folder = Folder(path)
    (path / "REPORT.md").write_text(page(folder))
    if plot and folder.peers.get("cells"):
        cells = folder.peers["cells"]
        plots.peers(folder.peers | {"cells": headline(cells), "device": folder.title}, path / "peers.svg")
        if _ratios(cells):
            plots.model_ratios(folder.title, [(cell, over_ours(cell)) for cell in cells], path / "models.svg")
    if plot and folder.cpu_layers["cells"]:
        plots.layer_ratios(folder.cpu_layers, path / "cpu_layers.svg")
    layers = [row for row in folder.kernels if row["flops"]]
    if plot and layers and folder.ceilings:
        plots.roofline(layers, folder.ceilings, path / "roofline.svg")
    return folder


def folders(results: Path) -> list[Path]:
    """The folders of results, each a device's."""
    named = ("peers.json", "cpu_layers.json", "training.json", "campaign.jsonl")
    return sorted(path for path in results.iterdir() if any((path / name).exists() for name in named))


def section(results: Path, readme: Path) -> str:
    """The README's numbers. results: the folder of all devices; readme: where they go, for the links."""
    link = Path(os.path.relpath(results, readme.parent)).as_posix()
    parts = [BEGIN]
    for path in folders(results):
        folder = Folder(path)
        cells, at = folder.peers.get("cells", []), f"{link}/{path.name}"
        parts += [f"### {folder.title}", _about(folder)]
        if cells:
            parts += ["Median milliseconds (time over ours), forward pass at 224x224 pixels. " + summary(cells),
                      peers_table(headline(cells)), "\n".join(_notes(headline(cells)))]  # fmt: skip
        if (path / "peers.svg").exists():
            parts.append(f"![images a second of every peer]({at}/peers.svg)")
        parts += _ratios(cells)
        if _ratios(cells) and (path / "models.svg").exists():
            parts.append(f"![every model beside the fastest other]({at}/models.svg)")
        if folder.training["cells"]:
            parts += [TRAINING, training_table(folder.training["cells"])]
        if folder.blocks:
            parts += [BLOCKS, blocks_table(folder.blocks)]
        if folder.cpu_layers["cells"]:
            parts += _cpu_layers(folder.cpu_layers)
        if worst := folder.farthest[:3]:
            named = "; ".join(f"{r['name']} {r['fraction_of_bound']:.2f}" for r in worst)
            parts.append(f"Farthest from their bound: {named}.")
        notes = f" and [what to know of these figures]({at}/NOTES.md)" if (path / "NOTES.md").exists() else ""
        parts.append(f"All rows, layers and errors: [report]({at}/REPORT.md){notes}.")
    return "\n\n".join([*filter(None, parts), END])


def replace_section(readme: str, new: str) -> str:
    """The text of a README with the numbers between its two marks replaced.

    Raises:
        ValueError: the README lacks a mark.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the README must hold the lines {BEGIN!r} and {END!r}, in this order")
    return before + new + after


def write_all(results: Path, readme: Path | None, plot: bool = True) -> list[Path]:
    """Pages and plots of every device, the traffic of every pattern, and the README's section; returns the folders."""
    found = folders(results)
    for path in found:
        write(path, plot)
    if plot:
        plots.traffic(TRAFFIC_OF, results / "traffic.svg")
    if readme is not None:
        readme.write_text(replace_section(readme.read_text(), section(results, readme)))
    return found
