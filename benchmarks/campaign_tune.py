"""The step "tune" of gpu_campaign.py: entries for resnet_fast/kernels/configs.py.

A subject is a convolution of the models on one of its paths in Triton: through descriptors, by pointers, or in the
kernels for few channels. The entry that its launcher looks up is replaced by candidates, the most promising first. They
are compiled on all cores, the first of every subject before the second of any, until half of the budget is used up;
then those that are right are timed in turn, and for each entry the best over all of its subjects is named.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch

from resnet_fast.backends import triton_interpreted
from resnet_fast.bench import kernels, layers
from resnet_fast.bench.cells import DTYPES, one_line, tolerance
from resnet_fast.kernels import configs, conv_few_channels, conv_pointers, conv_tma
from resnet_fast.kernels.configs import ConvConfig, Limits, StemConfig
from resnet_fast.measure import relative_rms

# Entries and who looks them up

LOOK_UPS = (
    (conv_tma, "config_for"),
    (conv_pointers, "config_for"),
    (conv_few_channels, "stem_config_for"),
)
KERNELS = (
    (conv_tma, "conv_tma_kernel"),
    (conv_pointers, "conv_pointers_kernel"),
    (conv_pointers, "conv_projection_pointers_kernel"),
    (conv_few_channels, "pad_kernel"),
    (conv_few_channels, "conv_few_channels_kernel"),
    (conv_few_channels, "conv_few_channels_max_pool_kernel"),
)


class Entry(NamedTuple):
    """A place in the tables of configs.py. target: "sm_90", say; shape_class: with what the store adds."""

    target: str
    product: str
    shape_class: str

    @property
    def is_stem(self) -> bool:
        return self.shape_class.startswith("stem")

    @property
    def has_descriptors(self) -> bool:
        return self.shape_class.startswith(("pointwise", "window", "few tiles"))

    @property
    def table(self) -> dict:
        stems = configs.STEMS.get(self.target, configs.STEMS["default"])
        return stems if self.is_stem else configs.table_of(self.target)

    @property
    def now(self) -> ConvConfig | StemConfig:
        """What stands there, or for the class without what the store adds."""
        without = (self.product, self.shape_class.split(" + ")[0])
        return self.table.get((self.product, self.shape_class), self.table.get(without))

    @property
    def limits(self) -> Limits:
        return configs.LIMITS.get("sm_90" if self.target == "interpreter" else self.target, configs.LIMITS["sm_86"])

    @contextmanager
    def set_to(self, config: ConvConfig | StemConfig) -> Iterator[None]:
        conv_tma._plan.cache_clear()
        try:
            with mock.patch.dict(self.table, {(self.product, self.shape_class): config}):
                yield
        finally:
            conv_tma._plan.cache_clear()

    def __str__(self) -> str:
        return f"{self.target}, {self.product}, {self.shape_class}"

    def written(self, config: str) -> str:
        return f'("{self.product}", "{self.shape_class}"): {config},'


def written(config: ConvConfig | StemConfig) -> str:
    """As in configs.py."""
    *numbers, last = astuple(config)
    if isinstance(config, ConvConfig):
        tail = [] if last == 1 else [f"programs={last}"]
    else:
        tail = [str(last)] if last else []
    return f"{type(config).__name__}({', '.join([*map(str, numbers), *tail])})"


@contextmanager
def _replaced(places: tuple, stand_in: Callable[[Any], Any]) -> Iterator[None]:
    """Functions or kernels of modules, each replaced by ``stand_in`` of it."""
    with ExitStack() as stack:
        for module, name in places:
            stack.enter_context(mock.patch.object(module, name, stand_in(getattr(module, name))))
        yield


class _Launches:
    """Stands in for a kernel; ``launch(kernel, grid)`` makes what is called with its arguments."""

    def __init__(self, kernel: Any, launch: Callable) -> None:
        self.kernel, self.launch = kernel, launch

    def __getitem__(self, grid: tuple) -> Callable:
        return self.launch(self.kernel, grid)


def looked_up(call: Callable) -> Entry:
    """The entry that the launcher takes. Nothing is launched."""
    found = []

    def noting(look_up: Callable) -> Callable:
        def look(target: str, product: str, *names: str):
            found.append(Entry(target, product, " + ".join(filter(None, names))))
            return look_up(target, product, *names)

        return look

    def nothing(kernel: Any) -> _Launches:
        return _Launches(kernel, lambda kernel, grid: lambda *args, **options: None)

    conv_tma._plan.cache_clear()
    with _replaced(LOOK_UPS, noting), _replaced(KERNELS, nothing):
        call()
    return found[-1]


def compiled_by(call: Callable) -> Any:
    """Runs the call; the last of its kernels as Triton has compiled it."""
    found = []

    def noting(kernel: Any) -> _Launches:
        def launch(kernel: Any, grid: tuple) -> Callable:
            return lambda *args, **options: found.append(kernel[grid](*args, **options))

        return _Launches(kernel, launch)

    with _replaced(KERNELS, noting):
        call()
    return found[-1]


# Candidates

# Rows, columns and warps, in the order in which they did best on the layers of ResNet-50 (by pointers; bfloat16, batch
# 256, an H100).
TILES = (
    (128, 128, 4), (64, 128, 4), (128, 256, 8), (64, 256, 8), (128, 64, 4), (64, 64, 4), (128, 128, 8), (256, 128, 8),
    (128, 64, 8), (256, 64, 8), (64, 64, 8),
)  # fmt: skip
STAGES = (3, 4, 2)
DEPTHS = {"16-bit": 64, "tf32": 32, "ieee": 16}  # 128 bytes, of which wgmma takes the operands from shared memory

STEM_TILES = ((256, 64, 4), (128, 64, 4), (256, 64, 8), (128, 64, 8), (64, 64, 4))
POOLED_STEM_TILES = ((64, 64, 4), (64, 64, 8), (64, 32, 4), (32, 64, 4), (32, 64, 8))
STRIPS = (14, 28, 7)


def _stems(entry: Entry) -> Iterator[StemConfig]:
    if "max-pooling" in entry.shape_class:
        for stages, strip, tile in itertools.product(STAGES, STRIPS, POOLED_STEM_TILES):
            yield StemConfig(*tile, stages, strip)
    else:
        for stages, tile in itertools.product(STAGES, STEM_TILES):
            yield StemConfig(*tile, stages)


def _tiles(entry: Entry) -> Iterator[ConvConfig]:
    depth, tiles = DEPTHS[entry.product], TILES
    depths = (depth // 2,) if entry.shape_class.startswith("elements") else (depth,)
    if entry.shape_class.startswith("few tiles"):  # small ones, whose loop is long
        depths, tiles = (depth, 2 * depth), sorted(TILES, key=lambda tile: tile[0] * tile[1])
    for stages, depth, (m, n, warps) in itertools.product(STAGES, depths, tiles):
        yield ConvConfig(m, n, depth, warps, stages)


def _programs(entry: Entry, config: ConvConfig, size: int) -> int:
    """How many of a persistent kernel may run on a multiprocessor at a time, going by what such tiles took on sm_90
    (Triton 3.6, 16 bits): registers beside the accumulators, and the output in shared memory."""
    accumulators = config.block_m * config.block_n // (32 * config.num_warps)
    registers = accumulators + (100 if "residual" in entry.shape_class else 80)
    if "projection" in entry.shape_class:
        registers = 2 * accumulators + 150
    steps = (config.block_m + config.block_n) * config.block_k * config.num_stages
    shared = (steps + config.block_m * config.block_n) * size
    return min(4, entry.limits.blocks(min(255, registers), shared, config.num_warps))


def candidates(entry: Entry) -> list[ConvConfig | StemConfig]:
    """What stands in the table now, then what is worth a measurement, the most promising first."""
    size = 2 if entry.product == "16-bit" else 4
    if entry.is_stem:
        found = list(_stems(entry))
    else:
        found = [config for config in _tiles(entry) if configs.why_not(config, size, entry.limits) is None]
    if entry.has_descriptors:  # last with a program less, which is the same kernel
        fitting = [(config, _programs(entry, config, size)) for config in found]
        found = [replace(config, programs=n - less) for less in (0, 1) for config, n in fitting if n > less]
    return list(dict.fromkeys([entry.now, *found]))


# Subjects, compiled and timed


@dataclass(frozen=True)
class Subject:
    """A convolution on one of its paths. times: how often the models run it."""

    case: kernels.Case
    path: str  # "descriptors", "pointers" or, for few channels, nothing
    times: int
    entry: Entry

    def __str__(self) -> str:
        return f"{self.case}, {self.path}" if self.path else str(self.case)

    def call(self, work: kernels.Work) -> Callable[[], torch.Tensor]:
        return _on_path(work, self.path)


def _on_path(work: kernels.Work, path: str) -> Callable[[], torch.Tensor]:
    call = kernels.forced("triton", work.ours)
    return kernels.by_pointers(call) if path == "pointers" else call


class Job(NamedTuple):
    """A candidate for a subject's entry."""

    subject: Subject
    config: ConvConfig | StemConfig
    batch: int
    dtype: torch.dtype
    device: str


def counted(models: list[str]) -> list[tuple[kernels.Case, int]]:
    """The convolutions of the models and how often they run; the stem also without its max-pooling."""
    found = [case for model in models for case in kernels.cases_of(model)]
    found += [kernels.layer_case(layers.stem(model)) for model in models]
    times = Counter(map(str, found))
    return [(case, times[name]) for name, case in {str(case): case for case in found}.items()]


@torch.no_grad()
def subjects_of(case: kernels.Case, times: int, batch: int, dtype: torch.dtype, device: str) -> list[Subject]:
    work = case(batch, dtype, device)
    first = looked_up(_on_path(work, ""))
    if not first.has_descriptors:
        return [Subject(case, "" if first.is_stem else "pointers", times, first)]
    second = looked_up(_on_path(work, "pointers"))
    return [Subject(case, "descriptors", times, first), Subject(case, "pointers", times, second)]


def tiled(subject: Subject, config: ConvConfig | StemConfig, call: Callable) -> Callable[[], torch.Tensor]:
    """The call with the candidate in the table. Raises ValueError where the launcher then looks elsewhere."""
    with subject.entry.set_to(config):
        found = looked_up(call)
    if found != subject.entry:
        raise ValueError(f"with this tile the launcher takes the entry for {found.shape_class}")

    def run() -> torch.Tensor:
        with subject.entry.set_to(config):
            return call()

    return run


def _spills_or_does_not_fit(subject: Subject, config: ConvConfig | StemConfig, compiled: Any) -> str | None:
    """What tests/triton_aot refuses an entry for."""
    if compiled.n_spills:
        return f"{compiled.n_spills} registers spilled"
    blocks = subject.entry.limits.blocks(compiled.n_regs, compiled.metadata.shared, config.num_warps)
    if subject.entry.has_descriptors and blocks < config.programs:
        return f"{blocks} programs fit on a multiprocessor ({compiled.n_regs} registers)"
    return None


@torch.no_grad()
def refusal(job: Job) -> str | None:
    """Why a candidate is not to be timed, or None. It runs once, so that its kernel then lies in Triton's cache."""
    try:
        call = job.subject.call(job.subject.case(job.batch, job.dtype, job.device))
        compiled = compiled_by(tiled(job.subject, job.config, call))
        torch.cuda.synchronize()
        return _spills_or_does_not_fit(job.subject, job.config, compiled)
    except Exception as error:
        return one_line(error)


@torch.no_grad()
def run_in_triton(job: tuple) -> str | None:
    """Runs a convolution once in every way that Triton has for it: its kernels then lie in Triton's cache. Why not, or
    None."""
    case, batch, dtype, device = job
    try:
        for way, call in kernels.calls_of(case(batch, dtype, device), device).items():
            if "triton" in way:
                call()
    except Exception as error:  # whoever measures it will see it
        return one_line(error)
    return None


def on_all_cores(function: Callable, jobs: list, seconds: float) -> list:
    """``function`` of each, as far as the seconds go, in processes of their own; in the order of the jobs."""
    found: list = []
    if not jobs:
        return found
    end = time.monotonic() + seconds
    processes = min(16, os.cpu_count() or 1, len(jobs))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        results = pool.imap(function, jobs)
        while len(found) < len(jobs):
            try:
                found.append(results.next(timeout=max(0.0, end - time.monotonic())))
            except multiprocessing.TimeoutError:  # also where a process has died with its job
                break
            except Exception as error:
                found.append(one_line(error))
    return found


@torch.no_grad()
def measure(subject: Subject, tried: list, refused: dict[str, str], batch: int, name: str, device: str) -> dict:
    """A row: every candidate that was tried, checked and timed. refused: those that need not be, and why."""
    dtype = DTYPES[name]
    work = subject.case(batch, dtype, device)
    reference, error, right = work.reference(), dict(refused), {}
    for config in tried:
        text = written(config)
        try:
            call = tiled(subject, config, subject.call(work))
            error[text] = relative_rms(kernels.checked(call()), reference)
        except Exception as failure:
            error[text] = one_line(failure)
            continue
        if error[text] < tolerance(device, dtype):  # so that NaN is not timed
            right[text] = call
    ms = dict(sorted(kernels.milliseconds(right, device).items(), key=lambda item: item[1]))
    if not ms:
        raise RuntimeError(f"no candidate runs and is right: {error}")
    facts = {"class": str(subject.entry), "times": subject.times, "dtype": name, "batch": batch}
    return facts | _best(subject.entry, ms) | {"error": error}


def _best(entry: Entry, ms: dict[str, float]) -> dict:
    """What a row says of candidates, the fastest first."""
    best, now = next(iter(ms)), ms.get(written(entry.now))
    found = {"now": now, "best": ms[best]} if now else {"best": ms[best]}
    return {"ms": found, "entry": entry.written(best), "candidates": ms}


# The step


Tried = dict[str, list[ConvConfig | StemConfig]]  # by the subject's name
Refused = dict[str, dict[str, str]]  # likewise: candidate, why not


def _compile(campaign, subjects: list[Subject], batch: int, name: str, device: str) -> tuple[Tried, Refused]:
    """The candidates that may be timed, and those that need not be, as far as half of the budget goes."""
    of_each = [[Job(s, config, batch, DTYPES[name], device) for config in candidates(s.entry)] for s in subjects]
    jobs = [job for rank in itertools.zip_longest(*of_each) for job in rank if job]
    tried, refused = defaultdict(list), defaultdict(dict)
    results = on_all_cores(refusal, jobs, campaign.seconds_left() / 2)
    for job, why in zip(jobs, results, strict=False):
        if why:
            refused[str(job.subject)][written(job.config)] = why
        else:
            tried[str(job.subject)].append(job.config)
    counts = {"refused": sum(map(len, refused.values())), "left out": len(jobs) - len(results)}
    campaign.put(f"candidates {name} batch {batch}", {"summary": {"compiled": len(results)} | counts})
    return tried, refused


def tune_cases(
    campaign, cases: list[tuple[kernels.Case, int]], containing: str, batch: int, name: str, device: str
) -> None:
    """Rows for the cases whose name, with those of the path and of the entry, contains a text."""
    at = f"{name} batch {batch}"
    subjects = [s for case, times in cases for s in subjects_of(case, times, batch, DTYPES[name], device)]
    subjects = [s for s in subjects if containing in f"{s} {s.entry}" and not campaign.has(f"{s} {at}")]
    if triton_interpreted():  # nothing to compile, and slow
        tried, refused = {str(s): candidates(s.entry)[:3] for s in subjects}, defaultdict(dict)
    else:
        tried, refused = _compile(campaign, subjects, batch, name, device)
    for s in subjects:
        if str(s) in tried or str(s) in refused:
            mine = (tried.get(str(s), []), refused.get(str(s), {}))
            campaign.row(f"{s} {at}", lambda s=s, mine=mine: measure(s, *mine, batch, name, device))
    for entry in dict.fromkeys(s.entry for s in subjects):
        _put_best_of_entry(campaign, entry, batch, name)


def _put_best_of_entry(campaign, entry: Entry, batch: int, name: str) -> None:
    """The candidate that takes the models the least time, of those that were timed on all subjects of the entry."""
    facts = {"class": str(entry), "dtype": name, "batch": batch}
    rows = [r for r in campaign.rows if "times" in r and all(r[key] == value for key, value in facts.items())]
    if rows:
        common = set.intersection(*(set(row["candidates"]) for row in rows))
        ms = {text: sum(row["times"] * row["candidates"][text] for row in rows) for text in common}
        if ms:
            best = _best(entry, dict(sorted(ms.items(), key=lambda item: item[1])))
            campaign.put(f"{entry} {name} batch {batch}", facts | {"subjects": len(rows)} | best)


def tune(campaign, args) -> None:
    cases = counted(args.models)
    for name, batch in itertools.product(args.dtype, args.batch):
        tune_cases(campaign, cases, args.layers, batch, name, args.device)
