"""Steps of gpu_campaign.py that are about the CUDA C++ kernels: "primitives", "sanitizer", and their part of "tune"."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from resnet_fast import backends
from resnet_fast.bench import kernels, layers
from resnet_fast.bench.cells import DTYPES, one_line, tolerance
from resnet_fast.bench.layers import Layer
from resnet_fast.choose import CUDA_TILES
from resnet_fast.measure import relative_rms

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PRIMITIVES = "tests/cuda_emulator/test_primitives.py"
CASES = "benchmarks/sanitizer_cases.py"
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
EXIT_CODE = 9  # compute-sanitizer's where it has found something


def find_tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


# primitives


def primitives(campaign, args: argparse.Namespace) -> None:
    """What a GPU makes of every instruction that the emulator imitates, beside what the emulator makes of it."""
    if args.device != "cuda":
        return campaign.absent("primitives", "no CUDA device")
    if not (ROOT / PRIMITIVES).is_file():
        return campaign.absent("primitives", f"no {PRIMITIVES} in this checkout")
    campaign.row("primitives", lambda: _primitives(campaign))


def _primitives(campaign) -> dict:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", PRIMITIVES, "-m", "gpu"]
    env = os.environ | {"RESNET_FAST_TEST_EMULATOR": "1"}
    done, log = _logged(campaign, "primitives", command, env)
    last = (log.read_text().strip().splitlines() or [""])[-1]
    if done.returncode or "passed" not in last:  # nothing selected and everything skipped is no proof
        raise RuntimeError(f"{last or 'no output'} (see {log.name})")
    return {"summary": last}


def _logged(campaign, name: str, command: list[str], env: dict) -> tuple[subprocess.CompletedProcess, Path]:
    log = campaign.out / f"{name}.txt"
    with log.open("w") as out:  # so that something is left where the time runs out
        timeout = max(60.0, campaign.seconds_left())
        return subprocess.run(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, timeout=timeout), log


# sanitizer


def sanitizer(campaign, args: argparse.Namespace) -> None:
    """compute-sanitizer on the smallest shapes of every CUDA C++ kernel, type and tile."""
    tool = find_tool("compute-sanitizer")
    for check in TOOLS:
        if tool is None:
            campaign.absent(check, "compute-sanitizer is not installed")
        elif args.device != "cuda":
            campaign.absent(check, "no CUDA device")
        else:
            campaign.row(check, lambda check=check: sanitized(campaign, check, tool))


def sanitized(campaign, check: str, tool: str) -> dict:
    """A row for one of its checks. An allocation each, so that what lies behind a tensor is nobody's."""
    command = [tool, "--tool", check, "--error-exitcode", str(EXIT_CODE), sys.executable, CASES]
    done, log = _logged(campaign, f"sanitizer_{check}", command, os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    text = log.read_text()
    figures = {"errors": errors_in(text), "summary": f"{errors_in(text)} errors", "tail": text[-1500:]}
    if done.returncode or figures["errors"] != 0:
        figures["error_message"] = f"exit code {done.returncode}, {figures['summary']} (see {log.name})"
    return figures


def errors_in(text: str) -> int | None:
    """The errors that compute-sanitizer counted; None where it did not come to its summary."""
    found = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", text)
    return sum(int(errors or hazards) for errors, hazards in found) if found else None


# tune


def shape_class(layer: Layer) -> str:
    """What a tile is chosen by: layers that differ in nothing but their tails are one class."""
    groups = f" g{layer.groups}" if layer.groups > 1 else ""
    return f"{layer.kernel}x{layer.kernel} {layer.channels}->{layer.filters} s{layer.stride} @{layer.size}{groups}"


def with_tile(work: kernels.Problem, tile: int) -> Callable[[], torch.Tensor]:
    """The CUDA C++ convolution on one tile, by its place in CUDA_TILES; -1: the one that the host chooses."""
    n = work.numbers
    geometry = ([n["stride"]] * 2, [n["padding"]] * 2, [1, 1], n["groups"], kernels.EPS, n["relu"])
    operator = torch.ops.resnet_fast._conv_bn_relu_cuda.default
    return lambda: operator(*work.tensors.values(), *geometry, tile)


@torch.no_grad()
def _time_tiles(layer: Layer, batch: int, dtype: torch.dtype, device: str) -> tuple[dict, dict]:
    """Milliseconds of every tile that takes the layer and is right, and every tile's error or why it has none."""
    work = kernels.problem(layer, batch, dtype, device)
    reference, error, right = work.reference(), {}, {}
    for tile in (-1, *range(len(CUDA_TILES))):
        name, call = CUDA_TILES[tile] if tile >= 0 else "now", with_tile(work, tile)
        try:
            error[name] = relative_rms(kernels.checked(call()), reference)
        except RuntimeError as failure:
            error[name] = one_line(failure)
            continue
        if error[name] < tolerance(device, dtype):  # so that NaN is not timed
            right[name] = call
    return kernels.milliseconds(right, device), error


def tune(campaign, args: argparse.Namespace) -> None:
    """Rows for the classes of layers whose name, with "CUDA C++" before it, contains --layers: the best tile. Last, all
    of them as JSON."""
    cuda = backends()["cuda"]
    if args.device not in cuda.devices:
        return campaign.absent("CUDA C++ tiles", cuda.reason)
    times = Counter(layer.shape for model in args.models for layer in layers.read(model))
    classes = defaultdict(list)
    for layer in kernels.distinct_layers(args.models):
        if args.layers in f"CUDA C++ {layer}":
            classes[shape_class(layer)].append(layer)
    for name, batch in itertools.product(args.dtype, args.batch):
        at, entries = f"{name} batch {batch}", {}
        for kind, members in classes.items():

            def measure(kind=kind, members=members, name=name, batch=batch) -> dict:
                found = [(times[la.shape], *_time_tiles(la, batch, DTYPES[name], args.device)) for la in members]
                return {"class": kind, "dtype": name, "batch": batch} | best_tile(kind, found)

            campaign.row(f"CUDA C++ {kind} {at}", measure)
            row = next((r for r in campaign.rows if r["name"] == f"CUDA C++ {kind} {at}"), {})
            if "tile" in row:
                entries[kind] = row["tile"]
        if entries:
            campaign.put(f"CUDA C++ tiles {at}", {"entries": entries, "summary": json.dumps(entries)})


def best_tile(kind: str, found: list[tuple[int, dict, dict]]) -> dict:
    """The tile that takes the models the least time; found: of each layer how often it occurs, milliseconds, errors."""
    common = set.intersection(*(set(ms) for _, ms, _ in found))
    ms = {tile: sum(count * of_layer[tile] for count, of_layer, _ in found) for tile in common}
    now = ms.pop("now", None)
    if not ms:
        raise RuntimeError(f"no tile runs and is right: {[errors for _, _, errors in found]}")
    candidates = dict(sorted(ms.items(), key=lambda item: item[1]))
    best = next(iter(candidates))
    figures = {"best": candidates[best]} | ({"now": now} if now else {})
    facts = {"subjects": len(found), "tile": best, "ms": figures, "candidates": candidates}
    return facts | {"entry": f'"{kind}": "{best}"', "error": [errors for _, _, errors in found]}
