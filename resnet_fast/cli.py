"""The command line: ``resnet-fast info | classify | explain | bench | report`` (or ``python -m resnet_fast``)."""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import math
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .backends import backends
from .bench import cells, compare, limits, report, training
from .bench.cells import CALIBRATION_IMAGES, DTYPES, one_line
from .bench.peers import OURS, PEERS, Peer, peers
from .bench.results import per_second, table, write_json
from .inference import optimize_for_inference
from .measure import environment, interleaved, random_model
from .nn.explain import explain
from .ops.weight_cache import cache_info

RANDOM = "from random weights: means nothing"


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
    return [name for name in _models().resnet.__all__ if name.islower()]


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

    return _Builders(getattr(models, name), getattr(models.resnet.tv, name), get_model_weights(name))


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise CliError("--device cuda: torch sees no CUDA device here")
    return torch.device(name)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else environment()["cpu"]


# info


def _info(args: argparse.Namespace) -> int:
    facts = environment()
    found = backends()
    if args.json:
        known = {"backends": {n: asdict(b) for n, b in found.items()}, "cache": cache_info()._asdict()}
        print(json.dumps(facts | known, indent=2))
        return 0
    missing = {"torchvision": "not installed", "triton": "not installed", "cuda": "this torch has none"}
    for key in ("resnet_fast", "torch", "torchvision", "triton", "python", "cuda"):
        print(f"{key:<13}{facts[key] or missing[key]}")
    print(f"{'cpu':<13}{facts['cpu']}, {facts['threads']} threads, C++ kernels: {facts['isa_level']}")
    print(f"{'cuda devices':<13}{', '.join(facts['cuda_devices']) or 'none'}")
    print(f"{'cache':<13}{cache_info()}")
    print("backends")
    for backend in found.values():
        where = f"on {', '.join(backend.devices)}" if backend.available else "missing"
        print(f"  {backend.name:<11}{where}: {backend.reason}; for {', '.join(backend.operators)}")
    return 0


# explain


def _explain(args: argparse.Namespace) -> int:
    if args.train or args.layers:
        args.modules = True
    device = _device(args.device)
    if args.modules or device.type != "cpu":
        if args.plot:
            raise CliError("--plot: only of a model that is optimized for inference, on the CPU")
        return _explain_modules(args, device)
    _check_writable(args.plot, "--plot")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    images = torch.randn(args.batch, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    stock = random_model(_builders(args.model).stock, _batch_of(images))
    model = optimize_for_inference(stock, images, DTYPES[args.dtype])
    found, memory = model.explain(images), model.memory()
    if args.plot:
        try:
            found.plot(args.plot)
        except (ImportError, ValueError) as error:  # ValueError: a format that matplotlib has not
            raise CliError(f"--plot {args.plot}: {error}") from error
    if args.json:
        head = {"model": args.model, "batch": args.batch, "size": args.size, "dtype": args.dtype}
        print(json.dumps(head | found.to_dict() | {"memory": memory._asdict()}, indent=2))
    else:
        print(f"{args.model}, {args.batch}x3x{args.size}x{args.size}, {args.dtype}, optimized for inference")
        print(f"{found}\n{memory}")
    return 0


def _explain_modules(args: argparse.Namespace, device: torch.device) -> int:
    model = _builders(args.model).ours().to(device, DTYPES[args.dtype]).train(args.train)
    size = (args.batch, 3, args.size, args.size)
    images = torch.zeros(size, device=device, dtype=DTYPES[args.dtype]) if args.layers else None
    found = explain(model, images)
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
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else one_line(error)
        raise CliError(f"{path}: {reason}") from error


def _load_file(path: str) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CliError(f"{path}: no such file") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CliError(f"{path}: not a file of weights ({one_line(error)})") from error
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
            f"resnet-fast: the weights {member} cannot be downloaded ({one_line(error)}); going on with random "
            "weights, whose labels mean nothing. Offline, use --weights FILE.pth",
            file=sys.stderr,
        )
        return None


def _pair(builders: _Builders, weights: _Weights, images: Tensor) -> dict[str, nn.Module]:
    """Our model and torchvision's with the same weights, in eval mode."""
    if weights.state is None:
        state = random_model(builders.stock, _batch_of(images)).state_dict()
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
    return both.repeat(math.ceil(CALIBRATION_IMAGES / len(both)), 1, 1, 1)


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
    if device.type == "cpu":
        models[OURS] = optimize_for_inference(models[OURS], images[:1])
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


def _chosen_peers(args: argparse.Namespace, device: str) -> list[Peer]:
    """--peers with names: those; without: all; not given: those that come with torch."""
    known = peers(device)
    if args.peers:
        unknown = [name for name in args.peers if name not in known]
        if unknown:
            raise CliError(f"--peers: unknown {unknown[0]!r}; the peers on {device} are {', '.join(known)}")
        return [peer for name, peer in known.items() if name in (OURS, *args.peers)]
    chosen = [peer for peer in known.values() if args.peers is not None or not peer.packages]
    return [peer for peer in chosen if args.compile or not peer.compiled]


def _load_results(path: str, option: str) -> dict:
    try:
        with open(path) as file:
            found = json.load(file)
        _ = found["cells"], found["environment"]
    except OSError as error:
        raise CliError(f"{option} {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CliError(f"{option} {path}: not a file of `bench --json` ({one_line(error)})") from error
    return found


def _results_to_update(args: argparse.Namespace, found: dict) -> dict | None:
    """What --update adds to, measured where ``found`` is; None without it."""
    if not args.update:
        return None
    if args.json is None:
        raise CliError("--update needs the file of --json that it adds to")
    old = _load_results(args.json, "--update")
    differing = [line for line in compare.differences(old, found) if not line.startswith("commit")]
    if differing:
        raise CliError(f"--update {args.json}: measured elsewhere ({'; '.join(differing)})")
    return old


def _chosen_ways(args: argparse.Namespace, device: str) -> list[training.Way]:
    for option in ("update", "compare"):
        if getattr(args, option):
            raise CliError(f"--{option} is for passes forward, not for --train")
    known = training.ways(device)
    unknown = [name for name in args.peers or () if name not in known]
    if unknown:
        raise CliError(f"--peers: unknown {unknown[0]!r}; the ways to train on {device} are {', '.join(known)}")
    chosen = [way for name, way in known.items() if not args.peers or name in (OURS, *args.peers)]
    return [way for way in chosen if args.compile or not way.compiled]


def _bench_training(args: argparse.Namespace, names: list[str], device: str, chosen: list[training.Way]) -> int:
    from torch.hub import tqdm

    found = {"environment": environment(), "device": _device_name(torch.device(device)), "cells": []}
    right, cases = True, list(itertools.product(names, args.dtype, args.batch))
    with tqdm(total=len(cases) * len(chosen) * args.rounds, unit="step") as bar:
        for name, dtype, batch in cases:
            cell = cells.Cell(name, batch, dtype, device)
            results = training.run(cell, chosen, args.rounds, bar.update, args.seconds, args.memory is not False)
            print(f"\n{cell}, training step\n{training.to_text(cell, results)}", flush=True)
            found["cells"].append(training.to_dict(cell, results))
            write_json(args.json, found)
            right = right and not results[OURS].refused
    return int(not right)


def _bench(args: argparse.Namespace) -> int:
    names = args.models or ["resnet50"]
    for name in names:
        _builders(name)  # refuses an unknown one before anything is measured
    device = _device(args.device)
    args.batch = args.batch or ([16] if args.train else [1, 8])
    args.dtype = args.dtype or (["float32"] if args.train else ["float32", "bfloat16"])
    if not args.update:
        _check_writable(args.json)
    old = _load_results(args.compare, "--compare") if args.compare else None
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    chosen = _chosen_ways(args, device.type) if args.train else _chosen_peers(args, device.type)
    if device.type == "cpu" and "OMP_PROC_BIND" not in os.environ:
        print(
            "resnet-fast: OMP_PROC_BIND=true is not set; times may be far too long (see bench --help)", file=sys.stderr
        )
    if args.train:
        return _bench_training(args, names, device.type, chosen)

    roof = limits.ceilings(device.type)
    found = {"environment": environment(), "device": _device_name(device), "ceilings": roof.to_dict(), "cells": []}
    before = _results_to_update(args, found)
    peak, bandwidth = per_second(roof.flops["float32"], "FLOP"), per_second(roof.bandwidth, "B")
    print(f"{found['device']}, {torch.get_num_threads()} threads, torch {torch.__version__}; {peak}, {bandwidth}")
    right = _measure(args, names, device.type, chosen, found, before)
    if old is not None:
        print(f"\nagainst {args.compare}\n{table(compare.rows(old, found))}")
        print("\n".join(compare.differences(old, found)))
    return int(not right)


def _measure(
    args: argparse.Namespace, names: list[str], device: str, chosen: list[Peer], found: dict, before: dict | None
) -> bool:
    """Fills found["cells"]; whether this package's outputs were right in all of them. The file gets the cells of
    ``before`` too."""
    from torch.hub import tqdm  # works without the package tqdm

    memory = args.memory if args.memory is not None else args.peers is not None
    done: dict[cells.Cell, dict[str, cells.Result]] = {}
    calls = args.passes * len(names) * len(args.dtype) * len(args.batch) * len(chosen) * args.rounds
    with tqdm(total=calls, unit="call") as bar:
        for i in range(args.passes):
            for name, stock in cells.models(names):
                for dtype, batch in itertools.product(args.dtype, args.batch):
                    cell = cells.Cell(name, batch, dtype, device)
                    options = (memory and i == 0, bar.update, args.precision, args.seconds)
                    results = cells.run(cell, stock, chosen, args.rounds, *options)
                    done[cell] = cells.add(done[cell], results) if cell in done else results
                    if i == args.passes - 1:
                        print(f"\n{cell}\n{cells.to_text(cell, done[cell])}", flush=True)
                    found["cells"] = [
                        cells.to_dict(cell, results) | {"commit": found["environment"]["commit"]}
                        for cell, results in done.items()
                    ]
                    # what is measured stays, whatever happens later
                    write_json(args.json, compare.updated(before, found) if before else found)
    return not any(results[OURS].refused for results in done.values())


# report


def _report(args: argparse.Namespace) -> int:
    results, readme = Path(args.results), Path(args.readme)
    if not results.is_dir() or not report.folders(results):
        made_by = "bench --peers --json, benchmarks/cpu_layers.py --json, bench --train --json"
        raise CliError(
            f"--results {results}: no folder there holds a peers.json, cpu_layers.json or training.json ({made_by})"
        )
    try:
        text = readme.read_text()
        wanted = report.replace_section(text, report.section(results, readme))
        if args.check:
            if text != wanted:
                print(f"{readme}: its numbers are not those of {results}; run resnet-fast report", file=sys.stderr)
            return int(text != wanted)
        found = report.write_all(results, readme, args.plots)
    except OSError as error:
        raise CliError(f"--readme {readme}: {error.strerror}") from error
    except (ValueError, ImportError) as error:
        raise CliError(str(error)) from error
    for path in found:
        print(path / "REPORT.md")
    print(readme)
    return 0


def _check_writable(path: str | None, option: str = "--json") -> None:
    if path is None:
        return
    try:
        with open(path, "a"):
            pass
    except OSError as error:
        raise CliError(f"{option} {path}: {error.strerror}") from error


# The parser


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be a fraction between 0 and 1, got {text!r}")
    return value


_BENCH_TEXT = """\
Times this package (on a CPU the model optimized for inference, and resnet_fast.models' module) against others:
torchvision's model, eager and eager in channels_last, torch.compile and torch.compile with freezing (both in
channels_last); with --peers also OpenVINO, ONNX Runtime and ncnn on a CPU,
TensorRT and JAX on CUDA, as far as they are installed. All have the same random weights and as many threads, and run
in one process in turn, so that a slow minute hits all alike. Before it is timed, every output is compared with a
float64 run of torchvision's model ("error": RMS of the difference over RMS of the output); a wrong one is refused.

time / ours  the ratio of the means without the fastest and slowest tenth: 2.00 takes twice as long as resnet_fast;
             with half the width of its 95 % interval, from 6 samples on
of bound     the least time that this machine's measured arithmetic and memory allow, over the time
             (counted in direct convolutions: a Winograd kernel may pass 1)
ready s      seconds to convert or compile and to make the first call
peak MB      largest resident memory during calls, of a process in which the peer is alone (with Python and torch)

In a round resnet_fast, whose noise is in every ratio, runs before each of the others. Before each sample a peer whose
call takes less than 0.15 s runs untimed for 60 ms: with its weights in the caches and the other peers' threads asleep
it takes as long as alone in a process. A sample during which the system switched a thread out is dropped and counted.

A peer with 3 samples that has used up --seconds sits out the other rounds of the pass: torch's bfloat16 convolutions
take seconds on a CPU without instructions for it. Exit code 1 if resnet_fast itself is refused.

With --train: a step of resnet_fast.models' model, as it is and in lean mode (resnet_fast.nn.set_activation_memory),
of torchvision's, eager in both layouts, and of torch.compile. The first loss is compared with torch's; kept MB/image is
what is allocated between the forward and the backward pass.

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

    text = """\
Says of every layer of a model, optimized for inference on this CPU, which kernel computes it, how long it takes, and
what fraction of this machine's arithmetic that is; of what is not fused, why.

With --modules, or on CUDA: says for the stem and every block of resnet_fast.models' module whether it runs fused.
"""
    p = commands.add_parser("explain", help="kernels and times, layer by layer", description=text, formatter_class=raw)
    p.add_argument("model", metavar="MODEL", help=model)
    p.add_argument("--plot", metavar="FILE", help="draw the layers' times (.svg, .png, .pdf); needs matplotlib")
    p.add_argument("--threads", type=_positive, metavar="N", help="threads of torch (default: torch's)")
    text = "the blocks of resnet_fast.models' module instead"
    p.add_argument("--modules", action="store_true", help=text)
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    p.add_argument("--device", **device)
    p.add_argument("--train", action="store_true", help="with --modules: in training mode instead of eval")
    text = "with --modules: run the model once and list every convolution with its kernel"
    p.add_argument("--layers", action="store_true", help=text)
    p.add_argument("--batch", type=_positive, default=1, metavar="N", help="images (default: 1)")
    p.add_argument("--size", type=_positive, default=224, metavar="PX", help="their size (default: 224)")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.set_defaults(run=_explain)

    p = commands.add_parser("bench", help="time against torchvision", description=_BENCH_TEXT, formatter_class=raw)
    p.add_argument("models", nargs="*", metavar="MODEL", help=f"{model} (default: resnet50)")
    p.add_argument("--batch", type=_positive, nargs="+", metavar="N", help="default: 1 8; with --train 16")
    dtypes = "default: float32 bfloat16; with --train float32"
    p.add_argument("--dtype", choices=DTYPES, nargs="+", help=dtypes)
    text = "time training steps instead: forward, backward, SGD; in 16 bits under autocast"
    p.add_argument("--train", action="store_true", help=text)
    p.add_argument("--device", **device)
    p.add_argument(
        "--rounds", type=_positive, default=20, metavar="N", help="samples of each peer in a pass (default: 20)"
    )
    text = "go through the whole table N times, every engine made anew, so that samples lie far apart (default: 1)"
    p.add_argument("--passes", type=_positive, default=1, metavar="N", help=text)
    seconds = cells.SECONDS_PER_PEER
    text = f"seconds of samples after which a peer sits out a pass (default: {seconds:.0f})"
    p.add_argument("--seconds", type=_positive, default=seconds, metavar="S", help=text)
    text = f"go on until every ratio is known to this, such as 0.03, or {cells.MOST} times the rounds or seconds"
    p.add_argument("--precision", type=_fraction, default=math.inf, metavar="P", help=text)
    p.add_argument("--threads", type=_positive, metavar="N", help="threads of torch on the CPU (default: torch's)")
    p.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    names = ", ".join(dict.fromkeys(peer.name for peer in PEERS if peer.packages))
    text = f"also engines that do not come with torch ({names}); with names, those peers alone (models come first)"
    p.add_argument("--peers", nargs="*", metavar="NAME", help=text)
    text = "measure memory in a process for each peer, or not (default: with --peers)"
    p.add_argument("--memory", action=argparse.BooleanOptionalAction, default=None, help=text)
    p.add_argument("--json", metavar="FILE", help="write all samples, versions and hardware to FILE")
    text = "keep the other cells of --json FILE, which must come from the same machine, threads and torch"
    p.add_argument("--update", action="store_true", help=text)
    text = "mark what moved beyond its spread since that file of --json was written"
    p.add_argument("--compare", metavar="OLD.json", help=text)
    p.set_defaults(run=_bench)

    text = """\
Writes, from the JSON of each folder of results alone, its REPORT.md and plots, and the section of numbers of a README
between its two marks.
"""
    p = commands.add_parser("report", help="pages and plots from results", description=text)
    text = "folder of folders of results, one a device (default: benchmarks/results)"
    p.add_argument("--results", default="benchmarks/results", metavar="DIR", help=text)
    p.add_argument("--readme", default="README.md", metavar="FILE", help="default: README.md")
    p.add_argument("--no-plots", dest="plots", action="store_false", help="tables only, without matplotlib")
    p.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the README's numbers differ")
    p.set_defaults(run=_report)
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
