"""Layer shapes on the CPU: this package's kernel beside oneDNN's fused convolution, at every instruction-set level.

Both have BatchNorm folded in and their weights packed beforehand, take the same arguments and are called straight, past
checks and caches. Each level and dtype is a process of its own, in which oneDNN is held to the same instructions.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..backends import CPU_LEVELS, cpu_level
from ..choose import onednn_runs
from ..kernels.packing import FoldedConv, Geometry, fold
from ..measure import Timing, clean_rounds, relative_rms
from . import limits
from .cells import DTYPES, one_line, tolerance
from .kernels import CHECKED_IMAGES, EPS, Problem, distinct_layers, problem
from .layers import Layer
from .peers import OURS

ONEDNN = "onednn"
SLOWER = "slower"
MODELS = ("resnet18", "resnet50", "resnext50_32x4d")
_SECONDS = 0.5  # of rounds at least, so that a minimum of short calls rests on hundreds
_MOST = 5  # times as many rounds, where the system disturbs them
_COLD_BYTES = 128 << 20  # read between calls: more than any cache, and than the weights of ResNet-50
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True)
class Job:
    """What one process measures. dtype: a name in cells.DTYPES; containing: a text in the layers' descriptions."""

    level: str
    dtype: str
    models: Sequence[str]
    batches: Sequence[int]
    containing: str = ""
    rounds: int = 20
    cold: bool = False
    threads: int = 1

    def layers(self) -> list[Layer]:
        return distinct_layers(list(self.models), self.containing)

    @property
    def onednn_isa(self) -> str:
        """What ONEDNN_MAX_CPU_ISA must be for the level's instructions."""
        if self.level == "avx512" and self.dtype == "float32":
            return "AVX512_CORE"
        return {"portable": "SSE41", "avx2": "AVX2"}.get(self.level, "DEFAULT")


def levels() -> tuple[str, ...]:
    """The levels that this CPU has, the best last."""
    return CPU_LEVELS[: CPU_LEVELS.index(cpu_level()) + 1]


def _parameters(work: Problem) -> tuple:
    t = work.tensors
    return (t["weight"], None, t["bn_weight"], t["bn_bias"], t["running_mean"], t["running_var"], EPS)


def _geometry(layer: Layer) -> Geometry:
    return Geometry([layer.stride] * 2, [layer.padding] * 2, [1, 1], layer.groups)


def ours(work: Problem) -> tuple[Callable[[], Tensor], str]:
    """The layer on the kernel that the chooser has for it, and that kernel's name."""
    layer, x, residual = work.layer, work.tensors["input"], work.tensors["residual"]
    folded = FoldedConv.make(x.dtype, _geometry(layer), residual is not None, *_parameters(work))
    folded.pack(x.shape, [x.shape[0], layer.filters, layer.out_size, layer.out_size], *_parameters(work))
    return lambda: folded.run(x, residual, layer.relu), str(folded.packed[x.shape].kernel)


def onednn(work: Problem) -> Callable[[], Tensor]:
    """The layer on oneDNN's fused convolution; in float32, between conversions, where oneDNN lacks the dtype."""
    layer, x, residual = work.layer, work.tensors["input"], work.tensors["residual"]
    stride, padding, dilation, groups = _geometry(layer)
    dtype = x.dtype if onednn_runs(x.dtype) else torch.float32
    weight, bias = (t.to(dtype) for t in fold(*_parameters(work)))
    weight = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, x.shape)
    arguments = (weight, bias, padding, stride, dilation, groups)
    activation = "relu" if layer.relu else "none"

    def plain() -> Tensor:
        call = torch.ops.mkldnn._convolution_pointwise.default
        return call(x.to(dtype), *arguments, activation, [], None).to(x.dtype)

    def with_residual() -> Tensor:
        call = torch.ops.mkldnn._convolution_pointwise.binary
        fused = ("add", None, "relu" if layer.relu else None, [], None)
        return call(x.to(dtype), residual.to(dtype), *arguments, *fused).to(x.dtype)

    return plain if residual is None else with_residual


def _flush(work: Problem) -> Callable[[], None]:
    """Between layers of a network: weights are in memory, the input and the residual have just been written."""
    others = torch.ones(_COLD_BYTES // 4)
    maps = [t for t in (work.tensors["input"], work.tensors["residual"]) if t is not None]

    def run() -> None:
        others.sum()
        for t in maps:
            t.mul_(1)

    return run


def kind(layer: Layer) -> str:
    grouped = " grouped" if layer.groups > 1 else ""
    return f"{layer.kernel}x{layer.kernel} stride {layer.stride}{grouped}"


def _figures(timing: Timing, flops: float) -> dict:
    least = min(timing.samples)
    figures = {"min_ms": 1e3 * least, "median_ms": 1e3 * timing.median, "gflops": flops / least / 1e9}
    return figures | {"rounds": len(timing.samples), "dropped": timing.dropped}


@torch.no_grad()
def time_layer(layer: Layer, batch: int, job: Job, peak: float) -> dict:
    """Checks both against float64 and times them, unless one is wrong: a cell of results. peak: FLOP a second."""
    dtype = DTYPES[job.dtype]
    work = problem(layer, batch, dtype, "cpu")
    reference = work.reference()
    call, kernel = ours(work)
    calls = {OURS: call, ONEDNN: onednn(work)}
    peers = {name: {"relative_rms": relative_rms(call()[:CHECKED_IMAGES], reference)} for name, call in calls.items()}
    flops = limits.layer_kernel(layer).total_flops(batch)
    cell = {"level": job.level, "dtype": job.dtype, "batch": batch, "layer": str(layer), "kind": kind(layer)}
    cell |= {"kernel": kernel, "gflop": flops / 1e9}
    wrong = [name for name, peer in peers.items() if not peer["relative_rms"] < tolerance("cpu", dtype)]
    if wrong:
        return cell | {"wrong": wrong, "refused": f"wrong output of {' and '.join(wrong)}", "peers": peers}
    before = _flush(work) if job.cold else None
    try:
        timings = clean_rounds(calls, job.rounds, _MOST * job.rounds, _SECONDS, before)
    except RuntimeError as error:
        return cell | {"refused": one_line(error), "peers": peers}
    for name, timing in timings.items():
        peers[name] |= _figures(timing, flops)
    a, b = peers[ONEDNN], peers[OURS]
    cell |= {"of_peak": b["gflops"] * 1e9 / peak, "ratio": a["min_ms"] / b["min_ms"]}
    return cell | {"ratio_median": a["median_ms"] / b["median_ms"], "peers": peers}


def _all_cores() -> None:
    os.sched_setaffinity(0, range(os.cpu_count()))


def run(job: Job, progress: Callable[[int], object]) -> Iterator[dict]:
    """The ceilings at the job's level, then a cell for each batch and layer, from a process of its own.

    progress: called with 1 for each cell.

    Raises:
        RuntimeError: the process failed; its own words are on stderr.
    """
    held = {"RESNET_FAST_CPU_LEVEL": job.level, "ONEDNN_MAX_CPU_ISA": job.onednn_isa}
    environment = {"OMP_PROC_BIND": "true"} | os.environ | held
    command = [sys.executable, "-m", __name__, json.dumps(asdict(job))]
    # With OMP_PROC_BIND this thread is tied to one core, and a child would inherit that for all of its threads.
    free = _all_cores if "OMP_PROC_BIND" in os.environ and hasattr(os, "sched_setaffinity") else None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=free) as child:
        yield json.loads(next(child.stdout, "null"))
        for line in child.stdout:
            progress(1)
            yield json.loads(line)
    if child.returncode:
        raise RuntimeError(f"the process for level {job.level} in {job.dtype} failed (exit code {child.returncode})")


def _keep_memory() -> None:
    """Lets malloc keep what is freed. oneDNN's outputs come from it, and above 32 MiB each would else take page faults
    anew; ours come from a pool of this package."""
    with contextlib.suppress(AttributeError):  # a libc without mallopt
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(_M_MMAP_THRESHOLD, 1 << 30):  # older glibc: 32 MiB at most
            mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _child(job: Job) -> Iterator[dict]:
    _keep_memory()
    torch.manual_seed(0)
    torch.set_num_threads(job.threads)
    roof = limits.ceilings("cpu")
    yield roof.to_dict()
    for batch in job.batches:
        for layer in job.layers():
            yield time_layer(layer, batch, job, roof.flops[job.dtype])


# Tables


def groups(cells: Sequence[dict]) -> dict[str, list[dict]]:
    """The cells of each level, dtype and batch."""
    found: dict[str, list[dict]] = {}
    for cell in cells:
        found.setdefault(f"{cell['level']}, {cell['dtype']}, batch {cell['batch']}", []).append(cell)
    return found


def is_slower(cell: dict) -> bool:
    return cell["ratio"] < 0.995  # what is not 1.00 in print


def rows(cells: Sequence[dict]) -> list[tuple[str, ...]]:
    """A line a layer: GFLOP/s from minima, and how many times as long oneDNN takes, by minima and by medians."""
    lines = [("", "kernel", "GFLOP/s", "of peak", "oneDNN GFLOP/s", "ratio, minima", "ratio, medians", "rounds", "")]
    for cell in cells:
        if "refused" in cell:
            lines.append((cell["layer"], cell["kernel"], *[""] * 6, cell["refused"]))
            continue
        mine, other = cell["peers"][OURS], cell["peers"][ONEDNN]
        lines.append((
            cell["layer"], cell["kernel"], f"{mine['gflops']:.0f}", f"{cell['of_peak']:.2f}", f"{other['gflops']:.0f}",
            f"{cell['ratio']:.2f}", f"{cell['ratio_median']:.2f}", str(mine["rounds"]),
            SLOWER if is_slower(cell) else "",
        ))  # fmt: skip
    return lines


def summary(cells: Sequence[dict]) -> list[tuple[str, ...]]:
    """A line a kind of layer, a column a level, dtype and batch: oneDNN's summed minima over ours (the least ratio)."""
    found = groups([cell for cell in cells if "refused" not in cell])
    lines = [("", *found)]
    for name in dict.fromkeys(cell["kind"] for cell in cells):
        line = [name]
        for group in found.values():
            of_kind = [cell for cell in group if cell["kind"] == name]
            other, mine = (sum(cell["peers"][peer]["min_ms"] for cell in of_kind) for peer in (ONEDNN, OURS))
            least = min((cell["ratio"] for cell in of_kind), default=0.0)
            line.append(f"{other / mine:.2f} ({least:.2f})" if of_kind else "")
        lines.append(tuple(line))
    return lines


if __name__ == "__main__":
    for item in _child(Job(**json.loads(sys.argv[1]))):
        print(json.dumps(item), flush=True)
