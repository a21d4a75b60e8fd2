"""Everything worth doing when a CUDA machine is at hand, in one command:

    python benchmarks/gpu_campaign.py --out DIR [--steps doctor,test,kernels,models] [--budget 500]

    doctor   the device, versions, and the two ceilings: copy bandwidth and a large matrix product
    test     pytest -m gpu
    kernels  add_relu and every convolution of the models with its BatchNorm, residual and ReLU, against torch and cuDNN
    tune     candidate tiles of the Triton convolution on the same layers (compiles on all cores first)
    models   whole models against torch eager and torch.compile
    train    a training step of whole models

No step starts a new row once the budget is spent. Each row goes to DIR/campaign.jsonl as soon as it is measured; tables
are printed last. Every output is compared with float64 first ("error": RMS of the difference over RMS of the output).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import resnet_fast
from resnet_fast import models, use_backend
from resnet_fast.measure import calibrate, environment, interleaved, ratio, relative_rms
from resnet_fast.ops import add_relu, conv_bn_relu

OURS = "ours"
ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-2}  # float32 runs in TF32


class Campaign:
    """The rows measured so far and the time that is left for more."""

    def __init__(self, out: Path, budget: float) -> None:
        self.out, self.budget, self.start = out, budget, time.monotonic()
        self.rows: list[dict] = []
        out.mkdir(parents=True, exist_ok=True)

    def has_time(self) -> bool:
        return time.monotonic() - self.start < self.budget

    def add(self, step: str, name: str, **figures) -> None:
        row = {"step": step, "name": name, **figures, "at_s": round(time.monotonic() - self.start, 1)}
        self.rows.append(row)
        with open(self.out / "campaign.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    @contextmanager
    def guard(self, step: str, name: str) -> Iterator[None]:
        """What fails is a row too, and the campaign goes on."""
        try:
            yield
        except Exception as error:
            self.add(step, name, error_message=f"{type(error).__name__}: {error}"[:300])
        finally:
            torch._dynamo.reset()
            torch.cuda.empty_cache()


# Shapes


@dataclass(frozen=True)
class Layer:
    """A convolution as a model calls it, with what follows: BatchNorm always, then a residual and a ReLU or not."""

    channels: int
    filters: int
    kernel: int
    stride: int
    groups: int
    size: int  # of the square input map
    residual: bool
    relu: bool

    @property
    def out_size(self) -> int:
        return (self.size - 1) // self.stride + 1

    def flops(self, batch: int) -> float:
        taps = self.channels // self.groups * self.kernel**2
        return 2.0 * batch * self.out_size**2 * self.filters * taps

    def bytes(self, batch: int, element: int) -> float:
        """Least traffic of the fused operator: what is needed of the input, the weight, the residual, the output."""
        read = self.size if self.kernel > 1 else self.out_size
        maps = read**2 * self.channels + self.out_size**2 * self.filters * (2 if self.residual else 1)
        return element * (batch * maps + self.filters * self.channels // self.groups * self.kernel**2)

    def __str__(self) -> str:
        tail = ("+res" if self.residual else "") + ("+relu" if self.relu else "")
        groups = f" g{self.groups}" if self.groups > 1 else ""
        return f"{self.kernel}x{self.kernel} {self.channels}->{self.filters} s{self.stride} @{self.size}{groups}{tail}"


def layers(name: str) -> Counter[Layer]:
    """The distinct convolutions of torchvision's model and how often each occurs."""
    with torch.device("meta"):
        model, image = getattr(torchvision.models, name)(), torch.empty(1, 3, 224, 224)
    found: Counter[Layer] = Counter()

    def visit(module_name: str):
        last = "conv3" if hasattr(model.layer1[0], "conv3") else "conv2"
        residual = module_name.startswith("layer") and module_name.endswith(last)
        relu = "downsample" not in module_name

        def hook(conv: nn.Conv2d, args: tuple) -> None:
            shape = (conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], conv.groups)
            found[Layer(*shape, args[0].shape[2], residual, relu)] += 1

        return hook

    for module_name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(visit(module_name))
    model(image)
    return found


def problem(layer: Layer, batch: int, dtype: torch.dtype) -> tuple[dict, dict]:
    """Arguments of conv_bn_relu: tensors of random values on the GPU, channels_last; and numbers."""
    cl = {"memory_format": torch.channels_last}
    fan_in = layer.channels // layer.groups * layer.kernel**2
    shape = (layer.filters, layer.channels // layer.groups, layer.kernel, layer.kernel)
    x = torch.randn(batch, layer.channels, layer.size, layer.size, device="cuda", dtype=dtype)
    bn = [torch.rand(layer.filters, device="cuda") + 0.5 for _ in range(4)]
    tensors = {"input": x.to(**cl), "weight": (torch.randn(shape, device="cuda") / fan_in**0.5).to(dtype).to(**cl)}
    tensors |= {"bias": None} | dict(zip(("bn_weight", "bn_bias", "running_mean", "running_var"), bn, strict=True))
    size = (batch, layer.filters, layer.out_size, layer.out_size)
    residual = torch.randn(size, device="cuda", dtype=dtype).to(**cl) if layer.residual else None
    numbers = {"stride": layer.stride, "padding": layer.kernel // 2, "groups": layer.groups, "relu": layer.relu}
    return tensors | {"residual": residual}, numbers


# Measuring


def gpu_ms(function: Callable[[], object]) -> float:
    """Median milliseconds on the GPU, each call with a cold L2 cache."""
    from triton.testing import do_bench

    return do_bench(function, warmup=10, rep=40, return_mode="median")


def eager(tensors: dict, numbers: dict) -> Tensor:
    """What torch runs in eval mode: convolution, BatchNorm, add, ReLU, each in a pass of its own."""
    t = tensors
    y = F.conv2d(t["input"], t["weight"], None, numbers["stride"], numbers["padding"], 1, numbers["groups"])
    y = F.batch_norm(y, t["running_mean"], t["running_var"], t["bn_weight"], t["bn_bias"], eps=1e-5)
    if t["residual"] is not None:
        y += t["residual"]
    return y.relu_() if numbers["relu"] else y


def cudnn_fused(tensors: dict, numbers: dict) -> Callable[[], Tensor] | None:
    """cuDNN's convolution + bias (+ residual) + ReLU with BatchNorm folded into the weight; it always has the ReLU."""
    if not numbers["relu"]:
        return None
    x, w = tensors["input"], tensors["weight"]
    scale = tensors["bn_weight"] / (tensors["running_var"] + 1e-5).sqrt()
    bias = (tensors["bn_bias"] - tensors["running_mean"] * scale).to(x.dtype)
    w = (w.float() * scale.view(-1, 1, 1, 1)).to(x.dtype).contiguous(memory_format=torch.channels_last)
    geometry = ([numbers["stride"]] * 2, [numbers["padding"]] * 2, [1, 1], numbers["groups"])
    z = tensors["residual"]
    if z is None:
        return lambda: torch.cudnn_convolution_relu(x, w, bias, *geometry)
    return lambda: torch.cudnn_convolution_add_relu(x, w, z, 1.0, bias, *geometry)


def layer_calls(tensors: dict, numbers: dict) -> dict[str, Callable[[], Tensor]]:
    conv = (tensors["input"], tensors["weight"], None, numbers["stride"], numbers["padding"], 1, numbers["groups"])
    calls = {
        "torch": lambda: eager(tensors, numbers),
        "torch convolution alone": lambda: F.conv2d(*conv),
        "cudnn fused": cudnn_fused(tensors, numbers),
        "ours": lambda: conv_bn_relu(**tensors, **numbers),
        "ours, cuda": _forced("cuda", lambda: conv_bn_relu(**tensors, **numbers)),
        "ours, triton": _forced("triton", lambda: conv_bn_relu(**tensors, **numbers)),
    }
    return {name: call for name, call in calls.items() if call is not None}


def reference(tensors: dict, numbers: dict, images: int) -> Tensor:
    part = {n: None if t is None else t.double() for n, t in tensors.items()}
    part["input"] = part["input"][:images]
    if part["residual"] is not None:
        part["residual"] = part["residual"][:images]
    return eager(part, numbers)


# Steps


def doctor(campaign: Campaign, args: argparse.Namespace) -> None:
    campaign.add("doctor", "environment", **environment())
    for name, backend in resnet_fast.backends().items():
        campaign.add("doctor", f"backend {name}", available=backend.available, reason=backend.reason)
    n = 1 << 30
    x, y = (
        torch.randint(0, 255, (n,), dtype=torch.uint8, device="cuda"),
        torch.empty(n, dtype=torch.uint8, device="cuda"),
    )
    campaign.add("doctor", "copy", tb_s=2 * n / gpu_ms(lambda: y.copy_(x)) / 1e9)
    for name in args.dtype:
        a, b = (torch.randn(8192, 8192, device="cuda").to(DTYPES[name]) for _ in range(2))
        campaign.add("doctor", f"matmul 8192 {name}", tflops=2 * 8192**3 / gpu_ms(lambda a=a, b=b: a @ b) / 1e9)


def test(campaign: Campaign, args: argparse.Namespace) -> None:
    # Most of the time goes into Triton's compiler, so with pytest-xdist on all cores.
    workers = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--maxfail=60", *workers, str(ROOT / "tests")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(30.0, args.budget))
    (campaign.out / "gpu_tests.txt").write_text(done.stdout + done.stderr)
    campaign.add("test", "pytest -m gpu", returncode=done.returncode, summary=done.stdout.strip().splitlines()[-12:])


def kernels(campaign: Campaign, args: argparse.Namespace) -> None:
    for name, batch in itertools.product(args.dtype, args.batch):
        dtype = DTYPES[name]
        for channels, size in ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)):
            a, b = (torch.randn(batch, channels, size, size, device="cuda", dtype=dtype) for _ in range(2))
            ms = {"torch": gpu_ms(lambda a=a, b=b: torch.relu(a + b))}
            for backend in ("cuda", "triton"):
                with campaign.guard("kernels", f"add_relu {channels}@{size} {backend}"), use_backend(backend):
                    assert torch.equal(add_relu(a, b), torch.relu(a + b))
                    ms[backend] = gpu_ms(lambda a=a, b=b: add_relu(a, b))
            traffic = 3 * a.numel() * a.element_size()
            tb_s = {way: traffic / t / 1e9 for way, t in ms.items()}
            campaign.add("kernels", f"add_relu {channels}@{size}", dtype=name, batch=batch, ms=ms, tb_s=tb_s)

        for layer in dict.fromkeys(layer for model in args.models for layer in layers(model)):
            if not campaign.has_time():
                return
            with campaign.guard("kernels", str(layer)):
                campaign.add("kernels", str(layer), dtype=name, batch=batch, **time_layer(layer, batch, dtype))


def time_layer(layer: Layer, batch: int, dtype: torch.dtype) -> dict:
    tensors, numbers = problem(layer, batch, dtype)
    images = min(batch, 8)
    ref = reference(tensors, numbers, images)
    calls, ms, error = layer_calls(tensors, numbers), {}, {}
    with torch.no_grad():
        for way, call in calls.items():
            try:
                if way != "torch convolution alone":
                    error[way] = relative_rms(call()[:images], ref)
                ms[way] = gpu_ms(call)
            except RuntimeError as failure:
                error[way] = str(failure)[:200]
    best = ms["ours"]
    return {
        "layer": asdict(layer), "ms": ms, "error": error,
        "tflops": layer.flops(batch) / best / 1e9, "tb_s": layer.bytes(batch, dtype.itemsize) / best / 1e9,
    }  # fmt: skip


# Tiles worth trying for 16-bit operands: rows, columns, depth, warps, stages.
TILES = [
    (m, n, k, warps, stages)
    for m, n, warps in ((64, 64, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 64, 8),
                        (256, 128, 8), (64, 128, 4), (64, 256, 8))
    for k, stages in ((32, 4), (64, 2), (64, 3), (64, 4), (128, 2))
    if (m + n) * k * 2 * stages <= 200 * 1024
]  # fmt: skip


def _patched_tile(tile: tuple):
    from unittest import mock

    from resnet_fast.kernels import conv_bn_relu as module

    table = {key: module.ConvConfig(*tile) for key in module.CONFIGS["default"]}
    return mock.patch.dict(module.CONFIGS, {key: table for key in module.CONFIGS if key != "interpreter"})


def _compile_tile(job: tuple) -> str | None:
    """Runs a layer once on one image, so that its kernel lies in Triton's cache; in a process of its own."""
    layer, dtype, tile = job
    try:
        tensors, numbers = problem(layer, 1, dtype)
        with torch.no_grad(), use_backend("triton"), _patched_tile(tile):
            conv_bn_relu(**tensors, **numbers)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return None


def tune(campaign: Campaign, args: argparse.Namespace) -> None:
    dtype, batch = DTYPES[args.dtype[0]], args.batch[0]
    found = [layer for model in args.models for layer in layers(model) if layer.channels > 3]
    found = list(dict.fromkeys(found))
    jobs = [(layer, dtype, tile) for layer in found for tile in TILES]
    # One job per kernel: sizes are not specialised.
    distinct = {
        (j[0].channels, j[0].filters, j[0].kernel, j[0].stride, j[0].residual, j[0].relu, j[2]): j for j in jobs
    }
    start = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(min(16, os.cpu_count() or 1)) as pool:
        failures = Counter(filter(None, pool.imap_unordered(_compile_tile, distinct.values())))
    campaign.add("tune", "compiled", kernels=len(distinct), s=round(time.monotonic() - start), failures=dict(failures))
    for layer in found:
        if not campaign.has_time():
            return
        with campaign.guard("tune", str(layer)):
            tensors, numbers = problem(layer, batch, dtype)
            ms = {}
            for tile in TILES:
                with torch.no_grad(), use_backend("triton"), _patched_tile(tile):
                    try:
                        ms[",".join(map(str, tile))] = gpu_ms(lambda t=tensors, n=numbers: conv_bn_relu(**t, **n))
                    except Exception:
                        continue
            campaign.add(
                "tune", str(layer), dtype=args.dtype[0], batch=batch, ms=dict(sorted(ms.items(), key=lambda x: x[1]))
            )


def _graphed(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same work as a replayed CUDA graph: no Python, no launch gaps."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def _forced(backend: str | None, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with use_backend(backend):
            return function()

    return call


def model_calls(name: str, batch: int, dtype: torch.dtype, compile_modes: list[str]) -> tuple[dict, Tensor]:
    """Ways to run a model, by name, and what it computes in float64 for the first 8 images."""
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 224, 224, device="cuda")
    stock = calibrate(
        getattr(torchvision.models, name)().cuda(), x[:8] if batch >= 8 else torch.randn(8, 3, 224, 224, device="cuda")
    )
    ref = copy.deepcopy(stock).double()(x[:8].double())
    ours = getattr(models, name)(weights=None).cuda().eval()
    ours.load_state_dict(stock.state_dict())
    stock, ours, x = stock.to(dtype), ours.to(dtype), x.to(dtype)
    channels_last = copy.deepcopy(stock).to(memory_format=torch.channels_last)
    x_cl = x.to(memory_format=torch.channels_last)
    ours_cl = copy.deepcopy(ours).to(memory_format=torch.channels_last)
    calls = {
        "torch": lambda: stock(x),
        "torch channels_last": lambda: channels_last(x_cl),
        "torch channels_last, graph": _graphed(lambda: channels_last(x_cl)),
        OURS: lambda: ours(x),
        "ours, channels_last": lambda: ours_cl(x_cl),
        "ours, channels_last, graph": _graphed(lambda: ours_cl(x_cl)),
    }
    for mode in compile_modes:
        compiled = torch.compile(copy.deepcopy(channels_last), mode=mode)
        calls[f"torch.compile {mode}"] = lambda compiled=compiled: compiled(x_cl)
    return calls, ref


@torch.no_grad()
def run_models(campaign: Campaign, args: argparse.Namespace) -> None:
    torch.backends.cudnn.benchmark = True
    for name, dtype, batch in itertools.product(args.models, args.dtype, args.batch):
        if not campaign.has_time():
            return
        modes = args.compile.split(",") if args.compile else []
        with campaign.guard("models", f"{name} {dtype} batch {batch}"):
            calls, ref = model_calls(name, batch, DTYPES[dtype], modes)
            first_call_s, error = {}, {}
            for way, call in list(calls.items()):
                start = time.monotonic()
                try:
                    error[way] = relative_rms(call()[:8], ref)
                except Exception as failure:
                    error[way] = f"{type(failure).__name__}: {failure}"[:200]
                    del calls[way]
                torch.cuda.synchronize()
                first_call_s[way] = round(time.monotonic() - start, 1)
            times = interleaved(calls, rounds=args.rounds)
            campaign.add(
                "models", f"{name} {dtype} batch {batch}",
                ms={w: 1e3 * t.median for w, t in times.items()}, img_s={w: batch / t.median for w, t in times.items()},
                ratio={w: ratio(t, times[OURS]) for w, t in times.items()}, error=error, first_call_s=first_call_s,
            )  # fmt: skip


def train(campaign: Campaign, args: argparse.Namespace) -> None:
    torch.backends.cudnn.benchmark = True
    for name, batch in itertools.product(args.models, args.batch):
        for way in ("torch channels_last", "ours", "torch.compile"):
            if not campaign.has_time():
                return
            with campaign.guard("train", f"{name} batch {batch} {way}"):
                library = models if way == "ours" else torchvision.models
                model = getattr(library, name)().cuda().to(memory_format=torch.channels_last).train()
                run = torch.compile(model) if way == "torch.compile" else model
                optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
                x = torch.randn(batch, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
                labels = torch.randint(0, 1000, (batch,), device="cuda")

                def step(run=run, x=x, labels=labels, optimizer=optimizer) -> None:
                    with torch.autocast("cuda", torch.bfloat16):
                        loss = F.cross_entropy(run(x), labels)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()

                torch.cuda.reset_peak_memory_stats()
                timing = interleaved({"step": step}, rounds=args.rounds)["step"]
                figures = {"ms": 1e3 * timing.median, "img_s": batch / timing.median}
                figures["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
                campaign.add("train", f"{name} batch {batch} {way}", **figures)


STEPS = {"doctor": doctor, "test": test, "kernels": kernels, "tune": tune, "models": run_models, "train": train}


def report(campaign: Campaign) -> str:
    """One line a row, for a reader of the terminal."""

    def short(value):
        if isinstance(value, float):
            return float(f"{value:.3g}")
        if isinstance(value, dict):
            return {k: short(v) for k, v in itertools.islice(value.items(), 8)}
        return value

    hidden = ("step", "name", "layer", "at_s")
    return "\n".join(
        f"{r['step']:8} {r['name']:34} " + " ".join(f"{k}={short(v)}" for k, v in r.items() if k not in hidden)
        for r in campaign.rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for campaign.jsonl and logs")
    parser.add_argument("--steps", default="doctor,test,kernels,models", help=f"of {','.join(STEPS)}")
    parser.add_argument("--models", nargs="+", default=["resnet50", "resnet18"])
    parser.add_argument("--batch", nargs="+", type=int, default=[256])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--compile", default="default", help="torch.compile modes, comma-separated; empty for none")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=500, help="seconds after which no new row is started")
    args = parser.parse_args()
    unknown = set(args.steps.split(",")) - set(STEPS)
    if unknown:
        parser.error(f"--steps must be of {','.join(STEPS)}, got {','.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    campaign = Campaign(args.out, args.budget)
    for name in args.steps.split(","):
        with campaign.guard(name, name):
            STEPS[name](campaign, args)
    print(report(campaign))
    return 0


if __name__ == "__main__":
    sys.exit(main())
