"""max_pool_with_indices and its gradient in CUDA C++, through the public operator: torch's, bit for bit."""

import math

import pytest
import test_max_pool
import torch
import torch.nn.functional as F
from checks import LAYOUTS, assert_same_special_values

from resnet_fast.ops import max_pool_with_indices, max_pool_with_indices_ref

from . import emulated

pytestmark = pytest.mark.usefixtures("cuda_backend")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STEM = test_max_pool.STEM


def assert_equals_torch(x, **how):
    """Result, indices, and the gradient that torch finds in float32, rounded once."""
    leaf, plain = x.detach().requires_grad_(), x.detach().float().contiguous().requires_grad_()
    out, indices = max_pool_with_indices(leaf, **how)
    ref, places = max_pool_with_indices_ref(x, **how)
    assert torch.equal(out.nan_to_num(), ref.nan_to_num()) and torch.equal(indices, places)
    assert_same_special_values(out, ref)
    assert indices.dtype == torch.uint8 and out.stride() == indices.stride()
    assert out.stride() == torch.empty(out.shape, memory_format=torch.channels_last).stride()
    grad = torch.randn(out.shape).to(x.dtype)
    (found,) = torch.autograd.grad(out, leaf, grad)
    (right,) = torch.autograd.grad(F.max_pool2d(plain, **how), plain, grad.float())
    assert torch.equal(found, right.to(x.dtype))
    assert found.stride() == torch.empty(x.shape, memory_format=torch.channels_last).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", (1, 3, 4, 7, 8, 24, 65))
def test_channels(c, dtype):
    with emulated.launches() as found:
        assert_equals_torch(torch.randn(2, c, 9, 7).to(dtype), **STEM)
    assert found == {"max_pool_kernel": 1, "max_pool_backward_kernel": 1}


GEOMETRIES = {
    **{
        n: how for n, how in test_max_pool.GEOMETRIES.items() if n not in ("stem", "nothing but padding", "one element")
    },
    "dilated": dict(shape=(2, 8, 9, 11), kernel_size=3, stride=2, padding=1, dilation=2),
    "every place": dict(shape=(1, 8, 18, 17), kernel_size=16, stride=1),
    "three columns": dict(shape=(2, 8, 7, 9), kernel_size=3, stride=1, padding=1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GEOMETRIES)
def test_geometries(case, dtype):
    how = dict(GEOMETRIES[case])
    with emulated.launches() as found:
        assert_equals_torch(torch.randn(how.pop("shape")).to(dtype), **how)
    assert found.total() == (0 if case == "batch 0" else 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    assert_equals_torch(LAYOUTS[layout](torch.randn(2, 8, 8, 9)), **STEM)


def test_gradient_and_indices_of_any_strides():
    x = torch.randn(2, 8, 9, 7).requires_grad_()
    out, _ = max_pool_with_indices(x, **STEM)
    grad = torch.randn(out.shape)
    found = [torch.autograd.grad(out, x, make(grad), retain_graph=True)[0] for make in LAYOUTS.values()]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    expanded = LAYOUTS["channels_last"](LAYOUTS["expanded"](grad))
    assert torch.equal(found[3], torch.autograd.grad(out, x, expanded)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype):
    """Of equal values the first place, of NaNs the last, and of -inf alone the first inside the map."""
    for c in (5, 16):
        x = torch.randint(-2, 3, (2, c, 9, 9)).to(dtype)
        x.view(-1)[torch.randperm(x.numel())[: x.numel() // 4]] = math.nan
        x.view(-1)[torch.randperm(x.numel())[:30]] = torch.tensor([math.inf, -math.inf, -0.0]).to(dtype).repeat(10)
        x[0, 3], x[1, :, 4], x[1, 2, 0] = -math.inf, math.nan, -math.inf
        for how in (STEM, dict(kernel_size=2), dict(kernel_size=3, stride=1, padding=1, dilation=2)):
            assert_equals_torch(x, **how)


def test_gradients_that_are_not_finite():
    x = torch.arange(2.0 * 4 * 6 * 6).view(2, 4, 6, 6).requires_grad_()
    out, _ = max_pool_with_indices(x, **STEM)
    grad = torch.zeros(out.shape)
    grad[0, 0, 1, 1], grad[1, 3, 2, 0] = math.nan, math.inf
    (found,) = torch.autograd.grad(out, x, grad)
    assert found.isnan().sum() == 1 and found.isinf().sum() == 1 and (found[0, 0].nan_to_num() == 0).all()


@pytest.mark.usefixtures("order")
def test_any_order():
    assert_equals_torch(torch.randn(2, 24, 9, 9), **STEM)


def test_of_more_elements_than_32_bits_count():
    x = torch.empty(2, 16385, 8200, 8, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    few = x[:, :, ::4096, ::4099]
    few.copy_(torch.randn(few.shape))
    out, indices = max_pool_with_indices(x, 1, (4096, 4099))
    assert torch.equal(out, few) and not indices.any()


BAD = {
    "more places than 8 bits": dict(kernel_size=[17, 16]),
    "no stride": dict(stride=[0, 1]),
    "other size": dict(output_size=[9, 9]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    args = dict(kernel_size=[2, 2], stride=[2, 2], padding=[0, 0], dilation=[1, 1], output_size=[4, 4]) | BAD[case]
    with pytest.raises(RuntimeError, match="max_pool_with_indices: "):
        torch.ops.resnet_fast._max_pool_with_indices_cuda(torch.randn(2, 3, 8, 8), *args.values())


def test_bad_indices():
    grad = torch.randn(2, 3, 4, 4)
    for indices in (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 3, dtype=torch.uint8)):
        with pytest.raises(RuntimeError, match="max_pool_backward: "):
            torch.ops.resnet_fast._max_pool_backward_cuda(grad, indices, [2, 2], [2, 2], [0, 0], [1, 1], [8, 8])
