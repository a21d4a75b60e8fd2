"""The rows of the benchmarks, without a tensor: every op, block and model in every pass, batch, dtype and way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from resnet_fast import backends
from resnet_fast.bench import layers, limits
from resnet_fast.bench.cells import DTYPES
from resnet_fast.bench.kernels import simulated
from resnet_fast.bench.layers import Block, Layer
from resnet_fast.bench.limits import Kernel

BATCHES = {"cpu": (1, 8, 32), "cuda": (1, 32, 256)}
OP_MODELS = ("resnet50", "resnet18")
# ResNet-34 has the shapes of ResNet-18, and in every stage a block that is neither the first nor the model's last: the
# last one hands out a contiguous map, at the price of a copy.
BLOCK_MODELS = ("resnet34", "resnet50")


@dataclass(frozen=True)
class Subject:
    """An op, a block or a model. Its maps are [N, channels, size, size].

    kind: "op", "block" or "model"; type: the kinds of each ("conv1x1", "bottleneck_projection"); part: what it is in
    the layer tables, None if it has no convolution of its own or is a whole model; forward, train: the kernels that
    bound its time.
    """

    kind: str
    type: str
    name: str
    model: str
    part: Layer | Block | None
    channels: int
    size: int
    forward: tuple[Kernel, ...]
    train: tuple[Kernel, ...]

    @property
    def takes_images(self) -> bool:
        return self.size == layers.IMAGE_SIZE


def _conv(layer: Layer) -> Subject:
    type = f"conv{layer.kernel}x{layer.kernel}" + (f"_stride{layer.stride}" if layer.stride > 1 else "")
    tail = ("-residual" if layer.residual else "") + ("" if layer.relu else "-linear")
    name = f"{type}-{layer.channels}to{layer.filters}-{layer.size}px{tail}"
    kernels = (limits.layer_kernel(layer),)
    # Forward and the gradients of input and weight; the images in front of the stem need none.
    train = kernels * (2 if layer.block == "stem" else 3)
    return Subject("op", type, name, "", layer, layer.channels, layer.size, kernels, train)


def _add_relu(block: Block) -> Subject:
    last = block.branch[-1]
    kernels = (limits.add_relu_kernel(last.filters, last.out_size),)
    # Backward reads the gradient and the output and writes one gradient, which both summands share.
    name = f"add_relu-{_stage(block)}"
    return Subject("op", "add_relu", name, "", None, last.filters, last.out_size, kernels, kernels * 2)


def _stage(block: Block) -> str:
    return block.name.split(".")[0]


def _named(kernels: tuple[Kernel, ...], block: str) -> tuple[Kernel, ...]:
    return tuple(kernel for kernel in kernels if kernel.block == block)


def _stems() -> Iterator[Subject]:
    model = BLOCK_MODELS[0]
    first = layers.stem(model)
    alone = (limits.layer_kernel(first),)
    yield Subject("block", "stem", "stem", model, first, first.channels, first.size, alone, alone * 2)
    forward, train = (_named(k, "stem") for k in (limits.inference(model, "folded"), limits.training(model, "least")))
    yield Subject("block", "stem_pool", "stem_pool", model, first, first.channels, first.size, forward, train)


def _block(model: str, block: Block) -> Subject:
    first, train = block.branch[0], _named(limits.training(model, "least"), block.name)
    name, forward = f"{block.kind}-{_stage(block)}", (limits.block_kernel(block),)
    return Subject("block", block.kind, name, model, block, first.channels, first.size, forward, train)


def _model(name: str) -> Subject:
    first, forward, train = layers.stem(name), limits.inference(name, "block"), limits.training(name, "least")
    return Subject("model", "model", name, name, None, first.channels, first.size, forward, train)


@cache
def subjects() -> tuple[Subject, ...]:
    """Everything that is measured, ordered by type within its kind."""
    ops = [_add_relu(b) for b in layers.blocks(OP_MODELS[0]) if b.name.endswith(".1")]
    ops += sorted(map(_conv, layers.distinct(OP_MODELS)), key=lambda subject: subject.type)
    blocks = list(_stems())
    for model in BLOCK_MODELS:
        # Of each stage its projection, if it has one, and an inner block.
        found = [b for b in layers.blocks(model) if b.projection or b.name.endswith(".1")]
        blocks += [_block(model, b) for b in sorted(found, key=lambda block: block.kind)]
    return (*ops, *blocks, *map(_model, layers.MODELS))


@dataclass(frozen=True, repr=False)
class Table:
    """Rows to be compared with one another: all ways to run one subject in one pass, batch, dtype, on one device."""

    subject: Subject
    train: bool
    batch: int
    dtype: str
    device: str

    @property
    def pass_name(self) -> str:
        return "train" if self.train else "forward"

    def bound(self) -> limits.Bound:
        kernels = self.subject.train if self.train else self.subject.forward
        return limits.bound(kernels, self.batch, DTYPES[self.dtype], limits.ceilings(self.device))

    def __repr__(self) -> str:
        return f"{self.subject.name}-{self.pass_name}-batch{self.batch}-{self.dtype}"


@dataclass(frozen=True)
class Way:
    """A way to run a subject: this package's (on one backend, or None for the chooser's) or torchvision's.

    channels_last: which tensors are: "none", "maps" (those between blocks, not images and weights) or "all".
    """

    name: str
    ours: bool = False
    backend: str | None = None
    channels_last: str = "none"

    def takes(self, table: Table) -> bool:
        part = table.subject.part
        if self.name == "cudnn_fused":  # one convolution, always with a ReLU, without gradients
            return table.subject.kind == "op" and isinstance(part, Layer) and part.relu and not table.train
        operator = "add_relu" if table.subject.type == "add_relu" else "conv_bn_relu"
        return self.backend is None or operator in backends()[self.backend].operators


@cache
def ways(device: str) -> tuple[Way, ...]:
    """The ways that work on a device in this process, this package's default first."""
    found = []
    if device == "cuda":
        found.append(Way("ours_default", True, None, "all"))  # on CUDA it mixes backends
    for b in reversed(backends().values()):
        if device not in b.devices or simulated(b.name):
            continue
        # On the CPU a user's model and images are contiguous, and fused blocks hand on channels_last maps.
        channels_last = "all" if device == "cuda" else "none" if b.name == "reference" else "maps"
        found.append(Way(f"ours_{b.name}", True, b.name, channels_last))
    found += [Way("eager"), Way("eager_channels_last", channels_last="all"), Way("compile", channels_last="all")]
    return (*found, Way("cudnn_fused", channels_last="all")) if device == "cuda" else tuple(found)


# The quick selection: the first subject of these types in a pass, a batch (0: the smallest, 1: the middle one) and a
# dtype; None: of all types. Stock bfloat16 convolutions take 10-40 times as long on a CPU without instructions for it.
_QUICK_TYPES = {
    ("forward", 0, "float32"): None,
    ("forward", 1, "float32"): {"conv3x3", "stem_pool", "basic", "bottleneck", "bottleneck_projection", "model"},
    ("forward", 0, "bfloat16"): {"conv1x1", "bottleneck"},
    ("train", 0, "float32"): {"add_relu", "conv3x3", "bottleneck", "model"},
    ("train", 1, "float32"): {"basic", "bottleneck_projection"},
}
_QUICK_WAYS = ("eager", "eager_channels_last")


@cache
def _first_subjects() -> frozenset[str]:
    return frozenset({s.type: s.name for s in reversed(subjects())}.values())


def _is_quick(table: Table, way: Way) -> bool:
    key = (table.pass_name, BATCHES[table.device].index(table.batch), table.dtype)
    if key not in _QUICK_TYPES or table.subject.name not in _first_subjects():
        return False
    types = _QUICK_TYPES[key]
    if types is not None and table.subject.type not in types:
        return False
    compiled = way.name == "compile" and table.subject.kind == "model" and not table.train and key[1] == 0
    return way == ways(table.device)[0] or way.name in _QUICK_WAYS or compiled


def _tables() -> Iterator[Table]:
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for subject in subjects():
            for train in (False, True):
                for batch in BATCHES[device]:
                    yield from (Table(subject, train, batch, dtype, device) for dtype in DTYPES)


def rows() -> Iterator:
    """A pytest.param(table, way) a row; the ways of a table follow one another, and so share what it prepares."""
    for table in _tables():
        names = [table.subject.kind, table.pass_name] + ["gpu"] * (table.device == "cuda")
        for way in ways(table.device):
            if way.takes(table):
                marks = names + ["quick"] * _is_quick(table, way)
                yield pytest.param(
                    table, way, id=f"{table}-{way.name}-{table.device}", marks=[getattr(pytest.mark, m) for m in marks]
                )
