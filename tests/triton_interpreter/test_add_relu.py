"""The Triton kernel of add_relu, through the public operator."""

import pytest
import torch
from checks import assert_same_special_values

from resnet_fast.kernels import add_relu as module
from resnet_fast.ops import add_relu, add_relu_ref

pytestmark = pytest.mark.usefixtures("triton_backend")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = module._BLOCK


def assert_right(a, b):
    before = a.clone(), b.clone()
    out = add_relu(a, b)
    # One addition and one rounding: nothing may differ from torch, in any dtype.
    assert torch.equal(out, add_relu_ref(a, b))
    assert out.dtype == a.dtype and out.stride() == torch.empty_like(a).stride()
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 7, 16, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_equals_torch_bit_for_bit(n, dtype):
    assert_right(torch.randn(n).to(dtype), torch.randn(n).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_that_begin_inside_a_tensor(dtype):
    a, b = torch.randn(2, 2000).to(dtype).unbind()
    assert_right(a[1:1500], b[3:1502])


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: torch.empty(t.shape[0], 2 * t.shape[1], *t.shape[2:])[:, ::2].copy_(t),
    "expanded": lambda t: t[:, :1].expand_as(t),
}


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_any_strides(first, second):
    a, b = torch.randn(2, 2, 5, 3, 7).unbind()
    assert_right(LAYOUTS[first](a), LAYOUTS[second](b))


def test_strides_of_dimensions_of_size_1_do_not_matter():
    a, b = torch.randn(2, 5, 1, 3).unbind()
    b = b.as_strided(b.shape, (3, 99, 1))
    assert module._in_layout_of(torch.empty_like(a), b) is b, "copied for nothing"
    assert_right(a, b)


def test_the_same_tensor_twice():
    a = torch.randn(3, 17)
    assert_right(a, a)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on overflows, which are asked for here
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_every_16_bit_value(dtype):
    a = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    b = a[torch.randperm(len(a))]
    out, ref = add_relu(a, b), add_relu_ref(a, b)
    assert_same_special_values(out, ref)
    assert torch.equal(out.nan_to_num(), ref.nan_to_num())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on overflows, which are asked for here
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype):
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 65504.0, 6e-8, 3e38])
    a, b = (t.to(dtype).flatten() for t in torch.meshgrid(values, values, indexing="ij"))
    # In a whole block, which goes without masks, and in a tail.
    for repeats in (1, 2 + BLOCK // len(a)):
        x, y = a.repeat(repeats), b.repeat(repeats)
        assert_same_special_values(add_relu(x, y), add_relu_ref(x, y))
        assert torch.equal(add_relu(x, y).nan_to_num(), add_relu_ref(x, y).nan_to_num())
