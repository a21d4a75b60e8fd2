"""Real images that come with scikit-learn."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor


class Split(NamedTuple):
    """Images [N, 1, 8, 8] of a mean of 0 and a deviation of 1, and labels [N], for training and for testing."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits(device: str, batch: int) -> Split:
    """The 1,797 handwritten digits of the UCI repository, 8x8 pixels; as many for training as make whole batches and
    leave at least 200 for testing. Always the same ones."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images, dtype=torch.float32)[order, None]
    images = ((images - images.mean()) / images.std()).to(device, memory_format=torch.channels_last)
    labels = torch.tensor(found.target)[order].to(device)
    count = (len(labels) - 200) // batch * batch
    return Split(images[:count], labels[:count], images[count:], labels[count:])


def patches(count: int, generator: torch.Generator, size: int = 8, scale: int = 4) -> Tensor:
    """[count, 3, size, size]: places in two photographs, at a ``scale``-th of their resolution.

    Every patch has a mean of 0 in each channel, so that none is darker or redder than the others, and every pixel a
    mean of 0 and a deviation of 1 over the patches.
    """
    photos = [torch.tensor(photo, dtype=torch.float32).permute(2, 0, 1) for photo in load_sample_images().images]
    found = torch.empty(count, 3, size, size)
    for i in range(count):
        photo = photos[i % len(photos)]
        y, x = (int(torch.randint(extent - size * scale, (1,), generator=generator)) for extent in photo.shape[1:])
        found[i] = F.avg_pool2d(photo[:, y : y + size * scale, x : x + size * scale], scale)
    found -= found.mean((2, 3), keepdim=True)
    found /= found.std((1, 2, 3), keepdim=True)
    return ((found - found.mean(0)) / found.std(0)).contiguous(memory_format=torch.channels_last)
