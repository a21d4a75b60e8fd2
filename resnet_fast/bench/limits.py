"""The least time that a layer, a block or a model can take on a machine: by its arithmetic or by its memory traffic.

A model is a list of kernels, each with floating point operations and bytes. A kernel takes no less than its operations
over the machine's peak, and no less than its bytes over the machine's bandwidth; kernels run one after the other. What
separates an eager ResNet from a fused one is how often a feature map crosses the memory, so the traffic of several
*patterns* is counted:

Inference
    eager      convolution, BatchNorm, ReLU, add and pool each read and write their map
    pointwise  convolution alone, then one pass for BatchNorm (+ add) + ReLU: what torch.compile makes on CUDA
    epilogue   convolution + BatchNorm (+ add) (+ ReLU) in one pass: what this package does
    folded     epilogue, with the max-pool in the stem's kernel and the projection in the last convolution's
    chained    a bottleneck's 3x3, its expansion and the next block's reduction in one kernel
    block      one kernel a residual block: reads its input, writes its output
Training (maps kept in the compute dtype, 3x3 and 1x1 gradients as two kernels each, SGD with momentum in float32)
    eager      every operator a pass; BatchNorm reads its input twice forward, twice backward
    pointwise  convolution alone; BatchNorm + ReLU and BatchNorm + add + ReLU fused both ways, a bit mask kept
    statistics pointwise, with BatchNorm's statistics summed in the convolution's store
    least      normalise + ReLU in the next convolution's load, all sums of BatchNorm in stores

Counted in multiply-adds of the direct convolution, so that a Winograd kernel may pass 1.0 of a compute bound; and as if
nothing stayed in a cache between kernels, so that small maps on a CPU may pass 1.0 of a memory bound. Strided 1x1
convolutions read only the pixels that they use. What a kernel may compute twice (the halo between two 3x3 convolutions)
is not counted: these are limits, not estimates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch

from .layers import Block, Layer, blocks, read, stem

INFERENCE = ("eager", "pointwise", "epilogue", "folded", "chained", "block")
TRAINING = ("eager", "pointwise", "statistics", "least")
CLASSES = 1000


@dataclass(frozen=True)
class Kernel:
    """Work of one kernel. ``flops`` and ``maps`` (elements read and written) count per image, ``weights`` (elements)
    and ``state`` (bytes of float32 training state) once a batch."""

    block: str
    name: str
    flops: float
    maps: float
    weights: float = 0.0
    state: float = 0.0

    def total_flops(self, batch: int) -> float:
        return self.flops * batch

    def total_bytes(self, batch: int, element: int) -> float:
        """Bytes for a batch of maps whose elements have that many bytes."""
        return (self.maps * batch + self.weights) * element + self.state


# One layer


def flops(layer: Layer) -> float:
    """Two for every multiply-add of the direct convolution of one image."""
    return 2.0 * layer.out_size**2 * layer.weights


def _read_maps(layer: Layer) -> float:
    read_size = layer.size if layer.kernel > 1 else layer.out_size  # a strided 1x1 skips pixels
    return float(layer.channels * read_size**2)


def _written(layer: Layer) -> float:
    return float(layer.filters * layer.out_size**2)


def layer_kernel(layer: Layer, name: str | None = None, extra_maps: float = 0.0) -> Kernel:
    """The fused operator: what is needed of the input, the weight and the residual is read once, the output written."""
    maps = _read_maps(layer) + _written(layer) * (2 if layer.residual else 1) + extra_maps
    return Kernel(layer.block, name or layer.name, flops(layer), maps, layer.weights)


def add_relu_kernel(channels: int, size: int) -> Kernel:
    return Kernel("add_relu", "add_relu", 0.0, 3.0 * channels * size**2)


def batch_norm_kernel(channels: int, size: int, shortcut: str, backward: bool) -> Kernel:
    """Batch normalisation in training, with ReLU: maps are read for the statistics and once more, the result is
    written; then the gradient is read with them for sums and once more, and its own results are written. shortcut:
    "none", "residual" (not normalised) or "projection"."""
    forward, behind = {"none": (3, 5), "residual": (4, 6), "projection": (5, 8)}[shortcut]
    return Kernel("batch_norm", "batch_norm_relu", 0.0, float(forward + behind * backward) * channels * size**2)


def max_pool_kernel(channels: int, size: int) -> Kernel:
    """ResNet's, which halves a map of an even size."""
    return _pass("stem", "max_pool", 1.25 * channels * size**2)


def avg_pool_kernel(channels: int, size: int) -> Kernel:
    return _pass("head", "avg_pool", channels * size**2 + channels)


def stem_kernel(first: Layer) -> Kernel:
    """The stem with its max-pooling: the map between the two is never written."""
    return Kernel("stem", "conv1+max_pool", flops(first), _read_maps(first) + _written(first) / 4, first.weights)


def projection_kernel(block: Block) -> Kernel:
    """The last convolution of a block with its projection shortcut, whose map is never written."""
    last, shortcut = block.branch[-1], block.projection
    maps = _read_maps(last) + _read_maps(shortcut) + _written(last)
    name = f"{last.name}+{shortcut.name}"
    return Kernel(block.name, name, flops(last) + flops(shortcut), maps, last.weights + shortcut.weights)


# Inference


def _convolution(layer: Layer) -> Kernel:
    """By itself, without what follows."""
    return Kernel(layer.block, layer.name, flops(layer), _read_maps(layer) + _written(layer), layer.weights)


def _pass(block: str, name: str, maps: float) -> Kernel:
    return Kernel(block, name, 0.0, maps)


def _stem_inference(first: Layer, pattern: str) -> list[Kernel]:
    out, pool = _written(first), max_pool_kernel(first.filters, first.out_size)
    if pattern == "eager":
        passes = [_pass("stem", "batch_norm", 2 * out), _pass("stem", "relu", 2 * out)]
        return [_convolution(first), *passes, pool]
    if pattern == "pointwise":
        return [_convolution(first), _pass("stem", "batch_norm_relu", 2 * out), pool]
    if pattern == "epilogue":
        return [layer_kernel(first), pool]
    return [stem_kernel(first)]


def _eager_block(block: Block) -> list[Kernel]:
    kernels = []
    for layer in block.layers:
        kernels += [_convolution(layer), _pass(block.name, "batch_norm", 2 * _written(layer))]
        if layer.relu and not layer.residual:
            kernels.append(_pass(block.name, "relu", 2 * _written(layer)))
    out = _written(block.branch[-1])
    return kernels + [_pass(block.name, "add", 3 * out), _pass(block.name, "relu", 2 * out)]


def _pointwise_block(block: Block) -> list[Kernel]:
    kernels = [_convolution(layer) for layer in block.layers]
    kernels += [_pass(block.name, "batch_norm_relu", 2 * _written(layer)) for layer in block.branch[:-1]]
    return kernels + [_pass(block.name, "batch_norm_add_relu", 3 * _written(block.branch[-1]))]


def _folded_block(block: Block) -> list[Kernel]:
    if block.projection is None:
        return [layer_kernel(layer) for layer in block.branch]
    return [layer_kernel(layer) for layer in block.branch[:-1]] + [projection_kernel(block)]


def _input(block: Block) -> float:
    first = block.branch[0]
    return float(first.channels * first.size**2)


def block_kernel(block: Block) -> Kernel:
    """A residual block as one kernel: the least traffic that it can have by itself."""
    total = sum(map(flops, block.layers))
    weights = sum(layer.weights for layer in block.layers)
    return Kernel(block.name, "block", total, _input(block) + _written(block.branch[-1]), weights)


def _chained(found: list[Block]) -> list[Kernel]:
    """Bottlenecks whose first 1x1 runs in the kernel of the block before."""
    first = found[0].branch[0]
    kernels = [Kernel(first.block, "conv1", flops(first), _read_maps(first) + _written(first), first.weights)]
    for block, following in zip(found, [*found[1:], None], strict=True):
        layers = list(block.branch[1:]) + ([block.projection] if block.projection else [])
        out = _written(block.branch[-1])
        maps = _read_maps(layers[0]) + (_read_maps(block.projection) if block.projection else out) + out
        if following is not None:
            layers.append(following.branch[0])
            maps += _written(following.branch[0])
        weights = sum(layer.weights for layer in layers)
        kernels.append(Kernel(block.name, "chain", sum(map(flops, layers)), maps, weights))
    return kernels


def _head_inference(channels: int, size: int) -> list[Kernel]:
    return [
        avg_pool_kernel(channels, size),
        Kernel("head", "fc", 2.0 * channels * CLASSES, channels + CLASSES, channels * CLASSES),
    ]


@lru_cache
def inference(model: str, pattern: str = "epilogue") -> tuple[Kernel, ...]:
    """The kernels of a forward pass at 224x224 pixels. model: one of layers.MODELS; pattern: one of INFERENCE."""
    if pattern not in INFERENCE:
        raise ValueError(f"pattern must be one of {', '.join(INFERENCE)}, got {pattern!r}")
    found = list(blocks(model))
    last = found[-1].branch[-1]
    kernels = _stem_inference(stem(model), pattern)
    if pattern == "chained" and len(found[0].branch) == 3:
        kernels += _chained(found)
    else:
        make = {
            "eager": _eager_block,
            "pointwise": _pointwise_block,
            "epilogue": lambda block: [layer_kernel(layer) for layer in block.layers],
            "folded": _folded_block,
            "chained": lambda block: [block_kernel(block)],
            "block": lambda block: [block_kernel(block)],
        }[pattern]
        kernels += [kernel for block in found for kernel in make(block)]
    return tuple(kernels + _head_inference(last.filters, last.out_size))


# Training

_BITS = 1.0 / 16  # a mask of one bit an element, in elements of 16 bits


def _gradients(layer: Layer) -> list[Kernel]:
    """Of the input and of the weight, each a convolution of the same size."""
    maps = _read_maps(layer) + _written(layer)
    return [
        Kernel(layer.block, f"{layer.name} {of} gradient", flops(layer), maps, layer.weights)
        for of in ("input", "weight")
    ]


def _stem_training(first: Layer, pattern: str) -> list[Kernel]:
    out, pooled = _written(first), _written(first) / 4
    indices = {"eager": 4.0, "pointwise": 0.5, "statistics": 0.5, "least": 0.5}[pattern]  # of 64 bits, or of 8
    pool = pooled * (1 + indices)

    def weight_gradient(extra: float = 0.0) -> Kernel:  # the image needs no gradient
        maps = _read_maps(first) + _written(first) + extra
        return Kernel("stem", "conv1 weight gradient", flops(first), maps, first.weights)

    kernels = [_convolution(first)]
    if pattern in ("eager", "pointwise"):
        fused = pattern == "pointwise"
        kernels += [_pass("stem", "batch_norm", 3 * out)] + ([] if fused else [_pass("stem", "relu", 2 * out)])
        kernels += [_pass("stem", "max_pool", out + pool), _pass("stem", "max_pool backward", pool + out)]
        kernels += [] if fused else [_pass("stem", "relu backward", 3 * out)]
        return kernels + [_pass("stem", "batch_norm backward", 5 * out), weight_gradient()]
    kernels += [_pass("stem", "batch_norm_relu_max_pool", out + pool), _pass("stem", "its backward sums", out + pool)]
    if pattern == "statistics":
        return kernels + [_pass("stem", "its backward", 2 * out + pool), weight_gradient()]
    return kernels + [weight_gradient(extra=pool)]


def _block_training(block: Block, pattern: str) -> list[Kernel]:
    eager = pattern == "eager"
    reads = 2 if pattern == "statistics" else 3  # forward passes of BatchNorm over its map, the written one included
    kernels, last, name = [], block.branch[-1], block.name
    for layer in block.layers:
        out = _written(layer)
        kernels += [_convolution(layer), *_gradients(layer), _pass(name, "batch_norm backward", 5 * out)]
        if eager or layer is not last:
            kernels.append(_pass(name, "batch_norm", reads * out))
        if eager and layer.relu and layer is not last:
            kernels += [_pass(name, "relu", 2 * out), _pass(name, "relu backward", 3 * out)]
    out, mask = _written(last), _BITS * _written(last)
    if eager:
        kernels += [_pass(name, "add", 3 * out), _pass(name, "relu", 2 * out), _pass(name, "relu backward", 3 * out)]
        return kernels + [_pass(name, "add backward", 3 * _input(block))]
    kernels.append(_pass(name, "batch_norm_add_relu", (reads + 1) * out + mask))
    return kernels + [_pass(name, "add_relu backward", 3 * _input(block) + mask)]


def _least_block_training(found: list[Block], index: int) -> list[Kernel]:
    """Forward, then backward; the gradient that enters is already masked by the block after it."""
    block, before = found[index], found[index - 1] if index else None
    name, first, last, shortcut = block.name, block.branch[0], block.branch[-1], block.projection
    x, out = _input(block), _written(last)
    kernels = []
    if before is not None and len(block.branch) == 3:  # a 1x1 forms its input in its load and stores it on the side
        kernels.append(Kernel(name, "conv1", flops(first), (3 + _BITS) * x + _written(first), first.weights))
    else:
        if before is not None:
            kernels.append(_pass(name, "batch_norm_add_relu", (3 + _BITS) * x))
        kernels.append(_convolution(first))
    kernels += [_convolution(layer) for layer in block.layers[1:]]
    if index + 1 == len(found):
        kernels += [
            _pass(name, "batch_norm_add_relu", (3 + _BITS) * out),
            _pass(name, "its backward", (3 + _BITS) * out),
        ]
    for layer in reversed(block.branch[1:]):
        wide, narrow = _written(layer), _read_maps(layer)
        kernels.append(Kernel(name, f"{layer.name} input gradient", flops(layer), 2 * (wide + narrow), layer.weights))
        kernels.append(Kernel(name, f"{layer.name} weight gradient", flops(layer), 2 * wide + narrow, layer.weights))
    if shortcut is not None:
        maps = 2 * _written(shortcut) + _read_maps(shortcut)
        kernels += [
            Kernel(name, f"downsample {of} gradient", flops(shortcut), maps, shortcut.weights)
            for of in ("input", "weight")
        ]
    residual = _read_maps(shortcut) if shortcut else out
    sums = 0 if before is None else 2 if before.projection else 1  # BatchNorms whose sums the store also forms
    maps = 2 * _written(first) + residual + (sums + 1 + _BITS) * x
    kernels.append(Kernel(name, "conv1 input gradient", flops(first), maps, first.weights))
    maps = 2 * _written(first) + _read_maps(first)
    return kernels + [Kernel(name, "conv1 weight gradient", flops(first), maps, first.weights)]


def _head_training(model: str, channels: int, size: int) -> list[Kernel]:
    fc = Kernel("head", "fc", 6.0 * channels * CLASSES, 3.0 * (channels + CLASSES), 3.0 * channels * CLASSES)
    weights = sum(layer.weights for layer in read(model)) + channels * CLASSES
    # Gradient read and copy written in the compute dtype; master weight and momentum read and written in float32.
    step = Kernel("optimizer", "sgd", 0.0, 0.0, 2.0 * weights, 16.0 * weights)
    return [_pass("head", "avg_pool", 2.0 * (channels * size**2 + channels)), fc, step]


@lru_cache
def training(model: str, pattern: str = "eager") -> tuple[Kernel, ...]:
    """The kernels of a training step at 224x224 pixels. model: one of layers.MODELS; pattern: one of TRAINING."""
    if pattern not in TRAINING:
        raise ValueError(f"pattern must be one of {', '.join(TRAINING)}, got {pattern!r}")
    found = list(blocks(model))
    kernels = _stem_training(stem(model), pattern)
    for index, block in enumerate(found):
        kernels += _least_block_training(found, index) if pattern == "least" else _block_training(block, pattern)
    last = found[-1].branch[-1]
    return tuple(kernels + _head_training(model, last.filters, last.out_size))


# Ceilings


@dataclass(frozen=True)
class Ceilings:
    """What a machine was measured to do: floating point operations and bytes (read + written) a second."""

    device: str
    threads: int
    flops: dict[str, float]  # by the name of the dtype
    bandwidth: float
    how: str

    def to_dict(self) -> dict:
        return asdict(self)


_SECONDS = 0.3  # without pauses: after a pause of 5 ms a core of a virtual machine is 10-25 % slower for a while


def _best(rate: Callable[[], float]) -> float:
    end, best = time.perf_counter() + _SECONDS, 0.0
    while time.perf_counter() < end:
        best = max(best, rate())
    return best


def _timed(amount: float, function: Callable[[], object]) -> Callable[[], float]:
    def rate() -> float:
        start = time.perf_counter()
        function()
        return amount / (time.perf_counter() - start)

    function()
    return rate


def _cpu_ceilings() -> Ceilings:
    iterations, how = 250_000, "multiply-adds in registers"  # about 1 ms, less than a time slice
    found = {}
    for name, bfloat16 in (("float32", False), ("bfloat16", True)):
        found[name] = _best(lambda b=bfloat16: torch.ops.resnet_fast._fma_peak(iterations, b))
    if found["bfloat16"]:  # a CPU with matrix units does more than its vector instructions; torch's product knows them
        a = torch.randn(1024, 1024).bfloat16()
        product = _best(_timed(2.0 * len(a) ** 3, lambda: a @ a))
        if product > found["bfloat16"]:
            found["bfloat16"], how = product, f"{how} (bfloat16: a matrix product)"
    # Without instructions for it, or with ones that take longer (a virtual machine on Emerald Rapids without its matrix
    # units: half the rate), arithmetic may be in float32.
    found["bfloat16"] = max(found["bfloat16"], found["float32"])
    found["float16"] = found["float32"]
    x = torch.ones(1 << 26)  # 256 MiB, beyond every cache
    y = torch.zeros_like(x)
    bandwidth = _best(_timed(2.0 * x.numel() * x.itemsize, lambda: y.copy_(x)))
    return Ceilings("cpu", torch.get_num_threads(), found, bandwidth, f"{how}; a copy of 256 MiB")


def _cuda_ceilings(size: int = 8192) -> Ceilings:
    def rate(amount: float, function: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        function()
        milliseconds = []
        for _ in range(10):
            start.record()
            function()
            end.record()
            end.synchronize()
            milliseconds.append(start.elapsed_time(end))
        return amount / min(milliseconds) * 1e3

    found = {}
    for name in ("float32", "bfloat16", "float16"):
        a, b = (torch.randn(size, size, device="cuda").to(getattr(torch, name)) for _ in range(2))
        before = torch.backends.cuda.matmul.allow_tf32
        try:
            torch.backends.cuda.matmul.allow_tf32 = True  # as torch's convolutions do by default
            found[name] = rate(2.0 * size**3, lambda a=a, b=b: a @ b)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").zero_()
    y = torch.empty_like(x)
    bandwidth = rate(2.0 * x.numel(), lambda: y.copy_(x))
    how = f"a matrix product of {size} (float32: TF32); a copy of 1 GiB"
    return Ceilings("cuda", torch.get_num_threads(), found, bandwidth, how)


@lru_cache
def _ceilings(device: str, threads: int, level: str) -> Ceilings:
    return _cuda_ceilings() if device == "cuda" else _cpu_ceilings()


def ceilings(device: str) -> Ceilings:
    """What this machine does, measured at the first call with this number of threads. device: "cpu" or "cuda"."""
    from ..backends import cpu_level

    return _ceilings(device, torch.get_num_threads(), cpu_level())


# The bound


@dataclass(frozen=True)
class Bound:
    """Least seconds for a batch, the operations and bytes behind them, and which of the two takes longer."""

    seconds: float
    flops: float
    bytes: float
    by: str

    def figures(self, seconds: float) -> dict:
        """What a measured time means: rates and the fraction of this bound, for a row of results."""
        return {
            "gflops": self.flops / seconds / 1e9,
            "gb_s": self.bytes / seconds / 1e9,
            "fraction_of_bound": self.seconds / seconds,
            "bound": self.by,
        }


def bound(kernels: Iterable[Kernel], batch: int, dtype: torch.dtype, limits: Ceilings) -> Bound:
    """The least time of kernels that run one after the other. batch: at least 1; dtype: of the maps and weights."""
    peak, element = limits.flops[str(dtype).removeprefix("torch.")], dtype.itemsize
    total = operations = traffic = 0.0
    by = {"compute": 0.0, "memory": 0.0}
    for kernel in kernels:
        f, b = kernel.total_flops(batch), kernel.total_bytes(batch, element)
        compute, memory = f / peak, b / limits.bandwidth
        by["compute" if compute > memory else "memory"] += max(compute, memory)
        total, operations, traffic = total + max(compute, memory), operations + f, traffic + b
    return Bound(total, operations, traffic, max(by, key=by.__getitem__))


def table(model: str, batch: int, dtype: torch.dtype, limits: Ceilings) -> list[tuple[str, ...]]:
    """Rows for a reader: each pattern's kernels, traffic and limit, then each block's in the epilogue pattern."""
    rows = [("", "kernels", "GFLOP/image", "MB/image", "us/image", "images/s", "bound")]

    def row(name: str, kernels: list[Kernel] | tuple[Kernel, ...]) -> tuple[str, ...]:
        b = bound(kernels, batch, dtype, limits)
        time_of_one = b.seconds / batch
        return (name, str(len(kernels)), f"{b.flops / batch / 1e9:.3f}", f"{b.bytes / batch / 1e6:.2f}",
                f"{1e6 * time_of_one:.1f}", f"{1 / time_of_one:,.0f}", b.by)  # fmt: skip

    rows += [row(f"inference, {p}", inference(model, p)) for p in INFERENCE]
    rows += [row(f"training, {p}", training(model, p)) for p in TRAINING]
    kernels = inference(model, "epilogue")
    for name in dict.fromkeys(k.block for k in kernels):
        rows.append(row(f"  {name}", [k for k in kernels if k.block == name]))
    return rows
