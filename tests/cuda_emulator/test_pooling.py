"""add_relu, max_pool and avg_pool_flatten in CUDA C++, through the public operators."""

import math

import pytest
import test_avg_pool_flatten
import test_max_pool
import torch
from checks import LAYOUTS, assert_same_special_values

from resnet_fast.ops import add_relu, add_relu_ref, avg_pool_flatten, avg_pool_flatten_ref, max_pool, max_pool_ref

from . import emulated

pytestmark = pytest.mark.usefixtures("cuda_backend")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Around words of 2, 4, 8 and 16 bytes of either width, and around the 32 words of a block of avg_pool_flatten.
CHANNELS = (1, 2, 3, 4, 6, 7, 8, 17, 64, 65, 130, 264)
BLOCK = 256 * 2 * 8  # elements of 16 bits that a block of add_relu takes in a step


def assert_added(a, b):
    """One addition and one rounding: nothing may differ from torch, in any dtype."""
    before = a.clone(), b.clone()
    out = add_relu(a, b)
    assert torch.equal(out, add_relu_ref(a, b)) and out.stride() == torch.empty_like(a).stride()
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", (0, 1, 7, 8, 16, 1030, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5))
def test_add_relu_sizes(n, dtype):
    with emulated.launches() as found:
        assert_added(torch.randn(n).to(dtype), torch.randn(n).to(dtype))
    assert found.total() == (n > 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("starts", ((1, 3), (2, 4), (4, 4), (8, 8)))
def test_add_relu_of_views_inside_a_tensor(starts, dtype):
    a, b = torch.randn(2, 2000).to(dtype).unbind()
    assert_added(a[starts[0] : 1500 + starts[0]], b[starts[1] : 1500 + starts[1]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_relu_special_values(dtype):
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 65504.0, 6e-8, 3e38])
    a, b = (t.to(dtype).flatten() for t in torch.meshgrid(values, values, indexing="ij"))
    assert_same_special_values(add_relu(a, b), add_relu_ref(a, b))
    assert torch.equal(add_relu(a, b).nan_to_num(), add_relu_ref(a, b).nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", CHANNELS)
def test_max_pool_channels(c, dtype):
    with emulated.launches() as found:
        test_max_pool.assert_equals_torch(torch.randn(2, c, 9, 7).to(dtype), **test_max_pool.STEM)
    assert found == {"max_pool_kernel": 1}


GEOMETRIES = {name: how for name, how in test_max_pool.GEOMETRIES.items() if math.prod(how["shape"]) < 2**16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GEOMETRIES)
def test_max_pool_geometries(case, dtype):
    how = dict(GEOMETRIES[case])
    test_max_pool.assert_equals_torch(torch.randn(how.pop("shape")).to(dtype), **how)


def test_max_pool_of_windows_that_meet_padding_alone():
    x = torch.randn(2, 3, 2, 3)
    for case in ((2, 1, 1, 5, False), (3, 1, 1, 5, True)):
        try:
            ref = max_pool_ref(x, *case)
        except RuntimeError:
            continue
        assert torch.equal(max_pool(x, *case), ref)


def test_max_pool_of_more_elements_than_32_bits_count():
    x = torch.empty(2, 16385, 8200, 8, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    few = x[:, :, ::4096, ::4099]
    few.copy_(torch.randn(few.shape))
    assert torch.equal(max_pool(x, 1, (4096, 4099)), few)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_max_pool_any_strides(layout):
    test_max_pool.assert_equals_torch(LAYOUTS[layout](torch.randn(2, 6, 8, 8)), **test_max_pool.STEM)


@pytest.mark.parametrize("dtype", DTYPES)
def test_max_pool_special_values(dtype):
    x = torch.randn(2, 16, 9, 9).to(dtype)
    x.view(-1)[torch.randperm(x.numel())[:300]] = torch.tensor([math.nan, math.inf, -math.inf]).to(dtype).repeat(100)
    x[0, 3] = -math.inf
    x[1, :, 4] = math.nan
    test_max_pool.assert_equals_torch(x, **test_max_pool.STEM)
    zeros = torch.tensor([0.0, -0.0]).to(dtype)[torch.randint(0, 2, (2, 8, 9, 9))]
    bits = max_pool(zeros, 3, 2, 1), max_pool_ref(zeros, 3, 2, 1)
    assert torch.equal(*(t.signbit() for t in bits)), "of equal values the first one"


def assert_averaged(x):
    test_avg_pool_flatten.assert_right(x)
    whole = torch.randint(-9, 10, x.shape).to(x.dtype)
    assert torch.equal(avg_pool_flatten(whole), avg_pool_flatten_ref(whole.double()).float().to(x.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", CHANNELS)
def test_avg_pool_channels(c, dtype):
    with emulated.launches() as found:
        assert_averaged(torch.randn(3, c, 7, 5).to(dtype))
    assert found == {"avg_pool_flatten_kernel": 2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ((1, 1), (1, 2), (7, 7), (4, 8), (3, 11), (5, 13), (16, 17)))
def test_avg_pool_sizes(size, dtype):
    assert_averaged(torch.randn(2, 24, *size).to(dtype))


@pytest.mark.usefixtures("order")
def test_avg_pool_in_any_order():
    x = torch.randn(3, 72, 7, 7).to(torch.bfloat16)
    out = avg_pool_flatten(x)
    emulated.configure()
    assert torch.equal(out, avg_pool_flatten(x)), "sums must not depend on the order of threads"


@pytest.mark.parametrize("dtype", DTYPES)
def test_avg_pool_special_values_and_nothing(dtype):
    x = torch.randn(4, 9, 5, 5).to(dtype)
    x[0, 1, 2, 3] = x[1, 8, 0, 0] = math.nan
    x[2, 4, 4, 4], x[3, 0, 0, 0], x[3, 0, 0, 1] = math.inf, math.inf, -math.inf
    assert_same_special_values(avg_pool_flatten(x), avg_pool_flatten_ref(x))
    assert avg_pool_flatten(torch.empty(2, 3, 0, 4).to(dtype)).isnan().all()
    assert avg_pool_flatten(torch.empty(0, 3, 2, 4).to(dtype)).shape == (0, 3)
