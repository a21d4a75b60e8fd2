"""The command line: ``resnet-fast info | classify | explain | bench`` (or ``python -m resnet_fast``)."""

from __future__ import annotations

import argparse
import copy
import http.client
import json
import math
import os
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .backends import backends
from .measure import Timing, calibrate, environment, interleaved, ratio, relative_rms
from .nn.explain import explain

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RANDOM = "from random weights: means nothing"

# Largest relative RMS against float64 that is still rounding. On CUDA torch's convolutions run in TF32 by default.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_CUDA_TOLERANCES = _TOLERANCES | {torch.float32: 1e-2}

_SECONDS_PER_FUNCTION = 20.0
_CALIBRATION_IMAGES = 8
OURS = "resnet_fast"


class CliError(Exception):
    """What the user can put right: one line on stderr, exit code 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CliError(f"{message} (see {self.prog} --help)")


# What every sub-command needs: models, devices, random weights.


def _models() -> ModuleType:
    try:
        from . import models
    except ImportError as error:
        raise CliError(str(error)) from error
    return models


def model_names() -> list[str]:
    """The ten builders of resnet_fast.models."""
    return [name for name in _models().__all__ if name.islower()]


@dataclass(frozen=True)
class _Builders:
    """One architecture: how this package and torchvision build it, and its enum of weights."""

    ours: Callable[..., nn.Module]
    stock: Callable[..., nn.Module]
    weights: Any


def _builders(name: str) -> _Builders:
    models = _models()
    if name not in model_names():
        raise CliError(f"unknown model {name!r}; the models are {', '.join(model_names())}")
    from torchvision.models import get_model_weights

    return _Builders(getattr(models, name), getattr(models.tv, name), get_model_weights(name))


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise CliError("--device cuda: torch sees no CUDA device here")
    return torch.device(name)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else environment()["cpu"]


def _random_model(build: Callable[..., nn.Module], images: Tensor) -> nn.Module:
    """A random model, always the same, whose outputs are finite, have spread and do not amplify rounding."""
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


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns under their headings, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]) for r in rows)
    return "\n".join(line.rstrip() for line in lines)


# info


def _info(args: argparse.Namespace) -> int:
    facts = environment()
    found = backends()
    if args.json:
        print(json.dumps(facts | {"backends": {n: asdict(b) for n, b in found.items()}}, indent=2))
        return 0
    missing = {"torchvision": "not installed", "triton": "not installed", "cuda": "this torch has none"}
    for key in ("resnet_fast", "torch", "torchvision", "triton", "python", "cuda"):
        print(f"{key:<13}{facts[key] or missing[key]}")
    print(f"{'cpu':<13}{facts['cpu']}, {facts['threads']} threads, C++ kernels: {facts['isa_level']}")
    print(f"{'cuda devices':<13}{', '.join(facts['cuda_devices']) or 'none'}")
    print("backends")
    for backend in found.values():
        where = f"on {', '.join(backend.devices)}" if backend.available else "missing"
        print(f"  {backend.name:<11}{where}: {backend.reason}; for {', '.join(backend.operators)}")
    return 0


# explain


def _explain(args: argparse.Namespace) -> int:
    device = _device(args.device)
    model = _builders(args.model).ours().to(device, DTYPES[args.dtype]).train(args.train)
    found = explain(model)
    mode = "train" if args.train else "eval"
    if args.json:
        head = {"model": args.model, "device": device.type, "dtype": args.dtype, "mode": mode}
        print(json.dumps(head | found.to_dict(), indent=2))
    else:
        print(f"{args.model}, {args.dtype} on {device.type}, {mode} mode")
        print(found)
    return 0


# classify


def _photo(path: str) -> Any:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")  # telephones store photos lying down
    except FileNotFoundError:
        raise CliError(f"{path}: no such file") from None
    except Exception as error:  # Pillow raises a dozen classes on broken files
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else _one_line(error)
        raise CliError(f"{path}: {reason}") from error


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _load_file(path: str) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CliError(f"{path}: no such file") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CliError(f"{path}: not a file of weights ({_one_line(error)})") from error
    if not isinstance(state, dict) or not isinstance(state.get("fc.weight"), Tensor):
        raise CliError(f"{path}: not the state_dict of a ResNet (it has no fc.weight)")
    return state


@dataclass(frozen=True)
class _Weights:
    """Weights to classify with: ``state`` is None for random ones."""

    label: str
    state: dict[str, Tensor] | None
    transform: Callable[[Any], Tensor]
    categories: list[str]


def _weights(choice: str, enum: Any) -> _Weights:
    categories, transform = enum.DEFAULT.meta["categories"], enum.DEFAULT.transforms()
    if choice == "none":
        return _Weights("random weights", None, transform, categories)
    if choice in enum.__members__:  # DEFAULT is one, the other name of the best
        member = enum[choice]
        state = _download(member)
        label = "random weights" if state is None else str(member)
        return _Weights(label, state, member.transforms(), categories)
    if choice.endswith((".pth", ".pt")) or os.path.exists(choice):
        state = _load_file(choice)
        classes = state["fc.weight"].shape[0]
        names = categories if classes == len(categories) else [f"class {i}" for i in range(classes)]
        return _Weights(choice, state, transform, names)
    names = ", ".join(["DEFAULT", "none", *(member.name for member in enum)])
    raise CliError(f"--weights {choice}: unknown; it is one of {names}, or a .pth file")


def _download(member: Any) -> dict[str, Tensor] | None:
    try:
        return member.get_state_dict(progress=True, check_hash=True)
    except (OSError, http.client.HTTPException, RuntimeError) as error:  # RuntimeError: the hash is wrong
        print(
            f"resnet-fast: the weights {member} cannot be downloaded ({_one_line(error)}); going on with random "
            "weights, whose labels mean nothing. Offline, use --weights FILE.pth",
            file=sys.stderr,
        )
        return None


def _pair(builders: _Builders, weights: _Weights, images: Tensor) -> dict[str, nn.Module]:
    """Our model and torchvision's with the same weights, in eval mode."""
    if weights.state is None:
        state = _random_model(builders.stock, _batch_of(images)).state_dict()
    else:
        state = weights.state
    pair = {}
    for name, build in ((OURS, builders.ours), ("torchvision", builders.stock)):
        model = build(weights=None, num_classes=len(weights.categories))
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise CliError(
                f"{weights.label}: not weights of this model ({str(error).splitlines()[1].strip()})"
            ) from error
        pair[name] = model.eval()
    return pair


def _batch_of(images: Tensor) -> Tensor:
    """The images and their mirror images, repeated to a batch that gives BatchNorm statistics."""
    both = torch.cat([images, images.flip(-1)])
    return both.repeat(math.ceil(_CALIBRATION_IMAGES / len(both)), 1, 1, 1)


def _labels(logits: Tensor, weights: _Weights, k: int) -> list[str]:
    probabilities, classes = logits.softmax(-1).topk(k)
    pairs = zip(probabilities.tolist(), classes.tolist(), strict=True)
    return [f"{100 * p:5.1f} %  {weights.categories[c]}" for p, c in pairs]


@torch.no_grad()
def _classify(args: argparse.Namespace) -> int:
    device = _device(args.device)
    builders = _builders(args.model)
    photos = [_photo(path) for path in args.photos]  # first, since a download takes a while
    weights = _weights(args.weights, builders.weights)
    if not 1 <= args.topk <= len(weights.categories):
        raise CliError(f"--topk must be from 1 to the number of classes, {len(weights.categories)}, got {args.topk}")
    images = torch.stack([weights.transform(photo) for photo in photos])  # [N, 3, H, W]
    models = {name: model.to(device) for name, model in _pair(builders, weights, images).items()}
    note = f"  [{RANDOM}]" if weights.state is None else ""

    print(f"{args.model}, {weights.label}, float32 on {_device_name(device)}")
    for path, image in zip(args.photos, images, strict=True):
        x = image[None].to(device)
        calls = {name: lambda model=model: model(x) for name, model in models.items()}  # noqa: B023 (called here)
        logits = {name: call()[0].cpu() for name, call in calls.items()}
        times = interleaved(calls, rounds=5)
        print(f"\n{path}")
        for name in models:
            print(f"  {name} ({1e3 * times[name].median:.1f} ms)")
            for rank, label in enumerate(_labels(logits[name], weights, args.topk), 1):
                print(f"    {rank}. {label}{note}")
        difference, size = (logits[OURS] - logits["torchvision"]).abs().max(), logits["torchvision"].abs().max()
        print(f"  largest difference of the logits: {difference:.1e} (the largest logit: {size:.1f})")
    return 0


# bench


@dataclass(frozen=True)
class _Peer:
    """One way to run a model; ``prepare`` takes (our model, torchvision's, images), each its own, and gives a call."""

    name: str
    prepare: Callable[[nn.Module, nn.Module, Tensor], Callable[[], Tensor]]
    compiled: bool = False


def _channels_last(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    return model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)


def _run_ours(ours: nn.Module, stock: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: ours(x)


def _run_eager(ours: nn.Module, stock: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: stock(x)


def _run_channels_last(ours: nn.Module, stock: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    model, x = _channels_last(stock, x)
    return lambda: model(x)


def _run_compiled(ours: nn.Module, stock: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    model, x = _channels_last(stock, x)
    model = torch.compile(model)
    return lambda: model(x)


def _run_frozen(ours: nn.Module, stock: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    import torch._inductor.config as inductor

    model, x = _channels_last(stock, x)
    # Named as an option too, since Dynamo would otherwise take the graph of `_run_compiled` for this one's.
    model = torch.compile(model, options={"freezing": True})

    def call() -> Tensor:
        with inductor.patch(freezing=True):
            return model(x)

    return call


_PEERS = (
    _Peer(OURS, _run_ours),
    _Peer("torch", _run_eager),
    _Peer("torch channels_last", _run_channels_last),
    _Peer("torch.compile", _run_compiled, compiled=True),
    _Peer("torch.compile freezing", _run_frozen, compiled=True),
)


@dataclass
class _Result:
    """What is known of a peer in one cell: its error, the time of its first call, its samples, or why it has none."""

    peer: _Peer
    error: float | None = None
    first_call_s: float | None = None
    timing: Timing | None = None
    refused: str = ""

    def to_dict(self) -> dict:
        facts = {"relative_rms": self.error, "first_call_s": self.first_call_s, "refused": self.refused or None}
        if self.timing is not None:
            t = self.timing
            facts |= {"median_ms": 1e3 * t.median, "p20_ms": 1e3 * t.p20, "p80_ms": 1e3 * t.p80}
            facts |= {"samples_ms": [1e3 * s for s in t.samples], "rounds": t.rounds, "dropped": t.dropped}
        return facts


def _tolerance(device: torch.device, dtype: torch.dtype) -> float:
    return (_CUDA_TOLERANCES if device.type == "cuda" else _TOLERANCES)[dtype]


def _prepare(result: _Result, models: tuple[nn.Module, nn.Module], x: Tensor, ref: Tensor) -> Callable[[], Tensor]:
    """The peer's call, made and checked once; on failure ``result.refused`` says why."""
    start = time.perf_counter()
    try:
        call = result.peer.prepare(*map(copy.deepcopy, models), x)
        out = call().cpu()
    except Exception as error:  # a compiler that is missing or fails must not end the others
        result.refused = f"does not run here ({_one_line(error)})"
        return lambda: ref
    result.first_call_s = time.perf_counter() - start
    result.error = relative_rms(out, ref)
    if not result.error < _tolerance(x.device, x.dtype):  # so that NaN is refused
        result.refused = "wrong output: not timed"
    return call


def _cell(
    name: str, stock: nn.Module, x: Tensor, peers: Sequence[_Peer], rounds: int, bar: Callable[[int], object]
) -> dict[str, _Result]:
    """Checks and times every peer on one model, batch and dtype. stock: float32 on the CPU; x [N, 3, H, W]."""
    torch._dynamo.reset()  # the batch of the last cell would make this one's graphs dynamic
    stock = copy.deepcopy(stock).to(x.dtype)
    ours = _builders(name).ours(weights=None).eval().to(x.dtype)
    ours.load_state_dict(stock.state_dict())
    ref = copy.deepcopy(stock).double()(x.cpu().double())
    if not ref.isfinite().all() or not ref.std() > 0.01:
        raise RuntimeError(f"{name}: the random model's outputs are not finite or have no spread; nothing to compare")
    models = (ours.to(x.device), stock.to(x.device))

    results, calls = {}, {}
    for peer in peers:
        result = results[peer.name] = _Result(peer)
        call = _prepare(result, models, x, ref)
        if result.refused:
            bar(rounds)
        else:
            calls[peer.name] = call
    timings = interleaved(calls, rounds, bar, _SECONDS_PER_FUNCTION)
    for peer, timing in timings.items():
        results[peer].timing = timing
    return results


def _cell_table(results: dict[str, _Result], batch: int) -> str:
    timed = {n: r.timing for n, r in results.items() if r.timing is not None}
    fastest = min(timed, key=lambda n: timed[n].median, default=None)
    rows = [("", "median ms", "p20-p80", "images/s", "time / ours", "error", "compile s", "")]
    for name, result in results.items():
        error = "" if result.error is None else f"{result.error:.1e}"
        compile_s = f"{result.first_call_s:.1f}" if result.peer.compiled and result.first_call_s is not None else ""
        figures, mark = ("", "", "", ""), ""
        if (t := result.timing) is not None:
            of_ours = f"{ratio(t, timed[OURS]):.2f}" if OURS in timed else ""
            span = f"{1e3 * t.p20:.1f}-{1e3 * t.p80:.1f}"
            figures = (f"{1e3 * t.median:.1f}", span, f"{batch / t.median:.1f}", of_ours)
            mark = "fastest" if name == fastest else ""
        rows.append((name, *figures, error, compile_s, mark))
    refused = [f"{n}: {r.refused}" for n, r in results.items() if r.refused]
    return "\n".join([_table(rows), *refused])


@torch.no_grad()
def _bench(args: argparse.Namespace) -> int:
    from torch.hub import tqdm  # works without the package tqdm

    names = args.models or ["resnet50"]
    builders = {name: _builders(name) for name in names}
    device = _device(args.device)
    _check_writable(args.json)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    peers = [p for p in _PEERS if args.compile or not p.compiled]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(max(_CALIBRATION_IMAGES, *args.batch), 3, 224, 224, generator=generator)

    cells, wrong = [], False
    print(f"{_device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with tqdm(total=len(names) * len(args.dtype) * len(args.batch) * len(peers) * args.rounds, unit="call") as bar:
        for name in names:
            stock = _random_model(builders[name].stock, images[:_CALIBRATION_IMAGES])
            for dtype in args.dtype:
                for batch in args.batch:
                    x = images[:batch].to(device, DTYPES[dtype])
                    results = _cell(name, stock, x, peers, args.rounds, bar.update)
                    print(f"\n{name}, batch {batch}, {dtype}\n{_cell_table(results, batch)}", flush=True)
                    cell = {"model": name, "batch": batch, "dtype": dtype, "device": device.type}
                    cells.append(cell | {"peers": {n: r.to_dict() for n, r in results.items()}})
                    wrong |= bool(results[OURS].refused)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"environment": environment(), "device": _device_name(device), "cells": cells}, file, indent=1)
    return int(wrong)


def _check_writable(path: str | None) -> None:
    if path is None:
        return
    try:
        with open(path, "a"):
            pass
    except OSError as error:
        raise CliError(f"--json {path}: {error.strerror}") from error


# The parser


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


_BENCH_TEXT = f"""\
Times this package's model against torchvision's: eager, eager in channels_last, torch.compile and torch.compile
with freezing (both in channels_last). All have the same random weights and run in one process in turn, so that
a slow minute hits all alike. Before it is timed, every output is compared with a float64 run of torchvision's model
("error": RMS of the difference over RMS of the output); a wrong one is refused. "time / ours" is the median of
the ratios of the single rounds: 2.00 takes twice as long as resnet_fast.

A function that has used up {_SECONDS_PER_FUNCTION:.0f} s in a cell and has 3 samples sits out the remaining rounds:
bfloat16 convolutions of torch on a CPU without AVX-512 take seconds. Exit code 1 if resnet_fast itself is refused.

Set OMP_PROC_BIND=true before: a system that puts two of torch's threads on one core makes everything up to 20 times
slower for as long as the process lives.
"""


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="resnet-fast", description="Fused ResNets: what runs here, how fast, and that it is right.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter
    device = {"choices": ("cpu", "cuda"), "help": "default: cuda where there is one"}
    model = "one of torchvision's ten ResNets: resnet18 ... wide_resnet101_2"

    text = "Versions, devices and backends; for a backend that is missing, why."
    p = commands.add_parser("info", help="versions, devices, backends", description=text)
    p.add_argument("--json", action="store_true", help="print JSON")
    p.set_defaults(run=_info)

    text = f"""\
Classifies photos with this package's model and with torchvision's of the same weights, side by side.

Without a network the weights cannot be downloaded: then random ones are used and every label says
"{RANDOM}". The comparison of the two models holds all the same.
"""
    p = commands.add_parser("classify", help="classify photos", description=text, formatter_class=raw)
    p.add_argument("photos", nargs="+", metavar="PHOTO", help="any image that Pillow reads")
    p.add_argument("--model", default="resnet50", help=f"{model} (default: resnet50)")
    p.add_argument(
        "--weights",
        default="DEFAULT",
        help="DEFAULT (torchvision's best), a name such as IMAGENET1K_V1, a .pth file with a state_dict (its photos "
        "are prepared as for DEFAULT), or none for random ones",
    )
    p.add_argument("--topk", type=_positive, default=5, help="labels for each photo (default: 5)")
    p.add_argument("--device", **device)
    p.set_defaults(run=_classify)

    text = "Says for the stem and every block of a model whether it runs fused, on which kernel, or why not."
    p = commands.add_parser("explain", help="which blocks run fused", description=text)
    p.add_argument("model", metavar="MODEL", help=model)
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    p.add_argument("--device", **device)
    p.add_argument("--train", action="store_true", help="in training mode instead of eval")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.set_defaults(run=_explain)

    p = commands.add_parser("bench", help="time against torchvision", description=_BENCH_TEXT, formatter_class=raw)
    p.add_argument("models", nargs="*", metavar="MODEL", help=f"{model} (default: resnet50)")
    p.add_argument("--batch", type=_positive, nargs="+", default=[1, 8], metavar="N", help="default: 1 8")
    dtypes = "default: float32 bfloat16"
    p.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32", "bfloat16"], help=dtypes)
    p.add_argument("--device", **device)
    p.add_argument("--rounds", type=_positive, default=20, metavar="N", help="samples of each (default: 20)")
    p.add_argument("--threads", type=_positive, metavar="N", help="threads of torch on the CPU (default: torch's)")
    p.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    p.add_argument("--json", metavar="FILE", help="write all samples, versions and hardware to FILE")
    p.set_defaults(run=_bench)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (2: the user's mistake, told in one line on stderr)."""
    try:
        args = _parser().parse_args(argv)
        return args.run(args)
    except CliError as error:
        print(f"resnet-fast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
