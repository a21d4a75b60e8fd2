"""Measuring: errors, times that can be compared on a noisy machine, and random models worth running."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import fmean, median, quantiles, stdev

import torch
from torch import Tensor, nn

from .backends import cpu_level

# Seconds of a call below which warming up again is cheap. Above, it does not matter: ResNet-18 engines at batch 8,
# 0.2 s a call, take 0.997-1.019 times as long (+-0.008) after another engine as after a call of their own.
_WARM_UP_BELOW = 0.15
_LEAST_SAMPLES = 3


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor) -> nn.Module:
    """Sets the running statistics of every BatchNorm to those of ``images`` [N, C, H, W]; returns model in eval mode.

    A freshly initialised ResNet in eval mode overflows in float16 and hides errors behind its last bias; with its own
    statistics its activations stay near unit variance. One pass in training mode, so dropout and the like run too.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    try:
        for norm in norms:
            norm.momentum = 1.0
        model.train()(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
    return model


def random_model(build: Callable[..., nn.Module], images: Tensor) -> nn.Module:
    """A random model, always the same, whose outputs are finite, have spread and do not amplify rounding.

    Args:
        build: one of torchvision's ResNets.
        images: [N, 3, H, W], from which the statistics of every BatchNorm are taken.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(weights=None)
    # With branches as strong as the shortcuts, a rounding error grows in every block: ResNet-152 in bfloat16 is off by
    # 20 % although each operator is right. Trained networks have weak branches; so has this one.
    for block in model.modules():
        last = getattr(block, "bn3", None) or getattr(block, "bn2", None)
        if last is not None:
            nn.init.constant_(last.weight, 0.25)
    return calibrate(model, images)


def relative_rms(out: Tensor, ref: Tensor) -> float:
    """RMS(out - ref) / RMS(ref), computed in float64; NaN or inf if ``out`` is not finite or ``ref`` is 0."""
    out, ref = out.double(), ref.double()
    return ((out - ref).square().mean().sqrt() / ref.square().mean().sqrt()).item()


@dataclass(frozen=True)
class Timing:
    """Samples of one function in seconds, and how many were dropped as disturbed."""

    samples: tuple[float, ...]
    dropped: int = 0

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def p20(self) -> float:
        return self._quintile(0)

    @property
    def p80(self) -> float:
        return self._quintile(3)

    def _quintile(self, i: int) -> float:
        return quantiles(self.samples, n=5, method="inclusive")[i] if len(self.samples) > 1 else self.samples[0]

    def __add__(self, later: Timing) -> Timing:
        return Timing(self.samples + later.samples, self.dropped + later.dropped)

    @property
    def trimmed_mean(self) -> float:
        """The mean without the fastest and the slowest tenth."""
        return fmean(self._middle())

    @property
    def trimmed_mean_error(self) -> float:
        """Half the width of its 95 % interval, relative to it; infinite for fewer than 6 samples.

        From the variance of the samples with the two tenths moved to their bounds (Tukey and McLaughlin, Less
        Vulnerable Confidence and Significance Procedures for Location, 1963).
        """
        n, middle = len(self.samples), self._middle()
        if n < 6:
            return math.inf
        moved = middle + (n - len(middle)) // 2 * [middle[0], middle[-1]]
        return 2 * stdev(moved) * math.sqrt(n) / len(middle) / self.trimmed_mean

    def _middle(self) -> list[float]:
        tenth = len(self.samples) // 10
        return sorted(self.samples)[tenth : len(self.samples) - tenth]


@dataclass
class _Record:
    samples: list[float] = field(default_factory=list)
    disturbed: list[bool] = field(default_factory=list)

    def timing(self) -> Timing:
        kept = [s for s, bad in zip(self.samples, self.disturbed, strict=True) if not bad]
        if 2 * len(kept) < len(self.samples):
            kept = self.samples
        return Timing(tuple(kept), len(self.samples) - len(kept))


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _time(function: Callable[[], object]) -> tuple[float, bool]:
    """Seconds of one call, and whether the system took a processor away from this process meanwhile."""
    _synchronize()
    # Of the process, not the thread: the call is as late as the slowest of torch's worker threads.
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    start = time.perf_counter()
    function()
    _synchronize()
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw != switches


def _warm_up(function: Callable[[], object], seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        function()
        _synchronize()


def interleaved(
    functions: dict[str, Callable[[], object]],
    rounds: int,
    progress: Callable[[int], object] | None = None,
    budget: float = float("inf"),
    warm: float = 0.0,
    precision: float = float("inf"),
    most_rounds: int = 0,
) -> dict[str, Timing]:
    """Times several functions in turn, so that a slow minute of the machine hits all of them alike.

    After one or two warm-up calls of each, a round runs every function once, the first of them before each of the
    others, whose order rotates by one from round to round. The first is what the others are compared with: its noise
    is in every ratio, so it has the most samples. A sample during which the system switched a thread of this process
    out is dropped, unless that would leave a function fewer than half.

    Args:
        functions: by name; what they return is thrown away.
        rounds: at least 1.
        progress: called with 1 for every function and round, such as ``tqdm(total=...).update``.
        budget: seconds after which a function sits out the remaining rounds, once it has 3 samples; the first runs as
            long as any other.
        warm: seconds for which a function runs untimed before each sample, if a call takes less than 0.15 s. It brings
            the weights back into the caches, wakes the function's threads and lets those of the others fall asleep:
            with 0.06, ResNet-18 engines with four thread pools take as long as each alone in a process; with 0,
            OpenVINO 1.2 times as long; after a pause of 50 ms instead, all 1.1-1.2 times as long (2 Zen 3 cores).
        precision: goes on beyond ``rounds`` until `ratio_error` of every function to the first is at most this, or
            ``most_rounds`` are done; functions that sit out are not waited for.
        most_rounds: at least ``rounds``, else that.

    Returns:
        A Timing for each name.
    """
    if rounds < 1:
        raise ValueError(f"interleaved: rounds must be at least 1, got {rounds}")
    latest = {}
    for name, function in functions.items():
        latest[name], _ = _time(function)
        if latest[name] < _WARM_UP_BELOW:
            function()
    records = {name: _Record() for name in functions}

    def sample(name: str) -> None:
        _warm_up(functions[name], warm if latest[name] < _WARM_UP_BELOW else 0.0)
        latest[name], disturbed = _time(functions[name])
        records[name].samples.append(latest[name])
        records[name].disturbed.append(disturbed)

    def sits_out(name: str) -> bool:
        samples = records[name].samples
        return len(samples) >= _LEAST_SAMPLES and sum(samples) >= budget

    reference, *others = functions or [None]
    for i in range(max(rounds, most_rounds)):
        running = [name for name in others or functions if not sits_out(name)]
        if i >= rounds and _known(records, reference, running, precision):
            break
        turn = i % max(len(others), 1)
        for name in others[turn:] + others[:turn]:
            if name in running:
                sample(reference)
                sample(name)
        if not others and running:
            sample(reference)
        if progress is not None and i < rounds:
            progress(len(functions))
    return {name: record.timing() for name, record in records.items()}


def _known(records: dict[str, _Record], reference: str, running: list[str], precision: float) -> bool:
    """Whether every ratio to the first function that more rounds would improve is known well enough."""
    timings = {name: record.timing() for name, record in records.items()}
    return all(ratio_error(timings[name], timings[reference]) <= precision for name in running)


def clean_rounds(
    functions: dict[str, Callable[[], object]],
    rounds: int,
    most_rounds: int,
    seconds: float = 0.0,
    before: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Times short functions in turn, so that their minima can be compared: sample i of each is from round i.

    After two warm-up calls of each, a round runs every function once, in an order that turns from round to round. A
    round during which the system switched a thread of this process out is dropped whole and made again.

    Args:
        functions: by name; what they return is thrown away.
        rounds: clean ones, at least 1.
        most_rounds: after which there may be fewer clean ones, but at least one.
        seconds: goes on for that long where ``rounds`` take less.
        before: runs untimed before each sample.

    Returns:
        A Timing for each name.

    Raises:
        RuntimeError: not one of ``most_rounds`` was clean.
    """
    if rounds < 1:
        raise ValueError(f"clean_rounds: rounds must be at least 1, got {rounds}")
    for function in functions.values():
        function()
        function()
    clean: list[dict[str, float]] = []
    done, names, end = 0, list(functions), time.perf_counter() + seconds
    while (len(clean) < rounds and done < most_rounds) or time.perf_counter() < end:
        samples, disturbed = {}, False
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            if before is not None:
                before()
            samples[name], switched = _time(functions[name])
            disturbed |= switched
        if not disturbed:
            clean.append(samples)
        done += 1
    if not clean:
        raise RuntimeError(f"clean_rounds: the system disturbed each of {done} rounds")
    return {name: Timing(tuple(samples[name] for samples in clean), done - len(clean)) for name in names}


def ratio(a: Timing, b: Timing) -> float:
    """How many times as long ``a`` takes as ``b``: the ratio of their trimmed means.

    A shared machine has a fast and a slow pace and changes it within seconds; a median jumps from one to the other. In
    two runs of 33 ratios (2 Zen 3 cores, 80 rounds each), those of medians differed by 4.3 % (root mean square), those
    of trimmed means by 3.1 %.
    """
    return a.trimmed_mean / b.trimmed_mean


def ratio_error(a: Timing, b: Timing) -> float:
    """Half the width of the 95 % interval of `ratio`, relative to it, from the noise of the samples alone.

    It does not know of a machine that changes its pace for minutes: spread the samples over a longer time for that.
    """
    return 0.0 if a is b else math.hypot(a.trimmed_mean_error, b.trimmed_mean_error)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or an architecture whose cpuinfo has no such line
        return platform.processor() or platform.machine()


@lru_cache
def _commit() -> str | None:
    """The commit of the checkout that this package lies in, with "+" behind it if files were changed; else None."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", os.path.dirname(__file__), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if git("rev-parse", "--show-prefix") != "resnet_fast/":
            return None  # somebody else's repository around an installed package
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!../benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _isa_level() -> str:
    try:
        return cpu_level()
    except RuntimeError as error:
        return str(error)


def environment() -> dict:
    """Versions and hardware that a measurement depends on; goes into every JSON."""
    from . import __version__  # not at the top: it is defined after this package's imports

    cuda_devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "resnet_fast": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "torchvision": _version("torchvision"),
        "triton": _version("triton"),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_proc_bind": os.environ.get("OMP_PROC_BIND"),
        "isa_level": _isa_level(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in cuda_devices],
    }
