"""Whole networks on nothing but Triton kernels: one launch a convolution, and torch's own convolution never."""

from collections import Counter

import pytest
import torch
from checks import NoConvolution, assert_accurate
from networks import images, ours_and_stock

from .kernels import launches

pytestmark = pytest.mark.usefixtures("triton_backend")

# Launches of a forward pass: a projection shortcut is computed with the last convolution of its block.
BY_DESCRIPTORS = {
    "resnet18": Counter(conv_tma_kernel=16),  # 20 convolutions: the stem, 3 projections, 16 others
    "resnet50": Counter(conv_tma_kernel=48),  # 53: the stem, 4 projections, 48 others
}
BY_POINTERS = {"resnet18": Counter(conv_pointers_kernel=1 + 16 - 3, conv_projection_pointers_kernel=3)}
STEM = Counter(pad_kernel=1, conv_few_channels_max_pool_kernel=1)


# ResNet-50 in the other dtypes is right too, but takes another two minutes.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("resnet18", dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)] + [("resnet50", torch.bfloat16)],
)
@torch.no_grad()
def test_network(name, dtype):
    x = images(1, 3, 64, 64)
    model, (exact, *others) = ours_and_stock(name, x, dtype)
    with launches() as found, NoConvolution():
        out = model(x.to(dtype))
    expected = BY_POINTERS[name] + Counter(max_pool_kernel=1) if dtype == torch.float32 else BY_DESCRIPTORS[name] + STEM
    assert found == expected + Counter(avg_pool_flatten_kernel=1)
    assert_accurate(out, exact, others)
