"""Training of the small networks, as the paper does it: SGD with momentum and weight decay, batches of 128."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .images import Split

BATCH = 128
RATE = 0.05  # half of the paper's: at 0.1 one of four residual networks of 56 layers did not start within 6 epochs


class Curve(NamedTuple):
    """Fractions of the images that a network got wrong."""

    training: list[float]  # in each epoch, on the way
    test: float  # of the images for testing, at the end


def train(model: nn.Module, split: Split, epochs: int, seed: int, bar: Callable[[int], object]) -> Curve:
    """Trains ``model``; moves the bar once an epoch. The rate rises for a fifth of the steps, then falls to 0."""
    batches = len(split.labels) // BATCH
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=1e-4)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * batches, pct_start=0.2)
    order, errors = torch.Generator().manual_seed(seed), []
    model.train()
    for _ in range(epochs):
        wrong = 0
        for chosen in torch.randperm(len(split.labels), generator=order).to(split.labels.device).split(BATCH):
            logits, labels = model(split.images[chosen]), split.labels[chosen]
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
            rate.step()
            wrong += int((logits.argmax(1) != labels).sum())
        errors.append(wrong / len(split.labels))
        bar(1)
    with torch.no_grad():
        test = (model.eval()(split.test_images).argmax(1) != split.test_labels).float().mean()
    return Curve(errors, float(test))


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"
