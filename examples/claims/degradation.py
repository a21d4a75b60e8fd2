"""Degradation (He et al. 2015, section 4.2): plain networks get worse on their own training set as they get deeper,
residual ones do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from resnet_fast.bench.plots import load_pyplot, save
from resnet_fast.models import cifar

from . import Verdict
from .images import digits
from .training import BATCH, Curve, percent, train

TITLE = "Deeper plain networks are worse on their own training set; residual ones are not"
KINDS = {"plain": "plain", "residual": "resnet"}  # to builders in resnet_fast.models.cifar
COLORS = {"plain": "#d1495b", "residual": "#00798c"}
MARGIN = 0.1  # between errors that are said to differ


@dataclass(frozen=True)
class Settings:
    depths: tuple[int, ...]
    epochs: int


QUICK = Settings(depths=(20, 32, 56), epochs=6)
FULL = Settings(depths=(20, 32, 44, 56, 110), epochs=30)
Found = dict[tuple[str, int], Curve]  # by kind and depth


def steps(settings: Settings) -> int:
    return len(KINDS) * len(settings.depths) * settings.epochs


def measure(settings: Settings, seed: int, device: str, bar: Callable[[int], object]) -> Found:
    split, found = digits(device, BATCH), {}
    for depth in settings.depths:
        for kind, builder in KINDS.items():
            torch.manual_seed(seed)
            model = getattr(cifar, f"{builder}{depth}")(in_channels=1)
            model = model.to(device, memory_format=torch.channels_last)
            found[kind, depth] = train(model, split, settings.epochs, seed, bar)
    return found


def _last(found: Found, kind: str) -> list[tuple[int, float]]:
    return [(depth, curve.training[-1]) for (of, depth), curve in found.items() if of == kind]


def rows(found: Found) -> list[tuple[str, ...]]:
    lines = [("network", "training error", "test error")]
    for (kind, depth), curve in found.items():
        lines.append((f"{kind}, {depth} layers", percent(curve.training[-1]), percent(curve.test)))
    return lines


def verdicts(found: Found) -> list[Verdict]:
    (few, plain_few), *_, (many, plain_many) = _last(found, "plain")
    (_, residual_few), *_, (_, residual_many) = _last(found, "residual")
    return [
        Verdict(
            f"plain: with {many} layers a training error of {percent(plain_many)}, with {few} of {percent(plain_few)}",
            plain_many > plain_few + MARGIN,
        ),
        Verdict(
            f"residual: {many} layers ({percent(residual_many)}) are no worse than {few} ({percent(residual_few)})",
            residual_many < residual_few + MARGIN / 2,
        ),
    ]


def draw(found: Found, path: Path) -> None:
    plt = load_pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.3), width_ratios=(1, 1, 0.9), sharey=True)
    depths, shades = sorted({depth for _, depth in found}), plt.get_cmap("viridis_r")
    for axis, kind in zip(axes, KINDS, strict=False):
        for i, depth in enumerate(depths):
            errors = [100 * e for e in found[kind, depth].training]
            color = shades(0.1 + 0.9 * i / max(len(depths) - 1, 1))
            axis.plot(range(1, len(errors) + 1), errors, color=color, linewidth=1.8, label=str(depth))
        axis.set(title=kind, xlabel="epoch", ylim=(-2, 100))
    axes[0].set_ylabel("training error, %")
    axes[1].legend(frameon=False, fontsize=8, title="layers", loc="upper right")
    for kind, marker in zip(KINDS, "os", strict=True):
        ends = [100 * error for _, error in _last(found, kind)]
        axes[2].plot(depths, ends, color=COLORS[kind], marker=marker, linewidth=1.8)
        axes[2].annotate(kind, (depths[-1], ends[-1]), (-4, 8), textcoords="offset points", ha="right")
    axes[2].set(title="after the last epoch", xlabel="layers", xticks=depths)
    for axis in axes:
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    figure.suptitle(TITLE, fontsize=11)
    figure.tight_layout()
    save(figure, path)
