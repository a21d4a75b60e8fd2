"""One cell of the peers' table: a model, a batch and a dtype, on which every peer is checked, then timed."""

from __future__ import annotations

import copy
import math
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..measure import Timing, interleaved, random_model, ratio, ratio_error, relative_rms
from . import limits, memory
from .peers import OURS, Call, Peer, Subject
from .results import table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SECONDS_PER_PEER = 10.0
MOST = 10  # times as many rounds and seconds, where the machine is too noisy for the precision asked for
CALIBRATION_IMAGES = 8

# Largest relative RMS against float64 that is still rounding. On CUDA torch's convolutions run in TF32 by default. In
# bfloat16 a random ResNet-152 errs by 0.047 to 0.053, whichever engine computes it.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
_CUDA_TOLERANCES = _TOLERANCES | {torch.float32: 1e-2}
_REFERENCE_IMAGES = 32  # at a time: a map of ResNet-50 at batch 256 in float64 has 1.6 GB
_WARM = 0.06  # seconds; see measure.interleaved


def tolerance(device: str, dtype: torch.dtype) -> float:
    """Largest relative RMS that an output may have against float64 before it counts as wrong."""
    return (_CUDA_TOLERANCES if device == "cuda" else _TOLERANCES)[dtype]


@dataclass(frozen=True)
class Cell:
    """What is measured. device: "cpu" or "cuda"; dtype: a name in DTYPES."""

    model: str
    batch: int
    dtype: str
    device: str

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}, {self.dtype}"

    def bound(self) -> limits.Bound:
        """The least time for a forward pass, with every block a kernel of its own."""
        kernels = limits.inference(self.model, "block")
        return limits.bound(kernels, self.batch, DTYPES[self.dtype], limits.ceilings(self.device))


@dataclass
class Result:
    """What is known of a peer in one cell: its error, times and memory, or why it has none (``refused``)."""

    peer: Peer
    note: str = ""
    refused: str = ""
    error: float | None = None
    prepare_s: float | None = None
    first_call_s: float | None = None
    timing: Timing | None = None
    memory: dict[str, float] | None = None  # see memory.measure

    def to_dict(self, cell: Cell, ours: Timing | None) -> dict:
        facts = {"refused": self.refused or None, "note": self.note or None, "relative_rms": self.error}
        facts |= {"prepare_s": self.prepare_s, "first_call_s": self.first_call_s} | (self.memory or {})
        if self.timing is None:
            return facts
        t = self.timing
        facts |= {"median_ms": 1e3 * t.median, "p20_ms": 1e3 * t.p20, "p80_ms": 1e3 * t.p80}
        facts |= {"images_per_s": cell.batch / t.median} | cell.bound().figures(t.median)
        if ours is not None:
            facts |= {"time_over_ours": ratio(t, ours), "time_over_ours_error": _finite(ratio_error(t, ours))}
        return facts | {"samples_ms": [round(1e3 * s, 3) for s in t.samples], "dropped": t.dropped}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _ratio_text(t: Timing, ours: Timing) -> str:
    error = ratio_error(t, ours)
    return f"{ratio(t, ours):.2f}" + (f" ±{100 * error:.0f} %" if math.isfinite(error) and t is not ours else "")


def images(batch: int) -> Tensor:
    """The images [at least batch and 8, 3, 224, 224] of every run, float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(max(CALIBRATION_IMAGES, batch), 3, 224, 224, generator=generator)


def subject(cell: Cell, stock: nn.Module) -> tuple[Subject, Tensor]:
    """What the peers run, and the logits of a float64 run of the same weights. stock: float32, on the CPU."""
    dtype = DTYPES[cell.dtype]
    stock = copy.deepcopy(stock).to(dtype)
    x = images(cell.batch)[: cell.batch].to(cell.device, dtype)
    stock = stock.to(cell.device).double()
    reference = torch.cat([stock(part.double()).cpu() for part in x.split(_REFERENCE_IMAGES)])
    if not reference.isfinite().all() or not reference.std() > 0.01:
        raise RuntimeError(f"{cell}: the random model's outputs are not finite or have no spread; nothing to compare")
    # Rounded to the dtype above, so that rounding again changes nothing.
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in stock.state_dict().items()}
    return Subject(cell.model, state, x), reference


def one_line(error: BaseException) -> str:
    """The class and first line of an error, short enough for a table; of paths, the last part alone."""
    lines = [re.sub(r"(/[\w.+-]+)+/", "", line.strip()) for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__


def _check(result: Result, subject: Subject, reference: Tensor) -> Call | None:
    """Prepares the peer and compares its first output; None, with ``result.refused`` saying why, if it fails."""
    result.refused = result.peer.absent()
    if result.refused:
        return None
    try:
        start = time.perf_counter()
        prepared = result.peer.prepare(subject)
        result.prepare_s = time.perf_counter() - start
        start = time.perf_counter()
        out = prepared.call().cpu()
        result.first_call_s = time.perf_counter() - start
    except Exception as error:  # a compiler that is missing or fails must not end the others
        result.refused = f"does not run here ({one_line(error)})"
        return None
    result.note, result.error = prepared.note, relative_rms(out, reference)
    if not result.error < tolerance(subject.images.device.type, subject.images.dtype):  # so that NaN is refused
        result.refused = "wrong output: not timed"
        return None
    return prepared.call


@torch.no_grad()
def run(
    cell: Cell,
    stock: nn.Module,
    peers: Sequence[Peer],
    rounds: int,
    with_memory: bool,
    bar: Callable[[int], object],
    precision: float = math.inf,
    seconds: float = SECONDS_PER_PEER,
) -> dict[str, Result]:
    """Checks and times every peer. stock: torchvision's model, float32 on the CPU; bar: told of every sample.

    seconds: of samples of a peer, after which it sits out; precision: goes on, up to MOST times the rounds and seconds,
    until every ratio to ours is known to that (95 %).
    """
    torch._dynamo.reset()  # the batch of the last cell would make this one's graphs dynamic
    shared, reference = subject(cell, stock)
    results = {peer.name: Result(peer) for peer in peers}
    calls = {}
    for name, result in results.items():
        call = _check(result, shared, reference)
        if call is None:
            bar(rounds)
        else:
            calls[name] = call
    most = MOST if math.isfinite(precision) else 1
    warm = _WARM if cell.device == "cpu" else 0.0
    timings = interleaved(calls, rounds, bar, most * seconds, warm, precision, most * rounds)
    for name, timing in timings.items():
        results[name].timing = timing
    calls.clear()
    if with_memory:
        for name in timings:
            _measure_memory(results[name], shared)
    return results


def add(results: dict[str, Result], later: dict[str, Result]) -> dict[str, Result]:
    """One cell's results with the samples of a later pass; a peer that failed in either is refused, the larger error
    stands."""
    together = {}
    for name, first in results.items():
        second = later[name]
        refused = first.refused or second.refused
        if refused:
            together[name] = replace(first, refused=refused, timing=None)
        else:
            together[name] = replace(first, error=max(first.error, second.error), timing=first.timing + second.timing)
    return together


def _measure_memory(result: Result, subject: Subject) -> None:
    try:
        result.memory = memory.measure(subject, result.peer)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        result.note = ", ".join(filter(None, [result.note, f"memory not measured ({one_line(error)})"]))


def to_dict(cell: Cell, results: dict[str, Result]) -> dict:
    """The cell as it stands in a file of results."""
    ours = results[OURS].timing if OURS in results else None
    bound = cell.bound()
    head = {"model": cell.model, "batch": cell.batch, "dtype": cell.dtype, "device": cell.device}
    head |= {"bound_ms": 1e3 * bound.seconds, "gflop": bound.flops / 1e9, "least_mb": bound.bytes / 1e6}
    return head | {"peers": {name: result.to_dict(cell, ours) for name, result in results.items()}}


def to_text(cell: Cell, results: dict[str, Result]) -> str:
    """The cell as a table, a line for each peer; those without a time are named below it, with the reason."""
    timed = {name: r.timing for name, r in results.items() if r.timing is not None}
    fastest = min(timed, key=lambda name: timed[name].median, default=None)
    bound = cell.bound().seconds
    rows = [("", "median ms", "p20-p80", "images/s", "time / ours", "of bound", "error", "ready s", "peak MB", "")]
    for name, t in timed.items():
        r = results[name]
        marks = [r.note, "fastest" if name == fastest else "", f"{t.dropped} samples disturbed" if t.dropped else ""]
        rows.append((
            name, f"{1e3 * t.median:.1f}", f"{1e3 * t.p20:.1f}-{1e3 * t.p80:.1f}", f"{cell.batch / t.median:.1f}",
            _ratio_text(t, timed[OURS]) if OURS in timed else "", f"{bound / t.median:.2f}", f"{r.error:.1e}",
            f"{r.prepare_s + r.first_call_s:.1f}", f"{r.memory['running_rss_mb']:.0f}" if r.memory else "",
            ", ".join(filter(None, marks)),
        ))  # fmt: skip
    refused = [
        f"{name}: {r.refused}" + (f" (error {r.error:.1e})" if r.error is not None else "")
        for name, r in results.items()
        if r.refused
    ]
    return "\n".join([table(rows), *refused])


def models(names: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Name and random torchvision model (float32, on the CPU, eval mode) of each."""
    import torchvision

    for name in names:
        yield name, random_model(getattr(torchvision.models, name), images(0))
