"""The bottleneck (He et al. 2015, section 4.1): between 256 channels, two 3x3 convolutions have 16.9 times the weights
of a 1x1 to 64 channels, a 3x3 there and a 1x1 back; and what that means for operations, time and memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import resnet as stock

import resnet_fast
from resnet_fast.bench.plots import load_pyplot, save
from resnet_fast.bench.training import allocated
from resnet_fast.measure import calibrate, interleaved
from resnet_fast.nn.blocks import BasicBlock, Bottleneck

from . import Verdict

TITLE = "A bottleneck block beside two 3x3 convolutions, 256 channels in and out"
CHANNELS = 256
BLOCKS = {"two 3x3": (BasicBlock, stock.BasicBlock, 256), "bottleneck": (Bottleneck, stock.Bottleneck, 64)}


@dataclass(frozen=True)
class Settings:
    size: int  # height and width of the maps
    batch: int
    rounds: int  # of timing


QUICK = Settings(size=14, batch=16, rounds=15)
FULL = Settings(size=28, batch=16, rounds=60)


@dataclass
class Block:
    """What is known of a block: counts, milliseconds of a batch, bytes; torch's are those of torchvision's block."""

    weights: int  # of its convolutions
    flops: int  # multiplications and additions of its convolutions, an image
    inference_ms: float = 0.0
    torch_inference_ms: float = 0.0
    training_ms: float = 0.0  # forward and backward
    torch_training_ms: float = 0.0
    inference_bytes: int = 0  # at most, for weights, packed weights and maps of a batch
    kept_bytes: int = 0  # by a forward pass for the backward pass, an image


Found = dict[str, Block]
MEASURES = {  # of a block: a name, how it is had from a Block, its unit
    "weights": (lambda b: b.weights / 1e6, "M"),
    "operations": (lambda b: b.flops / 1e9, "GFLOP an image"),
    "inference": (lambda b: b.inference_ms, "ms a batch"),
    "training": (lambda b: b.training_ms, "ms a batch"),
    "memory at inference": (lambda b: b.inference_bytes / 1e6, "MB for a batch"),
    "kept for backward": (lambda b: b.kept_bytes / 1e6, "MB an image"),
    "inference, torch": (lambda b: b.torch_inference_ms, "ms a batch"),
    "training, torch": (lambda b: b.torch_training_ms, "ms a batch"),
}


def steps(settings: Settings) -> int:
    return 2 * 2 * len(BLOCKS) * settings.rounds


def convolution_weights(block: nn.Module) -> int:
    return sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Conv2d))


def inference(model: nn.Module, images: Tensor) -> nn.Module:
    """``model`` in the form that is fastest at inference here: planned on the CPU; on CUDA its blocks are fused."""
    return resnet_fast.optimize_for_inference(model, images) if images.device.type == "cpu" else model.eval()


@torch.no_grad()
def _inference_bytes(model: nn.Module, images: Tensor) -> int:
    """At most, in a call: weights, packed weights and maps."""
    if images.device.type == "cpu":
        return model.memory().peak
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(images)
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return torch.cuda.max_memory_allocated() - before + weights


def training(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """A forward and a backward pass of ``model``, which it puts into training mode."""
    model, images = model.train(), images.detach().requires_grad_()

    def call() -> None:
        model.zero_grad()
        images.grad = None
        model(images).sum().backward()

    return call


def milliseconds(calls: dict[str, Callable[[], object]], rounds: int, bar: Callable[[int], object]) -> dict[str, float]:
    """Medians of calls that run in turn."""
    timings = interleaved(calls, rounds, bar, warm=0.02)
    return {name: 1e3 * timing.median for name, timing in timings.items()}


def _kept(model: nn.Module, images: Tensor) -> int:
    """Bytes that a forward pass in training keeps for the backward pass, the result among them."""
    resnet_fast.clear_cache()  # no idle map of another size, to be handed out in place of a smaller one
    training(model, images)()
    images = images.detach().requires_grad_()
    before = allocated(images.device.type)
    out = model(images)
    kept = allocated(images.device.type) - before
    out.sum().backward()
    return kept


def call(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """Without a gradient."""
    return torch.no_grad()(lambda: model(images))


def _pair(name: str, images: Tensor, seed: int) -> dict[str, nn.Module]:
    """This package's block and torchvision's, with the same weights and the statistics of ``images``."""
    ours, theirs, planes = BLOCKS[name]
    torch.manual_seed(seed)
    pair = {"ours": ours(CHANNELS, planes), "torch": theirs(CHANNELS, planes)}
    pair = {kind: block.to(images.device, memory_format=torch.channels_last) for kind, block in pair.items()}
    calibrate(pair["ours"], images)
    pair["torch"].load_state_dict(pair["ours"].state_dict())
    return {kind: block.eval() for kind, block in pair.items()}


def measure(settings: Settings, seed: int, device: str, bar: Callable[[int], object]) -> Found:
    torch.manual_seed(seed)
    images = torch.randn(settings.batch, CHANNELS, settings.size, settings.size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    found, running, learning = {}, {}, {}
    for name in BLOCKS:
        pair = _pair(name, images, seed)
        convolutions = resnet_fast.explain(pair["ours"], images[:1]).convolutions
        fast = inference(pair["ours"], images)
        found[name] = Block(
            weights=convolution_weights(pair["ours"]),
            flops=sum(c.flops for c in convolutions),
            inference_bytes=_inference_bytes(fast, images),
            kept_bytes=_kept(copy.deepcopy(pair["ours"]), images) // settings.batch,
        )
        running |= {(name, "ours"): call(fast, images), (name, "torch"): call(pair["torch"], images)}
        learning |= {(name, kind): training(copy.deepcopy(block), images) for kind, block in pair.items()}
    times = milliseconds(running, settings.rounds, bar)
    training_times = milliseconds(learning, settings.rounds, bar)
    for name, block in found.items():
        block.inference_ms, block.torch_inference_ms = times[name, "ours"], times[name, "torch"]
        block.training_ms, block.torch_training_ms = training_times[name, "ours"], training_times[name, "torch"]
    return found


def rows(found: Found) -> list[tuple[str, ...]]:
    lines = [("", *found, "ratio")]
    for name, (value, unit) in MEASURES.items():
        wide, narrow = (value(block) for block in found.values())
        lines.append((f"{name}, {unit}", f"{wide:.3g}", f"{narrow:.3g}", f"{wide / narrow:.1f}"))
    return lines


def verdicts(found: Found) -> list[Verdict]:
    wide, narrow = found.values()
    return [
        Verdict(
            f"{wide.weights:,} weights against {narrow.weights:,}: {wide.weights / narrow.weights:.1f} times as many",
            (wide.weights, narrow.weights) == (1_179_648, 69_632),
        ),
        Verdict(
            f"{wide.flops / narrow.flops:.1f} times the operations", wide.flops * 69_632 == narrow.flops * 1_179_648
        ),
        Verdict(
            f"{wide.inference_ms / narrow.inference_ms:.1f} times as long at inference, "
            f"{wide.training_ms / narrow.training_ms:.1f} times in training",
            wide.inference_ms > 1.5 * narrow.inference_ms and wide.training_ms > 1.5 * narrow.training_ms,
        ),
    ]


def draw(found: Found, path: Path) -> None:
    plt = load_pyplot()
    shown = list(MEASURES.items())[:6]
    figure, axes = plt.subplots(1, len(shown), figsize=(11, 2.8))
    for axis, (name, (value, unit)) in zip(axes, shown, strict=True):
        values = [value(block) for block in found.values()]
        bars = axis.bar(list(found), values, color=["#8d99ae", "#00798c"], width=0.65)
        axis.bar_label(bars, [f"{v:.3g}" for v in values], fontsize=8, padding=2)
        ratio = values[0] / values[1]
        axis.set_title(f"{name}\n{ratio:.1f} to 1", fontsize=9)
        axis.set_ylabel(unit, fontsize=8)
        axis.set_yticks([])
        axis.margins(y=0.15)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines["left"].set_visible(False)
    figure.suptitle(TITLE, fontsize=11)
    figure.tight_layout()
    save(figure, path)
