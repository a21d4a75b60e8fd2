"""Single operators at the shapes of a model: random arguments, the ways to run them, their times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import backends, triton_interpreted, use_backend
from ..measure import interleaved, relative_rms
from ..ops import add_relu, conv_bn_relu
from . import limits
from .cells import one_line, tolerance
from .layers import Layer, distinct, read
from .limits import Kernel

EPS = 1e-5
CHECKED_IMAGES = 8  # of a batch are compared with float64
Calls = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Problem:
    """A fused convolution with its arguments: ``tensors`` by name, channels_last; ``numbers`` are the rest."""

    layer: Layer
    tensors: dict[str, Tensor | None]
    numbers: dict

    def eager(self, tensors: dict[str, Tensor | None]) -> Tensor:
        """What torch runs in eval mode: convolution, BatchNorm, add, ReLU, each in a pass of its own."""
        t, n = tensors, self.numbers
        y = F.conv2d(t["input"], t["weight"], None, n["stride"], n["padding"], 1, n["groups"])
        y = F.batch_norm(y, t["running_mean"], t["running_var"], t["bn_weight"], t["bn_bias"], eps=EPS)
        if t["residual"] is not None:
            y += t["residual"]
        return y.relu_() if n["relu"] else y

    def reference(self) -> Tensor:
        """The first CHECKED_IMAGES images of the output, in float64."""
        part = {name: None if t is None else t.double() for name, t in self.tensors.items()}
        for name in ("input", "residual"):
            part[name] = None if part[name] is None else part[name][:CHECKED_IMAGES]
        return self.eager(part)


def problem(layer: Layer, batch: int, dtype: torch.dtype, device: str) -> Problem:
    """Random arguments of conv_bn_relu for a layer; outputs near unit variance."""
    cl = {"memory_format": torch.channels_last}
    shape = (layer.filters, layer.channels // layer.groups, layer.kernel, layer.kernel)
    fan_in = layer.weights // layer.filters
    x = torch.randn(batch, layer.channels, layer.size, layer.size, device=device, dtype=dtype)
    bn = [torch.rand(layer.filters, device=device) + 0.5 for _ in range(4)]
    tensors = {"input": x.to(**cl), "weight": (torch.randn(shape, device=device) / fan_in**0.5).to(dtype).to(**cl)}
    tensors |= {"bias": None} | dict(zip(("bn_weight", "bn_bias", "running_mean", "running_var"), bn, strict=True))
    if x.device.type == "cpu":  # stock batch_norm mixes dtypes on a GPU alone
        tensors |= {name: tensors[name].to(dtype) for name in ("bn_weight", "bn_bias", "running_mean", "running_var")}
    size = (batch, layer.filters, layer.out_size, layer.out_size)
    tensors["residual"] = torch.randn(size, device=device, dtype=dtype).to(**cl) if layer.residual else None
    numbers = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups, "relu": layer.relu}
    return Problem(layer, tensors, numbers)


def forced(backend: str, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call on one backend."""

    def run() -> Tensor:
        with use_backend(backend):
            return call()

    return run


def _our_ways(operator: str, device: str, call: Callable[[], Tensor]) -> Calls:
    """As the chooser has it, and on every backend by itself; Triton's interpreter would measure Python."""
    ways = {"ours": call}
    for name, backend in backends().items():
        here = device in backend.devices and operator in backend.operators
        if here and name != "reference" and not (name == "triton" and triton_interpreted()):
            ways[f"ours, {name}"] = forced(name, call)
    return ways


def cudnn_fused(
    weight: Tensor,  # [K, C / groups, R, S]
    bn_weight: Tensor,  # [K], as the following three
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
) -> Callable[..., Tensor]:
    """A function of an input and a residual or None: cuDNN's convolution + bias (+ residual) + ReLU, with BatchNorm
    folded into weight and bias beforehand. It always has the ReLU."""
    scale = bn_weight.float() / (running_var.float() + eps).sqrt()
    bias = (bn_bias.float() - running_mean.float() * scale).to(weight.dtype)
    folded = (weight.float() * scale.view(-1, 1, 1, 1)).to(weight.dtype).contiguous(memory_format=torch.channels_last)
    geometry = (stride, padding, [1, 1], groups)

    def call(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return torch.cudnn_convolution_relu(x, folded, bias, *geometry)
        return torch.cudnn_convolution_add_relu(x, folded, residual, 1.0, bias, *geometry)

    return call


def layer_calls(problem: Problem) -> Calls:
    """Every way to run a layer, by name."""
    t, n = problem.tensors, problem.numbers
    x, w = t["input"], t["weight"]
    calls = {
        "torch": lambda: problem.eager(t),
        "torch convolution alone": lambda: F.conv2d(x, w, None, n["stride"], n["padding"], 1, n["groups"]),
    }
    if x.is_cuda and n["relu"]:
        vectors = (t["bn_weight"], t["bn_bias"], t["running_mean"], t["running_var"])
        fused = cudnn_fused(w, *vectors, EPS, [n["stride"]] * 2, [n["padding"]] * 2, n["groups"])
        calls["cudnn fused"] = lambda: fused(x, t["residual"])
    return calls | _our_ways("conv_bn_relu", x.device.type, lambda: conv_bn_relu(**t, **n))


def milliseconds(calls: Calls, device: str) -> dict[str, float]:
    """Median milliseconds of each: on CUDA by events, with a cold L2 cache; on the CPU interleaved, 5-50 rounds."""
    if device == "cuda":
        from triton.testing import do_bench

        return {way: do_bench(call, warmup=10, rep=40, return_mode="median") for way, call in calls.items()}
    slowest = max(timing.median for timing in interleaved(calls, 1).values())
    rounds = int(min(50, max(5, 0.3 / slowest)))
    return {way: 1e3 * timing.median for way, timing in interleaved(calls, rounds, budget=2.0).items()}


def _row(kernel: Kernel, batch: int, dtype: torch.dtype, device: str, ms: dict, error: dict) -> dict:
    """Figures of an operator: ``fraction_of_bound`` is the least possible time over ours."""
    bound = limits.bound([kernel], batch, dtype, limits.ceilings(device))
    ours = ms.get("ours")
    row = {"ms": ms, "error": error, "flops": bound.flops, "bytes": bound.bytes, "bound_ms": 1e3 * bound.seconds}
    return row | (bound.figures(ours / 1e3) if ours else {"bound": bound.by})


@torch.no_grad()
def time_layer(layer: Layer, batch: int, dtype: torch.dtype, device: str) -> dict:
    """Checks every way to run a layer against float64 and times those that are right: a row of results."""
    work = problem(layer, batch, dtype, device)
    reference, error, calls = work.reference(), {}, {}
    for way, call in layer_calls(work).items():
        try:
            out = call()[:CHECKED_IMAGES]
        except RuntimeError as failure:
            error[way] = one_line(failure)
            continue
        if way != "torch convolution alone":
            error[way] = relative_rms(out, reference)
        if error.get(way, 0.0) < tolerance(device, dtype):  # so that NaN is not timed
            calls[way] = call
    return _row(limits.layer_kernel(layer), batch, dtype, device, milliseconds(calls, device), error)


def residual_maps(models: list[str]) -> list[tuple[int, int]]:
    """(channels, size) of every map that a residual is added to."""
    return list(dict.fromkeys((la.filters, la.out_size) for m in models for la in read(m) if la.residual))


@torch.no_grad()
def time_add_relu(channels: int, size: int, batch: int, dtype: torch.dtype, device: str) -> dict:
    """Checks every way to run add_relu bit for bit and times those that are right: a row of results."""
    shape = (batch, channels, size, size)
    a, b = (torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last) for _ in range(2))
    calls = {"torch": lambda: torch.relu(a + b)} | _our_ways("add_relu", device, lambda: add_relu(a, b))
    reference = torch.relu(a + b)
    error = {way: 0.0 if torch.equal(call(), reference) else float("inf") for way, call in calls.items()}
    calls = {way: call for way, call in calls.items() if error[way] == 0}
    kernel = limits.add_relu_kernel(channels, size)
    return _row(kernel, batch, dtype, device, milliseconds(calls, device), error)


def distinct_layers(models: list[str], containing: str = "") -> list[Layer]:
    """One layer of every shape that occurs in the models and whose description contains a text."""
    return [layer for layer in distinct(models) if containing in str(layer)]
