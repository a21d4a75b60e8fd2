"""The stem, the residual blocks and add_relu at the shapes they have in a ResNet, against torchvision's.

``pytest benchmarks --benchmark-only``; one row a way to run it, one table a block, shape and batch. ``-k bottleneck``,
``-k "batch1 and cpu"`` and the like select; ``--benchmark-json FILE`` keeps everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from resnet_fast import backends, models, use_backend
from resnet_fast.backends import triton_interpreted
from resnet_fast.measure import calibrate, environment, relative_rms
from resnet_fast.ops import add_relu

tv = models.tv

BATCHES = (1, 8)
DTYPE = torch.float32
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-2}  # relative RMS; torch's convolutions run in TF32 on CUDA


@dataclass(frozen=True)
class Shape:
    """A block and the map [N, channels, size, size] that it gets."""

    name: str
    block: str
    channels: int
    size: int
    planes: int = 0
    stride: int = 1


SHAPES = (
    Shape("stem", "stem", 3, 224),
    Shape("basic_layer1", "BasicBlock", 64, 56, 64),
    Shape("basic_layer3", "BasicBlock", 256, 14, 256),
    Shape("basic_projection_layer2", "BasicBlock", 64, 56, 128, 2),
    Shape("bottleneck_layer1", "Bottleneck", 256, 56, 64),
    Shape("bottleneck_layer3", "Bottleneck", 1024, 14, 256),
    Shape("bottleneck_projection_layer1", "Bottleneck", 64, 56, 64),
    Shape("bottleneck_projection_layer3", "Bottleneck", 512, 28, 256, 2),
    Shape("add_relu_layer1", "add_relu", 256, 56),
    Shape("add_relu_layer4", "add_relu", 2048, 7),
)


class Stem(nn.Module):
    """The stem of a ResNet without its pooling: 7x7 convolution, BatchNorm, ReLU."""

    def __init__(self, resnet: nn.Module) -> None:
        super().__init__()
        self.resnet = resnet

    def forward(self, x: Tensor) -> Tensor:
        r = self.resnet
        return r._stem(x) if isinstance(r, models.ResNet) else r.relu(r.bn1(r.conv1(x)))


class AddRelu(nn.Module):
    """The end of a residual block by itself. The other summand is made in the first call, from that call's input."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.other: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.other is None:
            self.other = torch.empty_like(x).copy_(x.flip(-1))
        return self.function(x, self.other)


def stock_add_relu(a: Tensor, b: Tensor) -> Tensor:
    return torch.relu(a + b)


def build(shape: Shape, ours: bool) -> nn.Module:
    if shape.block == "add_relu":
        return AddRelu(add_relu if ours else stock_add_relu)
    library = models if ours else tv
    if shape.block == "stem":
        return Stem(models.resnet18() if ours else tv.resnet18())
    block = getattr(library, shape.block)
    out = shape.planes * block.expansion
    projection = None
    if shape.stride != 1 or shape.channels != out:
        projection = nn.Sequential(tv.conv1x1(shape.channels, out, shape.stride), nn.BatchNorm2d(out))
    return block(shape.channels, shape.planes, shape.stride, projection)


@dataclass(frozen=True)
class Way:
    """A way to run a block: torchvision's (backend None) or this package's on one backend."""

    name: str
    device: str
    backend: str | None
    channels_last: bool


def ways() -> list[Way]:
    found = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        found += [Way("stock", device, None, False), Way("stock_channels_last", device, None, True)]
    for b in backends().values():
        if b.name == "triton" and triton_interpreted():
            continue  # measures Python
        # Between fused blocks the maps are channels_last; plain torch hands on what it gets.
        found += [Way(f"ours_{b.name}", device, b.name, b.name != "reference") for device in b.devices]
    return found


def has_kernel(way: Way, shape: Shape) -> bool:
    operator = "add_relu" if shape.block == "add_relu" else "conv_bn_relu"
    return way.backend is None or operator in backends()[way.backend].operators


CASES = [
    pytest.param(shape, batch, way, id=f"{shape.name}-batch{batch}-{way.name}-{way.device}")
    for shape in SHAPES
    for batch in BATCHES
    for way in ways()
    if has_kernel(way, shape)
]


def prepared(shape: Shape, batch: int, way: Way) -> tuple[nn.Module, Tensor, Tensor]:
    """The module, its input, and what torchvision's block computes from it in float64."""
    torch.manual_seed(0)
    x = torch.randn(batch, shape.channels, shape.size, shape.size)
    if shape.block != "stem":
        x = x.relu()  # as behind another block
    stock = build(shape, ours=False)
    if shape.block != "add_relu":
        calibrate(stock, x)
    module = build(shape, ours=way.backend is not None).eval()
    module.load_state_dict(stock.state_dict())
    ref = stock.double()(x.double())

    memory_format = torch.channels_last if way.channels_last else torch.contiguous_format
    module, x = module.to(way.device, DTYPE), x.to(way.device, DTYPE)
    if way.backend is None:  # our module stays as a user builds it
        module = module.to(memory_format=memory_format)
    if shape.block != "stem" or way.backend is None:  # our stem gets a user's images, which are contiguous
        x = x.contiguous(memory_format=memory_format)
    return module, x, ref


@pytest.mark.benchmark(max_time=0.5, min_rounds=5)
@pytest.mark.parametrize(("shape", "batch", "way"), CASES)
@torch.no_grad()
def test_block(benchmark, shape, batch, way):
    module, x, ref = prepared(shape, batch, way)

    def call() -> Tensor:
        out = module(x)
        if way.device == "cuda":
            torch.cuda.synchronize()
        return out

    with use_backend(way.backend):
        error = relative_rms(call().cpu(), ref)
        assert error < TOLERANCE[way.device], f"wrong output: relative RMS {error:.1e} against float64"
        call()
        benchmark.group = f"{shape.name}, batch {batch}, {way.device}"
        benchmark(call)

    facts = environment()
    benchmark.extra_info |= {key: facts[key] for key in ("torch", "threads", "isa_level")}
    benchmark.extra_info |= {"backend": way.backend or "stock", "channels_last": way.channels_last}
    benchmark.extra_info |= {"device": way.device, "dtype": str(DTYPE), "relative_rms": error}
    if benchmark.stats:  # None with --benchmark-disable
        benchmark.extra_info["images_per_s"] = batch / benchmark.stats.stats.median
