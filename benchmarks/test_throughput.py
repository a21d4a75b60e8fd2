"""Throughput of every op, block and model against torchvision's: ``pytest benchmarks --benchmark-only``.

One table a subject, pass, batch, dtype and device; one row a way to run it. Without a selection the rows marked quick
run, 1.5 minutes on 2 cores; ``-k`` and ``-m`` select others: ``-k "bottleneck and batch8"``, ``-k resnet50-train``,
``-m "op and forward"``. ``--benchmark-json FILE`` keeps everything. Times on a CPU repeat better with
OMP_PROC_BIND=true: `resnet-fast bench --help`.

Every row is checked against a float64 run of torchvision's before it is timed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from cases import Subject, Table, Way, rows
from torch import Tensor, nn

from resnet_fast import models, use_backend
from resnet_fast.bench import cells
from resnet_fast.bench.kernels import cudnn_fused, folded
from resnet_fast.bench.layers import Layer
from resnet_fast.bench.limits import CLASSES
from resnet_fast.measure import calibrate, environment, random_model, relative_rms
from resnet_fast.ops import add_relu, conv_bn_relu

tv = models.resnet.tv

CHECKED = 8  # images of a batch that are compared with float64
SECONDS, LEAST_ROUNDS, SLOW = 0.5, 5, 2.0


# Subjects


class AddRelu(nn.Module):
    def __init__(self, ours: bool) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return add_relu(a, b) if self.ours else torch.relu(a + b)


class ConvBnRelu(nn.Module):
    """A convolution, BatchNorm and what follows them in a block."""

    def __init__(self, layer: Layer, ours: bool) -> None:
        super().__init__()
        numbers = (layer.channels, layer.filters, layer.kernel, layer.stride, layer.padding)
        self.conv = nn.Conv2d(*numbers, groups=layer.groups, bias=False)
        self.bn = nn.BatchNorm2d(layer.filters)
        self.relu, self.ours = layer.relu, ours

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        conv, bn = self.conv, self.bn
        if self.ours:
            vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
            geometry = (conv.stride, conv.padding, conv.dilation, conv.groups, bn.eps, self.relu)
            return conv_bn_relu(x, conv.weight, None, *vectors, residual, *geometry)
        out = bn(conv(x))
        if residual is not None:
            out += residual
        return torch.relu_(out) if self.relu else out


class CudnnFused(nn.Module):
    def __init__(self, stock: ConvBnRelu) -> None:
        super().__init__()
        conv, bn = stock.conv, stock.bn
        vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
        self.call = cudnn_fused(*folded(conv.weight, *vectors, bn.eps), conv.stride, conv.padding, conv.groups)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.call(x, residual)


class Stem(nn.Module):
    """The stem of a ResNet: 7x7 convolution, BatchNorm, ReLU, and its pooling or not."""

    def __init__(self, resnet: nn.Module, pool: bool) -> None:
        super().__init__()
        self.resnet, self.pool = resnet, pool

    def forward(self, x: Tensor) -> Tensor:
        r = self.resnet
        out = r._stem(x) if isinstance(r, models.ResNet) else r.relu(r.bn1(r.conv1(x)))
        return r.maxpool(out) if self.pool else out


def build(subject: Subject, ours: bool) -> nn.Module:
    if subject.type == "add_relu":
        return AddRelu(ours)
    if subject.kind == "op":
        return ConvBnRelu(subject.part, ours)
    resnet = getattr(models if ours else tv, subject.model)(weights=None)
    if subject.kind == "model":
        return resnet
    if subject.takes_images:
        return Stem(resnet, subject.type == "stem_pool")
    return resnet.get_submodule(subject.part.name)


# What the ways of a table share


@dataclass(frozen=True)
class Shared:
    """The stock module (float32, on the CPU), and on the table's device: inputs in its dtype, the gradient of the
    output or the labels, and what a float64 run makes of the first images (see `step`)."""

    stock: nn.Module
    inputs: tuple[Tensor, ...]
    target: Tensor | None
    expected: Tensor


def inputs(subject: Subject, batch: int) -> tuple[Tensor, ...]:
    """Images, or a map as behind another block, and the residual of an operator that adds one; float32, on the CPU."""
    if subject.takes_images:
        return (cells.images(batch)[:batch],)
    torch.manual_seed(0)
    x = torch.randn(batch, subject.channels, subject.size, subject.size).relu()
    if subject.type == "add_relu":
        return x, torch.randn_like(x)
    part = subject.part
    if isinstance(part, Layer) and part.residual:
        return x, torch.randn(batch, part.filters, part.out_size, part.out_size)
    return (x,)


@lru_cache(maxsize=1)
def stock(subject: Subject) -> nn.Module:
    """Torchvision's, with random weights and the BatchNorm statistics of 8 images; float32, on the CPU, eval mode."""
    if subject.kind == "model":
        return random_model(getattr(tv, subject.model), cells.images(0))
    torch.manual_seed(0)
    module = build(subject, ours=False)
    return module if subject.type == "add_relu" else calibrate(module, inputs(subject, cells.CALIBRATION_IMAGES)[0])


def stored(table: Table) -> torch.dtype:
    """The dtype of weights and inputs: a model is trained under autocast, with float32 weights."""
    return torch.float32 if table.train and table.subject.kind == "model" else cells.DTYPES[table.dtype]


@lru_cache(maxsize=1)
def shared(table: Table) -> Shared:
    module, dtype = stock(table.subject), stored(table)
    given = tuple(t.to(table.device, dtype) for t in inputs(table.subject, table.batch))
    exact = copy.deepcopy(module).to(table.device, dtype).double()
    first = tuple(t[:CHECKED].double() for t in given)
    target = None
    if table.train and table.subject.kind == "model":
        target = torch.arange(table.batch, device=table.device) * 7 % CLASSES
    elif table.train:
        with torch.no_grad():
            shape = exact(*(t[:1] for t in first)).shape[1:]
        target = torch.randn(table.batch, *shape).to(table.device, dtype)
    expected = step(table, exact, torch.float64)(track(table, first), target)
    if not expected.isfinite().all() or not expected.std() > 0:
        raise RuntimeError(f"{table}: the float64 result is not finite or has no spread; nothing to compare")
    return Shared(module, given, target, expected)


def track(table: Table, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs as the leaves of a graph: in training a map gets a gradient, images do not."""
    return tuple(t.detach().requires_grad_(table.train and not table.subject.takes_images) for t in given)


# What is timed

Step = Callable[[tuple[Tensor, ...], Tensor | None], Tensor]


def step(table: Table, module: nn.Module, dtype: torch.dtype) -> Step:
    """One call; it returns what is compared with float64: the output or, in training, a gradient.

    The gradient is that of the first convolution's weight, behind all others (see `_sgd`), or of a summand.
    An operator is trained with BatchNorm's running statistics, as in fine-tuning with frozen BatchNorms: conv_bn_relu
    computes inference, and its gradients are those. Blocks and models are trained with the batch's statistics.
    """
    module.train(table.train and table.subject.kind != "op")
    if not table.train:
        return lambda given, _: module(*given)
    return _sgd(table, module, dtype) if table.subject.kind == "model" else _backward(module)


def _backward(module: nn.Module) -> Step:
    def call(given: tuple[Tensor, ...], gradient: Tensor) -> Tensor:
        for t in (*given, *module.parameters()):
            t.grad = None
        module(*given).backward(gradient[: len(given[0])].to(given[0].dtype))
        return next(module.parameters(), given[0]).grad

    return call


def _sgd(table: Table, module: nn.Module, dtype: torch.dtype) -> Step:
    """Cross entropy and SGD with momentum; in 16 bits under autocast, float16 with its loss scaled.

    In 16 bits the logits are compared: down to the first weight rounding grows until ResNet-152's bfloat16 gradient has
    nothing in common with float64's (relative RMS 1.2; ResNet-18's 0.3, in float32 0.002).
    """
    watched = next(module.parameters())
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
    scaler = torch.amp.GradScaler(table.device, init_scale=2.0**10, enabled=dtype == torch.float16)
    autocast = {"device_type": table.device, "dtype": dtype, "enabled": dtype.itemsize == 2}

    def call(given: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(**autocast):
            logits = module(*given)
            loss = F.cross_entropy(logits, labels[: len(given[0])])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return watched.grad if compares_gradient(table) else logits.detach()

    return call


def prepare(table: Table, way: Way) -> tuple[nn.Module, tuple[Tensor, ...], Tensor | None]:
    """A way's own module, and the inputs and the target in its memory format."""
    common = shared(table)
    if way.ours:
        with torch.device("meta"):  # no random initialisation
            module = build(table.subject, ours=True)
        module.load_state_dict(copy.deepcopy(common.stock.state_dict()), assign=True)
    else:
        module = copy.deepcopy(common.stock)
    module = module.to(table.device, stored(table))
    if way.channels_last == "all":
        module = module.to(memory_format=torch.channels_last)
    if way.name == "cudnn_fused":
        module = CudnnFused(module)
    if way.name == "compile":
        torch._dynamo.reset()  # the shapes of other rows would make this one's dynamic
        module = torch.compile(module, dynamic=False)

    last = way.channels_last == "all" or (way.channels_last == "maps" and not table.subject.takes_images)
    memory_format = torch.channels_last if last else torch.contiguous_format
    given = tuple(t.contiguous(memory_format=memory_format) for t in common.inputs)
    target = common.target
    if target is not None and target.dim() == 4:
        target = target.contiguous(memory_format=memory_format)
    return module, track(table, given), target


# Largest relative RMS of a gradient against float64 (zeros have 1): rounding turns ReLUs over, and in a model every
# block amplifies it. Torch's own on a CPU: 0.003 of ops and blocks, 0.016 of ResNet-152 in float32; of ops and blocks
# up to 0.034 in float16, 0.094 in bfloat16.
GRADIENT_TOLERANCE = {"float32": 0.05, "float16": 0.1, "bfloat16": 0.3}


def compares_gradient(table: Table) -> bool:
    return table.train and (table.subject.kind != "model" or table.dtype == "float32")


def check(table: Table, call: Step, given: tuple[Tensor, ...], target: Tensor | None) -> float:
    """The relative RMS against float64, of a training step on the first images or of the first of a forward pass."""
    limit = cells.tolerance(table.device, cells.DTYPES[table.dtype])
    if compares_gradient(table):
        limit = GRADIENT_TOLERANCE[table.dtype]
    if table.train:
        given = track(table, tuple(t[:CHECKED] for t in given))
    out = call(given, target)
    error = relative_rms(out if table.train else out[:CHECKED], shared(table).expected)
    assert error < limit, f"wrong: relative RMS {error:.1e} against float64"
    return error


def timed(benchmark, call: Callable[[], Tensor]) -> None:
    """Rounds of a millisecond or more for half a second, at least 5 of them; fewer of a slow call."""
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    iterations = max(1, round(1e-3 / seconds))
    rounds = max(LEAST_ROUNDS, int(SECONDS / (seconds * iterations))) if seconds < SLOW else 1 + (seconds < 3 * SLOW)
    result = benchmark.pedantic(call, rounds=rounds, iterations=iterations)
    assert result.isfinite().all()


def facts(table: Table, way: Way) -> dict:
    """What identifies a row in a file of results, and what its time depends on."""
    machine = environment()
    device = torch.cuda.get_device_name() if table.device == "cuda" else machine["cpu"]
    row = {"subject": table.subject.name, "kind": table.subject.kind, "pass": table.pass_name, "batch": table.batch}
    row |= {"dtype": table.dtype, "device": table.device, "device_name": device, "way": way.name}
    row |= {"backend": way.backend, "channels_last": way.channels_last}
    return row | {key: machine[key] for key in ("torch", "triton", "commit", "threads", "isa_level")}


@pytest.fixture(autouse=True)
def cudnn_searches(monkeypatch):
    """cuDNN picks its fastest kernel, as users of fixed shapes let it."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)


@pytest.mark.parametrize(("table", "way"), list(rows()))
def test_throughput(benchmark, table, way):
    benchmark.group = f"{table.subject.name}, {table.pass_name}, batch {table.batch}, {table.dtype}, {table.device}"
    module, given, target = prepare(table, way)
    one_step = step(table, module, cells.DTYPES[table.dtype])

    def call() -> Tensor:
        result = one_step(given, target)
        if table.device == "cuda":
            torch.cuda.synchronize()
        return result

    with torch.set_grad_enabled(table.train), use_backend(way.backend):
        error = check(table, one_step, given, target)
        timed(benchmark, call)
    benchmark.extra_info |= facts(table, way) | {"relative_rms": error}
    if benchmark.stats:  # None with --benchmark-disable
        seconds = benchmark.stats.stats.median
        benchmark.extra_info |= {"images_per_s": table.batch / seconds} | table.bound().figures(seconds)
