"""Single operators at the shapes of a model: random arguments, the ways to run them, their times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import backends, cuda_emulated, triton_interpreted, use_backend
from ..measure import interleaved, relative_rms
from ..ops import (
    add_relu,
    avg_pool_flatten,
    batch_norm_relu,
    batch_norm_relu_projection,
    batch_norm_relu_projection_ref,
    batch_norm_relu_ref,
    conv_bn_relu,
    conv_bn_relu_max_pool,
    conv_bn_relu_projection,
    max_pool,
)
from . import limits
from .cells import one_line, tolerance
from .layers import Block, Layer, blocks, distinct, read, stem
from .limits import Kernel
from .peers import graphed

EPS = 1e-5
POOL = (3, 2, 1)  # kernel_size, stride and padding of a ResNet's max-pooling
CONVOLUTION, PRODUCT, COPY = "torch convolution alone", "cuBLAS alone", "copy of the same bytes"
ALONE = (CONVOLUTION, PRODUCT, COPY)  # timed though they compute less than the others
CHECKED_IMAGES = 8  # of a batch are compared with float64
Calls = dict[str, Callable[[], Tensor]]
RACERS: list[Callable[[Problem], Calls]] = []  # what a benchmark adds: more ways to run a fused convolution


def checked(t: Tensor) -> Tensor:
    """Images that are compared with float64: the first of a batch and the last, which other tiles compute."""
    half = CHECKED_IMAGES // 2
    return t if len(t) <= CHECKED_IMAGES else torch.cat([t[:half], t[-half:]])


# Operators with their arguments. Each has ``ours`` (the operator), ``others`` (torch's and cuDNN's ways to compute the
# same), ``reference`` (the checked images in float64) and ``kernel`` (its least work); some have ``in_two_calls``.


@dataclass(frozen=True)
class Problem:
    """A fused convolution with its arguments: ``tensors`` by name, channels_last; ``numbers`` are the rest."""

    layer: Layer
    tensors: dict[str, Tensor | None]
    numbers: dict

    operator = "conv_bn_relu"
    in_two_calls = None

    @property
    def kernel(self) -> Kernel:
        return limits.layer_kernel(self.layer)

    def ours(self) -> Tensor:
        return conv_bn_relu(**self.tensors, **self.numbers)

    def convolution(self, tensors: dict[str, Tensor | None]) -> Tensor:
        n = self.numbers
        return F.conv2d(tensors["input"], tensors["weight"], None, n["stride"], n["padding"], 1, n["groups"])

    def eager(self, tensors: dict[str, Tensor | None]) -> Tensor:
        """What torch runs in eval mode: convolution, BatchNorm, add, ReLU, each in a pass of its own."""
        t, y = tensors, self.convolution(tensors)
        y = F.batch_norm(y, t["running_mean"], t["running_var"], t["bn_weight"], t["bn_bias"], eps=EPS)
        if t["residual"] is not None:
            y += t["residual"]
        return y.relu_() if self.numbers["relu"] else y

    def in_double(self) -> dict[str, Tensor | None]:
        """The tensors in float64, of maps the checked images."""
        maps = {name: checked(t) for name in ("input", "residual") if (t := self.tensors[name]) is not None}
        return {name: None if t is None else t.double() for name, t in (self.tensors | maps).items()}

    def reference(self) -> Tensor:
        return self.eager(self.in_double())

    def folded(self) -> tuple[Tensor, Tensor]:
        """`folded` of this layer."""
        t = self.tensors
        return folded(t["weight"], t["bn_weight"], t["bn_bias"], t["running_mean"], t["running_var"], EPS)

    def product(self) -> Callable[[], Tensor] | None:
        """What a 1x1 convolution with stride 1 comes down to: maps as [N H W, C] times the weight as [C, K]."""
        if self.layer.kernel != 1 or self.layer.stride != 1 or self.layer.groups != 1:
            return None
        x = self.tensors["input"].permute(0, 2, 3, 1).reshape(-1, self.layer.channels)
        weight = self.tensors["weight"].reshape(self.layer.filters, self.layer.channels).t()
        return lambda: _product(x, weight)

    def cudnn(self) -> Callable[..., Tensor]:
        """`cudnn_fused` of this layer."""
        n = self.numbers
        return cudnn_fused(*self.folded(), [n["stride"]] * 2, [n["padding"]] * 2, n["groups"], n["relu"])

    def others(self) -> Calls:
        t = self.tensors
        calls = {"torch": lambda: self.eager(t), CONVOLUTION: lambda: self.convolution(t)}
        if t["input"].is_cuda:
            if product := self.product():
                calls[PRODUCT] = product
            if self.numbers["relu"]:
                fused = self.cudnn()
                calls["cudnn fused"] = lambda: fused(t["input"], t["residual"])
        for racer in RACERS:
            calls |= racer(self)
        return calls


@dataclass(frozen=True)
class Projection:
    """The end of a residual block: ``main``, its last convolution, to which the projection shortcut is added."""

    block: Block
    main: Problem
    shortcut: Problem

    operator = "conv_bn_relu_projection"

    @property
    def kernel(self) -> Kernel:
        return limits.projection_kernel(self.block)

    @cached_property
    def arguments(self) -> dict:
        parts = {"": self.main, "shortcut_": self.shortcut}
        found = {
            prefix + name: value
            for prefix, part in parts.items()
            for name, value in (part.tensors | part.numbers).items()
            if name not in ("residual", "relu")
        }
        return {"shortcut": found.pop("shortcut_input")} | found

    def ours(self) -> Tensor:
        return conv_bn_relu_projection(**self.arguments)

    def in_two_calls(self) -> Tensor:
        return conv_bn_relu(**self.main.tensors | {"residual": self.shortcut.ours()}, **self.main.numbers)

    def eager(self) -> Tensor:
        return self.main.eager(self.main.tensors | {"residual": self.shortcut.eager(self.shortcut.tensors)})

    def reference(self) -> Tensor:
        return self.main.eager(self.main.in_double() | {"residual": self.shortcut.reference()})

    def others(self) -> Calls:
        x, y = self.main.tensors["input"], self.shortcut.tensors["input"]
        calls = {"torch": self.eager}
        if x.is_cuda:
            fused, shortcut = self.main.cudnn(), self.shortcut.cudnn()
            calls["cudnn fused"] = lambda: fused(x, shortcut(y))
        return calls


@dataclass(frozen=True)
class MaxPooled:
    """A network's first convolution and the max-pooling behind it."""

    stem: Problem

    operator = "conv_bn_relu_max_pool"

    @property
    def kernel(self) -> Kernel:
        return limits.stem_kernel(self.stem.layer)

    @cached_property
    def arguments(self) -> dict:
        return {n: v for n, v in (self.stem.tensors | self.stem.numbers).items() if n not in ("residual", "relu")}

    def ours(self) -> Tensor:
        return conv_bn_relu_max_pool(**self.arguments)

    def in_two_calls(self) -> Tensor:
        return max_pool(self.stem.ours(), *POOL)

    def reference(self) -> Tensor:
        return F.max_pool2d(self.stem.reference(), *POOL)

    def others(self) -> Calls:
        t = self.stem.tensors
        calls = {"torch": lambda: F.max_pool2d(self.stem.eager(t), *POOL)}
        if t["input"].is_cuda:
            fused = self.stem.cudnn()
            calls["cudnn fused"] = lambda: F.max_pool2d(fused(t["input"]), *POOL)
        return calls


Work = Problem | Projection | MaxPooled


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


def projection(block: Block, batch: int, dtype: torch.dtype, device: str) -> Projection:
    """Random arguments of conv_bn_relu_projection for the end of a block that has a projection shortcut."""
    layers = (replace(block.branch[-1], residual=False), block.projection)
    return Projection(block, *(problem(layer, batch, dtype, device) for layer in layers))


def max_pooled(first: Layer, batch: int, dtype: torch.dtype, device: str) -> MaxPooled:
    """Random arguments of conv_bn_relu_max_pool for a stem."""
    return MaxPooled(problem(first, batch, dtype, device))


# What models consist of


@dataclass(frozen=True)
class Case:
    """An operator at one of a model's shapes, by name. Called with batch, dtype and device it makes the arguments."""

    name: str
    make: Callable[..., Work]
    part: Layer | Block

    def __str__(self) -> str:
        return self.name

    def __call__(self, batch: int, dtype: torch.dtype, device: str) -> Work:
        return self.make(self.part, batch, dtype, device)


def layer_case(layer: Layer) -> Case:
    return Case(str(layer), problem, layer)


def cases_of(model: str) -> Iterator[Case]:
    """The convolutions of a model in the order in which they run, where everything is fused that can be."""
    first = stem(model)
    yield Case(f"{first} with max_pool", max_pooled, first)
    for block in blocks(model):
        last = block.branch[-1]
        yield from map(layer_case, block.branch[:-1] if block.projection else block.branch)
        if block.projection:
            yield Case(f"{replace(last, residual=False)} with projection {block.projection}", projection, block)


def fused_cases(models: Sequence[str]) -> list[Case]:
    """Of `cases_of` the models each shape once: what is more than a single convolution."""
    found = {case.name: case for model in models for case in cases_of(model)}
    return [case for case in found.values() if case.make is not problem]


def distinct_layers(models: list[str], containing: str = "") -> list[Layer]:
    """One layer of every shape that occurs in the models and whose description contains a text."""
    return [layer for layer in distinct(models) if containing in str(layer)]


def residual_maps(models: list[str]) -> list[tuple[int, int]]:
    """(channels, size) of every map that a residual is added to."""
    return list(dict.fromkeys((la.filters, la.out_size) for m in models for la in read(m) if la.residual))


def pooled_maps(models: list[str]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(channels, size) of the maps that are max-pooled, and of those that are averaged."""
    ends = ((stem(model), read(model)[-1]) for model in models)
    maps = [[(layer.filters, layer.out_size) for layer in pair] for pair in ends]
    largest, averaged = (list(dict.fromkeys(found)) for found in zip(*maps, strict=True))
    return largest, averaged


def normalised_maps(models: list[str]) -> dict[str, list[tuple[int, int]]]:
    """(channels, size) of the maps whose normalisation in training has this shortcut: see `time_batch_norm`."""
    found: dict[str, dict] = {shortcut: {} for shortcut in SHORTCUTS}
    for model in models:
        found["none"][stem(model).filters, stem(model).out_size] = None
        for block in blocks(model):
            *inner, last = block.branch
            found["none"] |= {(layer.filters, layer.out_size): None for layer in inner}
            found["projection" if block.projection else "residual"][last.filters, last.out_size] = None
    return {shortcut: list(maps) for shortcut, maps in found.items()}


# The ways to run them


def forced(backend: str, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call on one backend."""

    def run() -> Tensor:
        with use_backend(backend):
            return call()

    return run


def by_pointers(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call with the convolution that computes its addresses, also where Triton's goes through descriptors."""
    from ..kernels import conv_tma

    def run() -> Tensor:
        with mock.patch.object(conv_tma, "takes", lambda *_: False):
            return call()

    return run


class _Descriptors(Exception):
    """Raised in the place of a launch."""


def uses_descriptors(call: Callable[[], Tensor]) -> bool:
    """Whether the call, on Triton, would launch the convolution that goes through tensor descriptors. What else it
    would launch it does."""
    from ..kernels import conv_tma

    try:
        with mock.patch.object(conv_tma, "run", side_effect=_Descriptors):
            call()
    except _Descriptors:
        return True
    except Exception:  # whoever runs it will see it
        return False
    return False


def simulated(backend: str) -> bool:
    """Whether its kernels for a GPU run on the CPU here, so that their times say nothing."""
    return (backend == "triton" and triton_interpreted()) or (backend == "cuda" and cuda_emulated())


def _our_ways(operator: str, device: str, call: Callable[[], Tensor]) -> Calls:
    """As the chooser has it, and on every backend by itself."""
    ways = {"ours": call}
    for name, backend in backends().items():
        here = device in backend.devices and operator in backend.operators
        if here and name != "reference" and not simulated(name):
            ways[f"ours, {name}"] = forced(name, call)
    return ways


def _in_triton(work: Work, call: Callable[[], Tensor]) -> Calls:
    """The ways to run a convolution there. call: its operator, forced onto it."""
    ways = {"ours, triton": call}
    if uses_descriptors(call):
        ways = {"ours, triton descriptors": call, "ours, triton pointers": by_pointers(call)}
    if work.in_two_calls is not None:
        ways["ours, triton in two calls"] = forced("triton", work.in_two_calls)
    return ways


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b; float32 as TF32 on a GPU, as torch's convolutions have it by default."""
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        return torch.mm(a, b)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def folded(
    weight: Tensor,  # [K, C / groups, R, S]
    bn_weight: Tensor,  # [K], as the following three
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight, channels_last, and bias of the convolution with BatchNorm folded into it, in the weight's dtype."""
    scale = bn_weight.float() / (running_var.float() + eps).sqrt()
    bias = (bn_bias.float() - running_mean.float() * scale).to(weight.dtype)
    scaled = (weight.float() * scale.view(-1, 1, 1, 1)).to(weight.dtype)
    return scaled.contiguous(memory_format=torch.channels_last), bias


def cudnn_fused(
    weight: Tensor,  # [K, C / groups, R, S], channels_last
    bias: Tensor,  # [K]
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    relu: bool = True,
) -> Callable[..., Tensor]:
    """A function of an input and a residual or None: cuDNN's convolution + bias (+ residual) + ReLU; BatchNorm is in
    weight and bias (`folded`). Without a ReLU, which the fused operators always have, there is no residual and torch
    adds the bias."""
    geometry = (stride, padding, [1, 1], groups)

    def call(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not relu:
            return F.conv2d(x, weight, bias, *geometry)
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)

    return call


def calls_of(work: Work, device: str) -> Calls:
    """Every way to run it, by name."""
    ours = _our_ways(work.operator, device, work.ours)
    if "ours, triton" in ours:
        ours |= _in_triton(work, ours.pop("ours, triton"))
    return work.others() | ours


# Their times

# Samples of a way on a GPU: as many as fit into so many milliseconds.
_MILLISECONDS, _LEAST_SAMPLES, _MOST_SAMPLES = 40.0, 10, 100
_FLUSHED_BYTES = 1 << 28  # beyond every L2 cache


def milliseconds(calls: Calls, device: str) -> dict[str, float]:
    """Median milliseconds of each, timed in turn. On CUDA by events, with a cold L2 cache, as a replayed CUDA graph:
    launches, of which a short kernel would wait for its own, are not in it. On the CPU 5-50 rounds."""
    if not calls:
        return {}
    if device == "cuda":
        return _milliseconds_on_cuda(calls)
    slowest = max(timing.median for timing in interleaved(calls, 1).values())
    rounds = int(min(50, max(5, 0.3 / slowest)))
    return {way: 1e3 * timing.median for way, timing in interleaved(calls, rounds, budget=2.0).items()}


def _milliseconds_on_cuda(calls: Calls) -> dict[str, float]:
    replays = {way: graphed(call) for way, call in calls.items()}
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device="cuda")

    def sample() -> dict[str, float]:
        events = {}
        for way, replay in replays.items():
            start, end = events[way] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            flushed.zero_()  # meanwhile the CPU gets ahead
            start.record()
            replay()
            end.record()
        torch.cuda.synchronize()
        return {way: start.elapsed_time(end) for way, (start, end) in events.items()}

    sample()
    rounds = _MILLISECONDS * len(calls) / sum(sample().values())
    samples = [sample() for _ in range(int(min(_MOST_SAMPLES, max(_LEAST_SAMPLES, rounds))))]
    return {way: median(found[way] for found in samples) for way in calls}


def _row(
    kernel: Kernel, calls: Calls, error_of: Callable[[Tensor], float], batch: int, dtype: torch.dtype, device: str
) -> dict:
    """Figures of an operator: checks every way and times those that are right. ``fraction_of_bound`` is the least
    possible time over ours."""
    error, right = {}, {}
    for way, call in calls.items():
        try:
            out = call()
        except Exception as failure:  # Triton's compiler has errors of its own
            error[way] = one_line(failure)
            continue
        if way not in ALONE:
            error[way] = error_of(out)
        if error.get(way, 0.0) < tolerance(device, dtype):  # so that NaN is not timed
            right[way] = call
    bound = limits.bound([kernel], batch, dtype, limits.ceilings(device))
    ms = milliseconds(right, device)
    row = {"ms": ms, "error": error, "flops": bound.flops, "bytes": bound.bytes, "bound_ms": 1e3 * bound.seconds}
    return row | (bound.figures(ms["ours"] / 1e3) if "ours" in ms else {"bound": bound.by})


@torch.no_grad()
def time_case(case: Case, batch: int, dtype: torch.dtype, device: str) -> dict:
    """Every way to run a convolution, checked against float64: a row of results."""
    work = case(batch, dtype, device)
    reference = work.reference()
    calls = calls_of(work, device)
    return _row(work.kernel, calls, lambda out: relative_rms(checked(out), reference), batch, dtype, device)


def time_layer(layer: Layer, batch: int, dtype: torch.dtype, device: str) -> dict:
    return time_case(layer_case(layer), batch, dtype, device)


def _map(channels: int, size: int, batch: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(batch, channels, size, size, device=device).to(dtype, memory_format=torch.channels_last)


def _is_equal_to(reference: Tensor) -> Callable[[Tensor], float]:
    return lambda out: 0.0 if torch.equal(out, reference) else float("inf")


@torch.no_grad()
def time_add_relu(channels: int, size: int, batch: int, dtype: torch.dtype, device: str) -> dict:
    """Every way to run add_relu, checked bit for bit: a row of results. A copy that moves as many bytes (3 of 2 maps
    and a result, half of them read) is as fast as it could be."""
    a, b = (_map(channels, size, batch, dtype, device) for _ in range(2))
    source, target = torch.zeros(2, 3 * a.numel() // 2, dtype=dtype, device=device)
    calls = {"torch": lambda: torch.relu(a + b), COPY: lambda: target.copy_(source)}
    calls |= _our_ways("add_relu", device, lambda: add_relu(a, b))
    return _row(limits.add_relu_kernel(channels, size), calls, _is_equal_to(torch.relu(a + b)), batch, dtype, device)


SHORTCUTS = ("none", "residual", "projection")


def time_batch_norm(
    shortcut: str, backward: bool, channels: int, size: int, batch: int, dtype: torch.dtype, device: str
) -> dict:
    """Every way to run batch_norm_relu or, with a ``shortcut`` to be normalised too, batch_norm_relu_projection,
    checked against float64: a row of results. ``backward``: with the gradient of all arguments; what is checked then is
    that of the map."""
    x, grad, residual = (_map(channels, size, batch, dtype, device) for _ in range(3))
    vectors = [torch.rand(channels, device=device) + 0.5 for _ in range(4)]
    if device == "cpu":  # stock batch_norm mixes dtypes on a GPU alone
        vectors = [v.to(dtype) for v in vectors]
    tensors = {"none": [x, *vectors[:2]], "residual": [x, *vectors[:2], residual]}
    tensors["projection"] = [x, *vectors[:2], residual, *vectors[2:]]
    if shortcut == "residual":  # no sum is so near to 0 that rounding may move a gradient past the ReLU
        residual.copy_(residual.sign() * 8)
    projection = shortcut == "projection"
    stock, fused = batch_norm_relu_ref, batch_norm_relu
    if projection:
        stock, fused = batch_norm_relu_projection_ref, batch_norm_relu_projection

    def calling(operator: Callable, leaves: list[Tensor]) -> Callable[[], Tensor]:
        leaves = [t.detach().requires_grad_(backward) for t in leaves]

        def call() -> Tensor:
            out = operator(*leaves)
            out = out[0] if isinstance(out, tuple) else out
            return torch.autograd.grad(out, leaves, grad.to(out.dtype))[0] if backward else out

        return call

    reference = calling(stock, [t.double() for t in tensors[shortcut]])()
    name = "batch_norm_relu_projection" if projection else "batch_norm_relu"
    calls = {"torch": calling(stock, tensors[shortcut])} | _our_ways(name, device, calling(fused, tensors[shortcut]))
    kernel = limits.batch_norm_kernel(channels, size, shortcut, backward)
    return _row(kernel, calls, lambda out: relative_rms(out, reference), batch, dtype, device)


@torch.no_grad()
def time_max_pool(channels: int, size: int, batch: int, dtype: torch.dtype, device: str) -> dict:
    """Every way to run ResNet's max_pool, checked bit for bit: a row of results."""
    x = _map(channels, size, batch, dtype, device)
    calls = {"torch": lambda: F.max_pool2d(x, *POOL)} | _our_ways("max_pool", device, lambda: max_pool(x, *POOL))
    reference = F.max_pool2d(x, *POOL)
    return _row(limits.max_pool_kernel(channels, size), calls, _is_equal_to(reference), batch, dtype, device)


@torch.no_grad()
def time_avg_pool(channels: int, size: int, batch: int, dtype: torch.dtype, device: str) -> dict:
    """Every way to run avg_pool_flatten, checked against float64: a row of results."""
    x = _map(channels, size, batch, dtype, device)
    calls = {"torch": lambda: F.adaptive_avg_pool2d(x, 1).flatten(1)}
    calls |= _our_ways("avg_pool_flatten", device, lambda: avg_pool_flatten(x))
    reference = x.double().mean((2, 3))
    kernel = limits.avg_pool_kernel(channels, size)
    return _row(kernel, calls, lambda out: relative_rms(out, reference), batch, dtype, device)
