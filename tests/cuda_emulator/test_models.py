"""Whole networks on nothing but CUDA C++ kernels: one launch a convolution, and torch's own convolution never."""

from collections import Counter

import pytest
import torch
from checks import NoConvolution, assert_accurate
from networks import images, ours_and_stock

import resnet_fast
from resnet_fast import models

from . import emulated

pytestmark = pytest.mark.usefixtures("cuda_backend")

CONVOLUTIONS = {"resnet18": 20, "resnet50": 53}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("name", CONVOLUTIONS)
@torch.no_grad()
def test_network(name, dtype):
    x = images(1, 3, 64, 64)
    model, (exact, *others) = ours_and_stock(name, x, dtype)
    with emulated.launches() as found, NoConvolution("max_pool2d", "avg_pool2d"):
        out = model(x.to(dtype))
    convolutions = Counter({n: times for n, times in found.items() if n.startswith("conv")})
    assert convolutions.total() == CONVOLUTIONS[name]
    assert found - convolutions == Counter(max_pool_kernel=1, avg_pool_flatten_kernel=1)
    if dtype == torch.float32:  # its operands in TF32, 10 bits of mantissa: as many as float16 has
        others = [t.float() for t in ours_and_stock(name, x, torch.float16)[1][1:]]
    assert_accurate(out, exact, others)


@torch.no_grad()
def test_explain():
    model = models.resnet18().eval().to(torch.bfloat16)
    words = str(resnet_fast.explain(model, images(1, 3, 32, 32).to(torch.bfloat16)))
    assert "CUDA C++" in words and "cuDNN" not in words
