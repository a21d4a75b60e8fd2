"""Shattered gradients (Balduzzi et al. 2017): with depth the gradients of a plain network at different inputs have
less and less to do with each other, until they are white noise; those of a residual network much less so.

The networks of the paper's theorems, before any training, as 3x3 convolutions of feature maps v [N, C, H, W]:

    plain                        v <- W relu(bn(v))            correlation 2^-L after L layers
    residual without BatchNorm   v <- v + W relu(v)            (3/4)^L
    residual                     v <- v + W relu(bn(v))        about 1 / sqrt(L)

The theorems suppose that every unit is active for half of the inputs and for a quarter of all pairs of them, as for
inputs that have nothing in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast import ops
from resnet_fast.bench.plots import load_pyplot, save
from resnet_fast.nn.blocks import BasicBlock, PlainBlock

from . import Verdict
from .images import patches

TITLE = "Gradients at different inputs: plain networks forget what they have in common"
KINDS = ("plain", "residual without BatchNorm", "residual")
THEORY = {
    "plain": lambda layers: 0.5**layers,
    "residual without BatchNorm": lambda layers: 0.75**layers,
    "residual": lambda layers: (layers + 1) ** -0.5,  # so that it is 1 without a layer
}
SHORT = {"plain": "plain", "residual without BatchNorm": "no BatchNorm", "residual": "residual"}
FORMULAS = {"plain": "2⁻ᴸ", "residual without BatchNorm": "(3/4)ᴸ", "residual": "1/√(L+1)"}
COLORS = {"plain": "#d1495b", "residual without BatchNorm": "#c98a00", "residual": "#00798c"}
_FLOOR = 2e-3  # below which a correlation is one by chance
_FITTED = 8  # layers up to which a rate is fitted: later, correlations of plain networks drown in those by chance


@dataclass(frozen=True)
class Settings:
    depths: tuple[int, ...]
    networks: int  # random ones, over which a correlation is averaged
    inputs: int = 64
    channels: int = 64


QUICK = Settings(depths=(1, 2, 4, 6, 8, 12, 16, 24), networks=4)
FULL = Settings(depths=(1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48), networks=16, inputs=128)


@dataclass
class Found:
    """Correlations of gradients by kind and depth, and for the picture the gradients along a walk."""

    depths: tuple[int, ...]
    different: dict[str, list[float]]  # at different photographs, in the theorems' networks, one for each depth
    neighbours: dict[str, dict[int, float]]  # at neighbours on a walk, in this package's blocks, which have two layers
    waves: dict[tuple[str, int], list[float]]  # by kind and depth: the derivative of the output along the walk


def steps(settings: Settings) -> int:
    return len(KINDS) * len(settings.depths) * settings.networks + len(KINDS)


# Networks: each takes maps [N, C, H, W] through some layers.


def _weight(like: Tensor, generator: torch.Generator) -> Tensor:  # [C, C, 3, 3]
    channels = like.shape[1]
    weight = torch.randn(channels, channels, 3, 3, generator=generator) * math.sqrt(2 / (9 * channels))
    return weight.to(like.device, memory_format=torch.channels_last)


def _branch(v: Tensor, weight: Tensor) -> Tensor:
    """W relu(bn(v)): one fused operator, which normalises what the convolution loads."""
    with torch.no_grad():
        mean, var = ops.batch_norm_statistics(v)
    return ops.batch_norm_relu_conv(v, mean, var, None, None, weight, padding=1)


def _add_branch_without_norm(v: Tensor, weight: Tensor) -> Tensor:
    """v + W relu(v): the convolution adds the shortcut in its store; a mean of 0 and a variance of 1 change nothing."""
    zeros, ones = torch.zeros(v.shape[1], device=v.device), torch.ones(v.shape[1], device=v.device)
    return ops.conv_bn_relu(v.relu(), weight, None, None, None, zeros, ones, residual=v, padding=1, eps=0.0, relu=False)


def of_theorem(kind: str, layers: int, v: Tensor, generator: torch.Generator) -> Tensor:
    """v after some layers of the theorems' networks."""
    for _ in range(layers):
        weight = _weight(v, generator)
        if kind == "residual without BatchNorm":
            v = _add_branch_without_norm(v, weight)
        else:
            branch = _branch(v, weight)
            v = v + branch if kind == "residual" else branch
    return v


def of_blocks(kind: str, layers: int, v: Tensor, generator: torch.Generator) -> Tensor:
    """v after some layers, an even number, of this package's blocks as they are: relu(v + W relu(W v)) with BatchNorm
    behind each W, and without v where it is plain. In eval mode a new BatchNorm changes nothing."""
    for _ in range(layers // 2):
        block = (PlainBlock if kind == "plain" else BasicBlock)(v.shape[1], v.shape[1])
        block.train(kind != "residual without BatchNorm")
        for conv in (block.conv1, block.conv2):
            conv.weight = nn.Parameter(_weight(v, generator), requires_grad=False)
        v = block.to(v.device)(v)
    return v


# Gradients, and how alike they are.

Network = Callable[[str, int, Tensor, torch.Generator], Tensor]


def _first_maps(images: Tensor, channels: int, generator: torch.Generator) -> Tensor:  # [N, channels, H, W]
    weight = torch.randn(channels, images.shape[1], 3, 3, generator=generator) / math.sqrt(9 * images.shape[1])
    return ops.conv2d(images, weight.to(images.device), padding=1)


def gradients(images: Tensor, network: Network, kind: str, layers: int, channels: int, seed: int) -> Tensor:
    """[N, C, H, W]: of a random sum of the outputs of a network, at the first feature map of every image."""
    generator = torch.Generator().manual_seed(seed)
    v = _first_maps(images, channels, generator).requires_grad_()
    out = network(kind, layers, v, generator)
    weights = torch.randn(out.shape[1:], generator=generator).to(out.device)
    return torch.autograd.grad((out * weights).sum(), v)[0]


def _products(g: Tensor) -> tuple[float, float]:
    """Mean product of the gradients of two different images, and of an image with itself."""
    gram = g.flatten(1).double() @ g.flatten(1).double().T
    n = len(gram)
    return float((gram.sum() - gram.trace()) / (n * (n - 1))), float(gram.trace() / n)


def _neighbour_products(g: Tensor) -> tuple[float, float]:
    """Mean product of the gradients of an image and the next one, and of an image with itself."""
    g = g.flatten(1).double()
    return float((g[:-1] * g[1:]).sum() / (len(g) - 1)), float(g.square().sum() / len(g))


def _correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Of the products of several networks: the mean over pairs over the mean square, as the theorems have it."""
    return sum(p for p, _ in pairs) / sum(square for _, square in pairs)


def walk(ends: Tensor, points: int) -> Tensor:
    """[points, C, H, W]: half a turn from an image through a second one, ends [2, C, H, W]; all as strong as these."""
    angle = torch.linspace(0, math.pi, points)[:, None, None, None]
    return (ends[0] * angle.cos() + ends[1] * angle.sin()).contiguous(memory_format=torch.channels_last)


def _wave(kind: str, layers: int, images: Tensor, channels: int, seed: int) -> list[float]:
    """The derivative of the output along the walk, at each of its points; its deviation is 1."""
    g = gradients(images, of_blocks, kind, layers, channels, seed).flatten(1)
    maps = _first_maps(images, channels, torch.Generator().manual_seed(seed)).flatten(1)  # those of `gradients`
    wave = (g[:-1] * (maps[1:] - maps[:-1])).sum(1)
    return ((wave - wave.mean()) / wave.std()).tolist()


def measure(settings: Settings, seed: int, device: str, bar: Callable[[int], object]) -> Found:
    images = patches(settings.inputs, torch.Generator().manual_seed(seed))
    path, long_path = (walk(images[:2], points).to(device) for points in (settings.inputs, 256))
    images = images.to(device)
    found = Found(settings.depths, {kind: [] for kind in KINDS}, {kind: {} for kind in KINDS}, {})
    for layers in settings.depths:
        for kind in KINDS:
            different, neighbours = [], []
            for i in range(settings.networks):
                arguments = (kind, layers, settings.channels, seed * settings.networks + i)
                different.append(_products(gradients(images, of_theorem, *arguments)))
                if layers % 2 == 0:
                    neighbours.append(_neighbour_products(gradients(path, of_blocks, *arguments)))
                bar(1)
            found.different[kind].append(_correlation(different))
            if neighbours:
                found.neighbours[kind][layers] = _correlation(neighbours)
    for kind, layers in (("plain", 2), ("plain", 24), ("residual", 24)):
        found.waves[kind, layers] = _wave(kind, layers, long_path, settings.channels, seed)
        bar(1)
    return found


# What it says.


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the line through points, by least squares."""
    x, y = torch.tensor(xs, dtype=torch.float64), torch.tensor(ys, dtype=torch.float64)
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def factor_per_layer(found: Found, kind: str) -> float:
    """By which a correlation falls with each layer, over the first 8."""
    pairs = [(d, math.log(max(c, 1e-6))) for d, c in zip(found.depths, found.different[kind], strict=True)]
    return math.exp(_slope(*zip(*[p for p in pairs if p[0] <= _FITTED], strict=True)))


def power(found: Found) -> float:
    """Of the number of layers, from 2, with which the correlation of residual networks falls."""
    pairs = zip(found.depths, found.different["residual"], strict=True)
    return _slope(*zip(*[(math.log(d), math.log(max(c, 1e-6))) for d, c in pairs if d > 1], strict=True))


def rows(found: Found) -> list[tuple[str, ...]]:
    head = [name for kind in KINDS for name in (SHORT[kind], FORMULAS[kind])]
    lines = [("layers", *head, *(f"{SHORT[kind]}, near" for kind in KINDS))]
    for i, depth in enumerate(found.depths):
        cells = [f"{value:.3f}" for kind in KINDS for value in (found.different[kind][i], THEORY[kind](depth))]
        near = (found.neighbours[kind].get(depth) for kind in KINDS)
        lines.append((str(depth), *cells, *("" if value is None else f"{value:.3f}" for value in near)))
    return lines


def verdicts(found: Found) -> list[Verdict]:
    at = found.depths.index(_FITTED)
    plain, without, residual = (found.different[kind][at] for kind in KINDS)
    factors = [factor_per_layer(found, kind) for kind in KINDS[:2]]
    deepest = max(found.neighbours["plain"])
    near_plain, _, near_residual = (found.neighbours[kind][deepest] for kind in KINDS)
    return [
        Verdict(
            f"after {_FITTED} layers: plain {plain:.3f} < residual without BatchNorm {without:.3f} < residual "
            f"{residual:.3f}",
            2 * plain < without and 1.2 * without < residual,
        ),
        Verdict(f"plain: falls as {factors[0]:.2f}^L, in theory 0.5^L", 0.45 < factors[0] < 0.6),
        Verdict(
            f"residual without BatchNorm: falls as {factors[1]:.2f}^L over {_FITTED} layers, in theory 0.75^L",
            0.7 < factors[1] < 0.85,
        ),
        Verdict(f"residual: falls as L^{power(found):.2f}, in theory L^-0.5", -0.6 < power(found) < -0.4),
        Verdict(
            f"neighbouring inputs, {deepest} layers of blocks: plain {near_plain:.3f}, residual {near_residual:.3f}",
            near_plain < 0.15 and near_residual > 0.3,
        ),
    ]


def _draw_waves(axes: Sequence, found: Found) -> None:
    for axis, ((kind, layers), wave) in zip(axes, found.waves.items(), strict=True):
        axis.plot(wave, color=COLORS[kind], linewidth=0.9)
        axis.set_title(f"{kind}, {layers} layers", fontsize=8, loc="left", color=COLORS[kind])
        axis.set(xticks=[], yticks=[])
        axis.spines[["left", "bottom"]].set_visible(False)
    axes[-1].set_xlabel("from one photograph to another")


def _draw_theory(axis: Any, found: Found) -> None:
    every = range(1, found.depths[-1] + 1)
    for kind in KINDS:
        measured = [c if c > _FLOOR else math.nan for c in found.different[kind]]
        name = f"{kind}, theory: {FORMULAS[kind]}"
        axis.plot(found.depths, measured, "o-", color=COLORS[kind], markersize=3.5, linewidth=1.8, label=name)
        axis.plot(every, [THEORY[kind](layers) for layers in every], "--", color=COLORS[kind], linewidth=1)
    axis.set(yscale="log", ylim=(_FLOOR, 1.3), xlabel="layers", ylabel="correlation")
    axis.set_title("between photographs (dashed: theory)", fontsize=9)


def _draw_neighbours(axis: Any, found: Found) -> None:
    for kind in KINDS:
        axis.plot(
            *zip(*found.neighbours[kind].items(), strict=True), "o-", color=COLORS[kind], markersize=3.5, linewidth=1.8
        )
    axis.set(xlabel="layers", ylim=(-0.05, 1.05))
    axis.set_title("between neighbours on the way", fontsize=9)


def draw(found: Found, path: Path) -> None:
    plt = load_pyplot()
    figure = plt.figure(figsize=(10.5, 3.5))
    grid = figure.add_gridspec(3, 3, width_ratios=(1, 1.15, 1), hspace=0.55, wspace=0.3, top=0.83)
    waves = [figure.add_subplot(grid[i, 0]) for i in range(3)]
    figure.text(waves[0].get_position().x0, 0.91, "gradient along the way", fontsize=9)
    _draw_waves(waves, found)
    middle = figure.add_subplot(grid[:, 1])
    _draw_theory(middle, found)
    _draw_neighbours(figure.add_subplot(grid[:, 2]), found)
    figure.legend(
        *middle.get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False, bbox_to_anchor=(0.5, -0.13)
    )
    figure.suptitle(TITLE, fontsize=11, y=1.0)
    save(figure, path)
