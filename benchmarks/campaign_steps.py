"""The steps of gpu_campaign.py that need the package. A step is a function of the campaign and the arguments."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import campaign_cuda
import torch

import resnet_fast
from resnet_fast.bench import cells, kernels, layers, limits, report, training
from resnet_fast.bench.cells import DTYPES, Cell
from resnet_fast.bench.peers import OURS, Subject, graphed, peers
from resnet_fast.bench.results import write_json
from resnet_fast.choose import CUDA_TILES
from resnet_fast.measure import environment, interleaved, relative_rms

ROOT = Path(__file__).resolve().parent.parent
LATER_OPERATORS = ("bottleneck_chain",)
# Under compute-sanitizer, of each file the tests that `-k` selects: it makes kernels many times as slow. What the CUDA
# C++ kernels do with every type and tile is the step "sanitizer".
SANITIZED = {
    "tests/test_add_relu.py": "not large and not compile",
    "tests/test_conv_bn_relu_cuda.py": "geometries and dtype1 and cudnn",
    "tests/test_triton_cuda.py": "integers and dtype1 and not many",
}


def doctor(campaign, args: argparse.Namespace) -> None:
    campaign.row("environment", environment)
    for name, backend in resnet_fast.backends().items():
        campaign.row(f"backend {name}", lambda b=backend: {"available": b.available, "reason": b.reason})
    campaign.row("ceilings", lambda: limits.ceilings(args.device).to_dict())


# test


def test_files(args: argparse.Namespace) -> dict[str, int]:
    """Files with tests marked gpu, or those that were asked for, and how many of them, the fewest first."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-m", "gpu", *(args.tests or ["tests"])]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300).stdout
    counts = Counter(re.findall(r"^(tests/[\w/]+\.py)::", found, re.MULTILINE))
    return dict(sorted(((file, counts[file]) for file in args.tests or counts), key=lambda item: item[1]))


def _run_tests(campaign, file: str, wrapper: list[str], *arguments: str, processes: int = 1) -> dict:
    workers = ["-n", str(processes)] if processes > 1 and importlib.util.find_spec("xdist") else []
    command = [*wrapper, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file, *arguments, *workers]
    timeout = max(60.0, campaign.seconds_left())
    log = campaign.out / f"{campaign.step}_{Path(file).stem}{'_sanitized' if wrapper else ''}.txt"
    with log.open("w") as out:  # so that something is left where the time runs out
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, timeout=timeout)
    last = (log.read_text().strip().splitlines() or [""])[-1]
    if done.returncode not in (0, 5):  # 5: nothing was selected
        raise RuntimeError(f"{last} (see {log.name})")
    return {"summary": last}


def test(campaign, args: argparse.Namespace) -> None:
    marker = ["-m", "gpu", "--maxfail=20"]
    for file, count in test_files(args).items():
        # Most of the time goes into Triton's compiler, so many tests run on all cores; few wait for the processes to
        # start: three tests on 12 of them took 86 s of an H100's virtual machine.
        processes = min(12, os.cpu_count() or 1, count // 10)
        campaign.row(f"pytest {file}", lambda f=file, n=processes: _run_tests(campaign, f, [], *marker, processes=n))
    sanitizer = campaign_cuda.find_tool("compute-sanitizer")
    if sanitizer is None:
        return campaign.absent("compute-sanitizer", "not installed")
    if args.device != "cuda":
        return campaign.absent("compute-sanitizer", "no CUDA device")
    wrapper = [sanitizer, "--tool", "memcheck", "--error-exitcode", "1"]
    for file, selected in () if args.tests else SANITIZED.items():
        few = ["-m", "gpu", "-k", selected, "--maxfail=3"]
        campaign.row(f"memcheck {file}", lambda file=file, few=few: _run_tests(campaign, file, wrapper, *few))


# peers and models


def _cells(args: argparse.Namespace) -> list[Cell]:
    return [Cell(m, b, d, args.device) for m, d, b in itertools.product(args.models, args.dtype, args.batch)]


def _peers(args: argparse.Namespace) -> list:
    known = peers(args.device)
    unknown = set(args.peers or ()) - set(known)
    if unknown:
        raise ValueError(f"--peers must be of {', '.join(known)}, got {', '.join(unknown)}")
    return [p for name, p in known.items() if not args.peers or name in (OURS, *args.peers)]


def run_peers(campaign, args: argparse.Namespace) -> None:
    path = campaign.out / "peers.json"
    found = json.loads(path.read_text()) if path.exists() else {"cells": []}
    names = torch.cuda.get_device_name() if args.device == "cuda" else environment()["cpu"]
    head = {"environment": environment(), "device": names, "ceilings": limits.ceilings(args.device).to_dict()}
    stocks: dict[str, torch.nn.Module] = {}

    def measure(cell: Cell) -> dict:
        if cell.model not in stocks:
            stocks.clear()
            stocks.update(cells.models([cell.model]))
        results = cells.run(cell, stocks[cell.model], _peers(args), args.rounds, args.memory, lambda n: None)
        print(f"\n{cell}\n{cells.to_text(cell, results)}", flush=True)
        done = cells.to_dict(cell, results)
        found["cells"].append(done)
        write_json(path, head | {"cells": found["cells"]})
        timed = {name: peer for name, peer in done["peers"].items() if peer.get("median_ms")}
        return {"ms": {n: p["median_ms"] for n, p in timed.items()}, "img_s": timed[OURS]["images_per_s"]}

    for cell in _cells(args):
        campaign.row(str(cell), lambda cell=cell: measure(cell))


def _graphed(call: Callable) -> Callable:
    """The call as a CUDA graph, captured when it is first replayed."""
    captured = cache(lambda: graphed(call))
    return lambda: captured()()


def model_calls(subject: Subject) -> dict[str, Callable]:
    """Ways to run our model, by name: every backend, both layouts; on a GPU channels_last as CUDA graphs too."""
    device, x = subject.images.device.type, subject.images
    calls = {}
    for layout in (torch.channels_last, torch.contiguous_format):
        name = str(layout).removeprefix("torch.").removesuffix("_format")
        model, images = subject.ours().to(memory_format=layout), x.contiguous(memory_format=layout)
        calls[name] = lambda model=model, images=images: model(images)
        for backend in resnet_fast.backends().values():
            if device in backend.devices and not kernels.simulated(backend.name):
                calls[f"{name}, {backend.name}"] = kernels.forced(backend.name, calls[name])
    if device == "cuda":
        eager = [way for way in calls if way.startswith("channels_last") and not way.endswith("reference")]
        calls |= {f"{way}, CUDA graph": _graphed(calls[way]) for way in eager}
    return calls


@torch.no_grad()
def run_models(campaign, args: argparse.Namespace) -> None:
    for model, group in itertools.groupby(_cells(args), key=lambda cell: cell.model):
        stock = None
        for cell in group:
            if stock is None:
                stock = dict(cells.models([model]))[model]
            shared, reference = cells.subject(cell, stock)
            for way, call in model_calls(shared).items():

                def measure(call=call, shared=shared, reference=reference) -> dict:
                    error = relative_rms(call().cpu(), reference)
                    if not error < cells.tolerance(args.device, shared.images.dtype):
                        raise RuntimeError(f"wrong output: relative RMS {error:.1e}")
                    t = interleaved({"": call}, args.rounds, budget=cells.SECONDS_PER_PEER)[""]
                    figures = {"ms": 1e3 * t.median, "p20_ms": 1e3 * t.p20, "p80_ms": 1e3 * t.p80}
                    return figures | {"img_s": len(shared.images) / t.median, "error": error}

                campaign.row(f"{cell}, {way}", measure)


# kernels


def _cases(args: argparse.Namespace) -> list[kernels.Case]:
    """The convolutions of the models, each by itself and fused with what it can be, that --layers names."""
    found = [*map(kernels.layer_case, kernels.distinct_layers(args.models)), *kernels.fused_cases(args.models)]
    return [case for case in found if args.layers in str(case)]


_NORMS = {
    "none": "batch_norm_relu", "residual": "batch_norm_relu with residual", "projection": "batch_norm_relu_projection",
}  # fmt: skip


def _maps(args: argparse.Namespace) -> dict[str, Callable]:
    """What measures the operators on maps alone, by name."""
    pooled, averaged = kernels.pooled_maps(args.models)
    operators = (
        ("add_relu", kernels.time_add_relu, kernels.residual_maps(args.models)),
        ("max_pool", kernels.time_max_pool, pooled),
        ("avg_pool_flatten", kernels.time_avg_pool, averaged),
        *(
            (
                f"{_NORMS[shortcut]}{', with gradient' * backward}",
                partial(kernels.time_batch_norm, shortcut, backward),
                maps,
            )
            for shortcut, maps in kernels.normalised_maps(args.models).items()
            for backward in (False, True)
        ),
    )
    found = {f"{name} {c}@{size}": partial(time, c, size) for name, time, maps in operators for c, size in maps}
    return {name: time for name, time in found.items() if args.layers in name}


def _compile_in_triton(campaign, cases: list[kernels.Case], batch: int, dtype: torch.dtype) -> None:
    """On all cores, so that no row waits for Triton's compiler."""
    if "cuda" in resnet_fast.backends()["triton"].devices:
        import campaign_tune

        jobs = [(case, batch, dtype, "cuda") for case in cases]
        campaign_tune.on_all_cores(campaign_tune.run_in_triton, jobs, campaign.seconds_left() / 2)


def _cutlass(campaign, args: argparse.Namespace) -> None:
    """Builds CUTLASS's convolutions and lets them take part."""
    if not args.cutlass:
        return
    if args.device != "cuda":
        return campaign.absent("CUTLASS", "no CUDA device")
    from cutlass_conv import build as cutlass  # beside this file

    def compiled() -> dict:
        apis = cutlass.apis(torch.cuda.get_device_capability())
        return {"summary": [cutlass.build(*of_api)[0].name for of_api in apis.items()]}

    campaign.row("CUTLASS", compiled)
    if campaign.has("CUTLASS") and cutlass.ways not in kernels.RACERS:
        kernels.RACERS.append(cutlass.ways)


def run_kernels(campaign, args: argparse.Namespace) -> None:
    _cutlass(campaign, args)
    cases, maps = _cases(args), _maps(args)
    for name, batch in itertools.product(args.dtype, args.batch):
        at, facts = f"{name} batch {batch}", {"dtype": name, "batch": batch}
        missing = [case for case in cases if not campaign.has(f"{case} {at}")]
        if args.device == "cuda":
            _compile_in_triton(campaign, missing, batch, DTYPES[name])
        for title, time in (maps | {str(case): partial(kernels.time_case, case) for case in cases}).items():
            measure = partial(time, batch, DTYPES[name], args.device)
            campaign.row(f"{title} {at}", lambda facts=facts, measure=measure: facts | measure())
    for operator in LATER_OPERATORS:
        if not hasattr(torch.ops.resnet_fast, operator):
            campaign.absent(operator, "this package has no such operator yet")


# tune


def tune(campaign, args: argparse.Namespace) -> None:
    campaign_cuda.tune(campaign, args)
    triton = resnet_fast.backends()["triton"]
    if args.device not in triton.devices:
        return campaign.absent("Triton tiles", triton.reason)
    import campaign_tune  # it needs Triton

    campaign_tune.tune(campaign, args)


# train


def _train(cell: Cell, way: training.Way, args: argparse.Namespace) -> dict:
    found = training.run(cell, [way], args.rounds, lambda n: None, with_memory=args.memory)
    result = found[way.name]
    if result.refused:
        raise RuntimeError(result.refused)
    facts = training.to_dict(cell, found)["peers"][way.name]
    figures = {"ms": facts["median_ms"], "img_s": facts["images_per_s"]}
    kept = {"kept_mb_per_image": result.kept / 1e6} if result.kept is not None else {}
    peak = {"peak_gb": result.peak / 1e9} if result.peak is not None else {}
    names = ("p20_ms", "p80_ms", "fraction_of_bound", "bound", "loss")
    largest = {}
    if cell.device == "cuda" and not (way.compiled or way.graphed):
        largest = {"largest_batch": training.largest_batch(cell, way, training.stock_model(cell.model))}
    return figures | {name: facts[name] for name in names if name in facts} | kept | peak | largest


def train(campaign, args: argparse.Namespace) -> None:
    for cell in _cells(args):
        for name, way in training.ways(args.device).items():
            if args.peers and name not in (OURS, *args.peers):
                continue
            campaign.row(f"{cell}, {name}", lambda cell=cell, way=way: _train(cell, way, args))
            torch._dynamo.reset()


# profile


def profile(campaign, args: argparse.Namespace) -> None:
    ncu = campaign_cuda.find_tool("ncu")
    if ncu is None:
        return campaign.absent("ncu", "not installed")
    if args.device != "cuda":
        return campaign.absent("ncu", "no CUDA device")
    for case in _cases(args):
        job = [str(Path(__file__)), str(case), str(args.batch[0]), args.dtype[0]]
        log = campaign.out / f"ncu_{re.sub(r'[^0-9a-z]+', '_', str(case))}.txt"

        def measure(job=job, log=log) -> dict:
            command = [ncu, "--set", "basic", "--launch-skip", "8", "--launch-count", "6", "--log-file", str(log)]
            timeout = max(60.0, campaign.seconds_left())
            subprocess.run([*command, sys.executable, *job], check=True, capture_output=True, timeout=timeout)
            return {"summary": log.name}

        campaign.row(f"ncu {case}", measure)


@torch.no_grad()
def _profiled(name: str, batch: int, dtype: str) -> None:
    """What ncu watches: our operator on one layer, a few times."""
    everything = argparse.Namespace(models=list(layers.MODELS), layers="")
    work = next(case for case in _cases(everything) if str(case) == name)(batch, DTYPES[dtype], "cuda")
    for _ in range(4):
        work.ours()
    torch.cuda.synchronize()


# All of it

FUNCTIONS = {
    "doctor": doctor, "primitives": campaign_cuda.primitives, "sanitizer": campaign_cuda.sanitizer, "test": test,
    "peers": run_peers, "kernels": run_kernels, "models": run_models, "tune": tune, "train": train, "profile": profile,
}  # fmt: skip


def run(campaign, args: argparse.Namespace) -> int:
    """Every step, then the report; returns the exit code: 1 if a row failed."""
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu runs the same steps on the CPU", file=sys.stderr)
        return 2
    torch.backends.cudnn.benchmark = True
    for step in args.steps:
        if step == "build":  # done before this file could be imported
            continue
        campaign.begin(step)
        try:
            FUNCTIONS[step](campaign, args)
        except Exception as error:
            campaign.fail("the step itself", error)
        if campaign.skipped:
            print(f"{step:10} {campaign.skipped} rows left out: the budget of {args.budget:.0f} s is used up")
        torch._dynamo.reset()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    folder = report.write(campaign.out, plot=importlib.util.find_spec("matplotlib") is not None)
    print("\n" + summary(campaign, folder))
    return int(any("error_message" in row for row in campaign.rows))


def summary(campaign, folder: report.Folder) -> str:
    """The short table: a line a step, and the layers farthest from their bound."""
    lines = []
    for step in ("build", *FUNCTIONS):
        rows = [row for row in campaign.rows if row["step"] == step]
        if rows:
            failed = sum("error_message" in row for row in rows)
            absent = [row["name"] for row in rows if "absent" in row]
            lines.append(f"{step:10} {len(rows) - failed - len(absent):4} rows, {failed} failed"
                         + (f"; absent: {', '.join(absent)}" if absent else ""))  # fmt: skip
    lines += [f"worst      {r['name']:46} {r['fraction_of_bound']:.2f} of its {r['bound']} bound"
              for r in folder.farthest[: report.WORST]]  # fmt: skip
    return "\n".join([*lines, f"report     {campaign.out / 'REPORT.md'}"])


def plan(args: argparse.Namespace) -> int:
    """What would be done, step by step, without a device."""
    whole = [str(cell) for cell in _cells(args)]
    each = [f"{d} batch {b}" for d, b in itertools.product(args.dtype, args.batch)]
    cases, maps = _cases(args), _maps(args)
    what = {
        "build": [args.wheel or "from source"],
        "doctor": ["environment", "backends", "ceilings"],
        "primitives": [campaign_cuda.PRIMITIVES],
        "sanitizer": [f"{tool} on {campaign_cuda.CASES}" for tool in campaign_cuda.TOOLS],
        "test": args.tests or ["every file with tests marked gpu", "compute-sanitizer"],
        "peers": [f"{cell}: {', '.join(peer.name for peer in _peers(args))}" for cell in whole],
        "kernels": [f"{len(cases)} convolutions and {len(maps)} operators on maps, {at}" for at in each]
        + ["CUTLASS's convolutions, built first"] * args.cutlass,
        "models": whole,
        "tune": [
            f"{len(CUDA_TILES)} tiles of the CUDA C++ convolution and candidate tiles for the convolutions on each "
            f"of their paths in Triton, {at}"
            for at in each
        ],
        "train": [f"{cell}: {way}" for cell in whole for way in training.ways(args.device)],
        "profile": [f"ncu on {len(cases)} convolutions"],
    }
    for step in args.steps:
        for text in what[step]:
            print(f"{step:10} {text}")
    print(f"each step at most {args.budget:.0f} s beyond its last row; results to {args.out}")
    return 0


if __name__ == "__main__":
    _profiled(sys.argv[1], int(sys.argv[2]), sys.argv[3])
