"""Shortcuts (He et al. 2015, section 4.1): where a block changes channels and size, its input must be brought to the
shape of its output, padded with zeros (option A) or projected by a 1x1 convolution (B); a projection in every block
(C) is possible too. What each costs, and that a network needs a shortcut much more than a particular one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast.bench.plots import load_pyplot, save
from resnet_fast.measure import calibrate
from resnet_fast.models import cifar

from . import Verdict
from .images import digits
from .parameters import call, inference, milliseconds, training
from .training import BATCH, Curve, percent, train

TITLE = "Shortcuts: identity where it fits, else zeros or a projection"
OPTIONS = {"none": None, "A, zeros": "A", "B, projection": "B", "C, all projections": "C"}
COLORS = {"none": "#d1495b", "A, zeros": "#00798c", "B, projection": "#8d99ae", "C, all projections": "#30343f"}


@dataclass(frozen=True)
class Settings:
    depth: int  # of the networks that learn the digits
    epochs: int
    batch: int  # of images of 32x32 pixels, for the times
    rounds: int


QUICK = Settings(depth=32, epochs=6, batch=32, rounds=10)
FULL = Settings(depth=56, epochs=30, batch=64, rounds=20)


@dataclass
class Network:
    """What is known of a network: counts, milliseconds of a batch of 32x32 pixels, and how it learns digits."""

    weights: int
    flops: int  # of its convolutions, an image of 32x32 pixels
    curve: Curve
    inference_ms: float = 0.0
    training_ms: float = 0.0  # forward and backward


Found = dict[str, Network]


def steps(settings: Settings) -> int:
    return len(OPTIONS) * (settings.epochs + 2 * settings.rounds)


def _network(settings: Settings, option: str | None, in_channels: int, seed: int, device: str) -> nn.Module:
    torch.manual_seed(seed)
    model = cifar.ResNet(settings.depth, in_channels=in_channels, shortcut=option)
    return model.to(device, memory_format=torch.channels_last)


def _flops(model: nn.Module, images: Tensor) -> int:
    return sum(c.flops for c in resnet_fast.explain(model.eval(), images[:1]).convolutions)


def measure(settings: Settings, seed: int, device: str, bar: Callable[[int], object]) -> Found:
    split, found, running, learning = digits(device, BATCH), {}, {}, {}
    images = torch.randn(settings.batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    for name, option in OPTIONS.items():
        model = calibrate(_network(settings, option, 3, seed, device), images)
        weights = sum(p.numel() for p in model.parameters())
        running[name] = call(inference(model, images), images)
        learning[name] = training(_network(settings, option, 3, seed, device), images)
        curve = train(_network(settings, option, 1, seed, device), split, settings.epochs, seed, bar)
        found[name] = Network(weights, _flops(model, images), curve)
    inference_ms, training_ms = (milliseconds(calls, settings.rounds, bar) for calls in (running, learning))
    for name, network in found.items():
        network.inference_ms, network.training_ms = inference_ms[name], training_ms[name]
    return found


def rows(found: Found) -> list[tuple[str, ...]]:
    lines = [("shortcut", "weights", "MFLOP", "inference, ms", "training, ms", "training error", "test error")]
    for name, n in found.items():
        times = (f"{n.inference_ms:.1f}", f"{n.training_ms:.0f}")
        errors = (percent(n.curve.training[-1]), percent(n.curve.test))
        lines.append((name, f"{n.weights:,}", f"{n.flops / 1e6:.1f}", *times, *errors))
    return lines


def verdicts(found: Found) -> list[Verdict]:
    none, zeros, some, every = found.values()
    errors = [n.curve.training[-1] for n in (zeros, some, every)]
    slow, *quick = (sum(n.curve.training) / len(n.curve.training) for n in (every, zeros, some))
    return [
        Verdict(f"A has no weight more than no shortcut: {zeros.weights:,}", zeros.weights == none.weights),
        Verdict(
            f"B has {some.weights - zeros.weights:,} more, C {every.weights - zeros.weights:,}",
            zeros.weights < some.weights < every.weights,
        ),
        Verdict(
            f"operations: B {some.flops / zeros.flops:.3f} of A's, C {every.flops / zeros.flops:.3f}",
            none.flops == zeros.flops < some.flops < every.flops,
        ),
        Verdict(
            f"training error: none {percent(none.curve.training[-1])}, A, B, C {', '.join(map(percent, errors))}",
            none.curve.training[-1] > max(errors) + 0.02,
        ),
        Verdict(
            f"networks learn sooner where shortcuts are identities, mean training error: A {percent(quick[0])}, "
            f"B {percent(quick[1])}, C {percent(slow)}",
            slow > max(quick) + 0.05,
        ),
    ]


def draw(found: Found, path: Path) -> None:
    plt = load_pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(11, 3.1), width_ratios=(1, 1, 1, 1.5))
    names, colors, base = list(found), [COLORS[name] for name in found], found["A, zeros"]
    panels = (("weights", "weights"), ("inference", "inference_ms"), ("training", "training_ms"))
    for axis, (title, key) in zip(axes, panels, strict=False):
        values = [getattr(n, key) / getattr(base, key) for n in found.values()]
        bars = axis.barh(names[::-1], values[::-1], color=colors[::-1], height=0.65)
        axis.bar_label(bars, [f"{v:.2f}" for v in values[::-1]], fontsize=8, padding=2)
        axis.set_title(f"{title}, of A's", fontsize=9)
        axis.set_xticks([])
        axis.margins(x=0.2)
        axis.spines["bottom"].set_visible(False)
        axis.tick_params(axis="y", labelleft=axis is axes[0])
    for name, network in found.items():
        errors = [100 * e for e in network.curve.training]
        axes[-1].plot(range(1, len(errors) + 1), errors, color=COLORS[name], linewidth=1.8, label=name)
    axes[-1].set_title("learning digits", fontsize=9)
    axes[-1].set(xlabel="epoch", ylabel="training error, %", ylim=(-2, 100))
    axes[-1].grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes[-1].legend(frameon=False, fontsize=8)
    figure.suptitle(TITLE, fontsize=11)
    figure.tight_layout()
    save(figure, path)
