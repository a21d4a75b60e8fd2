"""Training steps side by side: forward, cross entropy, backward and SGD with momentum, from the same weights."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import backends, use_backend
from ..measure import Timing, interleaved, ratio, ratio_error
from . import limits
from .cells import DTYPES, SECONDS_PER_PEER, Cell, images, one_line
from .kernels import simulated
from .peers import graphed
from .results import table

OURS = "resnet_fast"
# Largest relative difference of the first loss to that of torch's own step.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Way:
    """One way to train: this package's model or torchvision's, in which layout, with which backend, compiled or not;
    ``memory``: see `resnet_fast.nn.set_activation_memory`; ``graphed``: the whole step is a CUDA graph, so that no
    kernel waits for the CPU."""

    name: str
    ours: bool = False
    channels_last: bool = True
    memory: str = "default"
    backend: str | None = None
    compiled: bool = False
    graphed: bool = False


def ways(device: str) -> dict[str, Way]:
    """All on a device ("cpu" or "cuda") by name, this package's first."""
    found = [Way(OURS, ours=True), Way(f"{OURS} lean", ours=True, memory="lean")]
    if device == "cpu":
        found.append(Way(f"{OURS} contiguous", ours=True, channels_last=False))
    else:
        names = [n for n in ("triton", "cuda") if device in backends()[n].devices and not simulated(n)]
        found += [
            Way(f"{OURS} {name}{' lean' if memory == 'lean' else ''}", ours=True, memory=memory, backend=name)
            for name in names
            for memory in ("default", "lean")
        ]
    found += [Way("torch", channels_last=False), Way("torch channels_last"), Way("torch.compile", compiled=True)]
    if device == "cuda":
        found += [replace(way, name=f"{way.name}, CUDA graph", graphed=True) for way in found]
    return {way.name: way for way in found}


@dataclass
class Result:
    """What is known of a way: its time, its first loss and what it keeps for the backward pass, or why not."""

    loss: float | None = None
    timing: Timing | None = None
    kept: float | None = None  # bytes an image between the forward and the backward pass
    peak: float | None = None  # bytes allocated at most in a step, on CUDA
    refused: str = ""


class Training:
    """A model that is trained one way on the images of a cell."""

    def __init__(self, cell: Cell, way: Way, stock: nn.Module, batch: int | None = None) -> None:
        from .. import models
        from ..nn import set_activation_memory

        self.cell, self.way = cell, way
        model = copy.deepcopy(stock)
        if way.ours:
            with torch.device("meta"):
                model = getattr(models, cell.model)(weights=None)
            model.load_state_dict(copy.deepcopy(stock.state_dict()), assign=True)
            set_activation_memory(model, way.memory)
        layout = torch.channels_last if way.channels_last else torch.contiguous_format
        self.model = model.to(cell.device, memory_format=layout).train()
        self.run = torch.compile(self.model, dynamic=False) if way.compiled else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3, momentum=0.9)
        batch = batch or cell.batch
        self.images = images(batch)[:batch].to(cell.device).contiguous(memory_format=layout)
        self.labels = (torch.arange(batch) * 7 % limits.CLASSES).to(cell.device)
        self._replay: Callable[[], Tensor] | None = None

    def forward(self) -> Tensor:
        dtype = DTYPES[self.cell.dtype]
        with torch.autocast(self.cell.device, dtype, enabled=dtype != torch.float32):
            return F.cross_entropy(self.run(self.images), self.labels)

    def step(self) -> Tensor:
        """The loss. A CUDA graph is captured by the first step."""
        if self._replay is not None:
            return self._replay()
        loss = self._step()
        if self.way.graphed:
            self._replay = graphed(self._step)
        return loss

    def _step(self) -> Tensor:
        with use_backend(self.way.backend):
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.forward()
            loss.backward()
            self.optimizer.step()
        return loss.detach()

    def kept(self) -> float:
        """Bytes allocated between the forward and the backward pass."""
        with use_backend(self.way.backend):
            for _ in range(2):
                self.forward().backward()
                self.optimizer.zero_grad(set_to_none=True)
            before = allocated(self.cell.device)
            loss = self.forward()
            after = allocated(self.cell.device)
            loss.backward()
            self.optimizer.zero_grad(set_to_none=True)
        return after - before


def allocated(device: str) -> int:
    """Bytes that torch's allocator on CUDA, or malloc less this package's idle maps, has handed out.

    Raises:
        RuntimeError: this C library has no malloc_info; glibc has.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    text = _malloc_info()
    totals = text[text.rindex("</heap>") :]

    def total(pattern: str) -> int:
        return int(re.search(pattern, totals)[1])

    free = sum(total(f'<total type="{kind}" count="\\d+" size="(\\d+)"') for kind in ("fast", "rest"))
    mapped = total('<total type="mmap" count="\\d+" size="(\\d+)"')
    in_heaps = total('<system type="current" size="(\\d+)"') - free
    return in_heaps + mapped - torch.ops.resnet_fast._map_pool_bytes()


def _malloc_info() -> str:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_info"):
        raise RuntimeError("this C library does not tell what is allocated")
    libc.open_memstream.restype = ctypes.c_void_p
    buffer, size = ctypes.c_char_p(), ctypes.c_size_t()
    stream = ctypes.c_void_p(libc.open_memstream(ctypes.byref(buffer), ctypes.byref(size)))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    text = buffer.value.decode()
    libc.free(buffer)
    return text


def kept_per_image(cell: Cell, way: Way, stock: nn.Module, few: int = 4, many: int = 8) -> float:
    """Bytes of feature maps that wait for the backward pass, an image: by the difference of two batches, since weights
    that autocast has cast are kept too."""
    return (Training(cell, way, stock, many).kept() - Training(cell, way, stock, few).kept()) / (many - few)


def largest_batch(cell: Cell, way: Way, stock: nn.Module) -> int:
    """Images of a step that would fill the GPU's memory, by the peaks of the cell's batch and of half of it."""
    peaks = []
    for batch in (cell.batch, cell.batch // 2):
        training = Training(cell, way, stock, batch)
        training.step()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        training.step()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    per_image = (peaks[0] - peaks[1]) / (cell.batch - cell.batch // 2)
    total = torch.cuda.get_device_properties(0).total_memory - before
    return int((total - (peaks[0] - per_image * cell.batch)) / per_image)


def stock_model(name: str) -> nn.Module:
    """Torchvision's, with random weights, always the same; float32, on the CPU."""
    import torchvision

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(torchvision.models, name)(weights=None)


def run(
    cell: Cell,
    chosen: Sequence[Way],
    rounds: int,
    bar: Callable[[int], object],
    seconds: float = SECONDS_PER_PEER,
    with_memory: bool = True,
) -> dict[str, Result]:
    """Checks and times every way, in turn; the first of ``chosen`` is what the others are compared with."""
    torch._dynamo.reset()  # the batch of the last cell would make this one's graphs dynamic
    stock, found, steps = stock_model(cell.model), {way.name: Result() for way in chosen}, {}
    expected = Training(cell, Way("torch"), stock).step().item()
    for way in chosen:
        result = found[way.name]
        try:
            training = Training(cell, way, stock)
            result.loss = training.step().item()
        except Exception as error:  # a compiler that is missing or fails must not end the others
            result.refused = f"does not run here ({one_line(error)})"
            bar(rounds)
            continue
        if not abs(result.loss - expected) <= TOLERANCE[DTYPES[cell.dtype]] * abs(expected):
            result.refused = f"wrong loss: {result.loss:.6g}, torch's {expected:.6g}; not timed"
            bar(rounds)
            continue
        steps[way.name] = training
        if cell.device == "cuda" and not way.graphed:
            torch.cuda.reset_peak_memory_stats()
            training.step()
            result.peak = torch.cuda.max_memory_allocated()
    calls = {name: training.step for name, training in steps.items()}
    for name, timing in interleaved(calls, rounds, bar, seconds).items():
        found[name].timing = timing
    steps.clear()
    if with_memory:
        for way in chosen:
            if found[way.name].timing is not None and not (way.compiled or way.graphed):
                with contextlib.suppress(RuntimeError):
                    found[way.name].kept = kept_per_image(cell, way, stock)
    return found


def to_dict(cell: Cell, results: dict[str, Result]) -> dict:
    """The cell as it stands in a file of results; "peers" are the ways."""
    bound = limits.bound(
        limits.training(cell.model, "least"), cell.batch, DTYPES[cell.dtype], limits.ceilings(cell.device)
    )
    head = {"model": cell.model, "batch": cell.batch, "dtype": cell.dtype, "device": cell.device, "train": True}
    ours = results[OURS].timing if OURS in results else None
    found = {}
    for name, r in results.items():
        facts = {"refused": r.refused or None, "loss": r.loss, "kept_bytes_per_image": r.kept, "peak_bytes": r.peak}
        if r.timing is not None:
            t = r.timing
            facts |= {"median_ms": 1e3 * t.median, "p20_ms": 1e3 * t.p20, "p80_ms": 1e3 * t.p80}
            facts |= {"images_per_s": cell.batch / t.median} | bound.figures(t.median)
            facts |= {"time_over_ours": ratio(t, ours)} if ours is not None else {}
            facts |= {"samples_ms": [round(1e3 * s, 3) for s in t.samples], "dropped": t.dropped}
        found[name] = facts
    return head | {"peers": found}


def to_text(cell: Cell, results: dict[str, Result]) -> str:
    """The cell as a table, a line for each way; those without a time are named below it, with the reason."""
    timed = {name: r for name, r in results.items() if r.timing is not None}
    ours, kept = results.get(OURS), results.get("torch channels_last", results.get("torch", Result())).kept
    rows = [("", "median ms", "p20-p80", "images/s", "time / ours", "kept MB/image", "of torch's", "loss")]
    for name, r in timed.items():
        t, relative = r.timing, ""
        if ours is not None and ours.timing is not None:
            error = ratio_error(t, ours.timing)
            relative = f"{ratio(t, ours.timing):.2f}" + (f" ±{100 * error:.0f} %" if 0 < error < 1 else "")
        memory = ("", "") if r.kept is None else (f"{r.kept / 1e6:.1f}", f"{r.kept / kept:.2f}" if kept else "")
        rows.append((
            name, f"{1e3 * t.median:.0f}", f"{1e3 * t.p20:.0f}-{1e3 * t.p80:.0f}", f"{cell.batch / t.median:.1f}",
            relative, *memory, f"{r.loss:.5f}",
        ))  # fmt: skip
    return "\n".join([table(rows), *(f"{name}: {r.refused}" for name, r in results.items() if r.refused)])
