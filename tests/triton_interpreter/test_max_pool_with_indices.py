"""The Triton kernels of max-pooling for training, through the public operator: torch's result, its indices and its
gradient, added up in float32, bit for bit."""

from itertools import product

import pytest
import torch
from checks import LAYOUTS, assert_same_special_values
from test_max_pool import DTYPES, GEOMETRIES, STEM

from resnet_fast.kernels import max_pool as module
from resnet_fast.kernels import shared
from resnet_fast.ops import max_pool_with_indices, max_pool_with_indices_ref

from .kernels import launches

pytestmark = [
    pytest.mark.usefixtures("triton_backend", "poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy on the special values that are asked for here
]

# Around a vector of 16 bytes, and around the channels of one program and of two.
CHANNELS = (1, 3, 7, 8, 17, 64, 65, 130)
GEOMETRIES = {
    **{name: how for name, how in GEOMETRIES.items() if name not in ("stem", "nothing but padding")},
    "many pixels": dict(STEM, shape=(2, 17, 15, 16)),
    "more taps than are unrolled": dict(shape=(2, 8, 11, 9), kernel_size=(7, 5), stride=(2, 1), padding=(3, 2)),
    "dilation beyond the stride": dict(shape=(2, 5, 11, 12), kernel_size=3, stride=2, padding=1, dilation=(3, 2)),
    "ceil, unequal": dict(shape=(1, 65, 12, 13), kernel_size=(3, 2), stride=(2, 3), padding=(1, 1), ceil_mode=True),
}
NAN, INF = float("nan"), float("inf")


def assert_equals_torch(x, **how):
    before, x = x.clone(), x.detach().requires_grad_()
    (out, indices), (ref, ref_indices) = (f(x, **how) for f in (max_pool_with_indices, max_pool_with_indices_ref))
    assert out.dtype == x.dtype and out.shape == ref.shape and torch.equal(indices, ref_indices)
    assert torch.equal(out.nan_to_num(), ref.nan_to_num())
    assert_same_special_values(out, ref)
    strides = torch.empty(out.shape, memory_format=torch.channels_last).stride()
    assert out.stride() == indices.stride() == strides
    assert torch.equal(x.nan_to_num(), before.nan_to_num()), "the input was changed"
    grad = torch.randn(out.shape).to(x.dtype)
    wide = x.detach().float().requires_grad_()
    max_pool_with_indices_ref(wide, **how)[0].backward(grad.float())
    (found,) = torch.autograd.grad(out, x, grad)
    assert torch.equal(found, wide.grad.to(x.dtype))


def with_equal_values(*shape):
    """Most windows have their largest value more than once."""
    return torch.randint(-2, 3, shape).float()


def check(case, dtype):
    how = dict(GEOMETRIES[case])
    assert_equals_torch(with_equal_values(*how.pop("shape")).to(dtype), **how)


@pytest.mark.parametrize("c", CHANNELS)
def test_channels(c):
    assert_equals_torch(with_equal_values(2, c, 9, 7).to(DTYPES[CHANNELS.index(c) % 3]), **STEM)


@pytest.mark.parametrize("case", GEOMETRIES)
def test_geometries(case):
    check(case, torch.float32)
    check(case, torch.bfloat16)


def runs(x, *case):
    try:
        max_pool_with_indices_ref(x, *case)
        max_pool_with_indices(x[:0], *case)  # refuses windows of nothing but padding
    except RuntimeError:
        return False
    return True


def test_every_geometry():
    """Also where the last window is cut off."""
    x = with_equal_values(2, 1, 5, 6)
    cases = [case for case in product((2, 3), (1, 3), (0, 1), (1, 2), (False, True)) if runs(x, *case)]
    assert len(cases) > 20
    for size, stride, padding, dilation, ceil_mode in cases:
        how = dict(kernel_size=size, stride=stride, padding=padding, dilation=dilation, ceil_mode=ceil_mode)
        assert_equals_torch(x, **how)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    x = LAYOUTS[layout](with_equal_values(2, 20, 9, 10))
    assert_equals_torch(x, **STEM)
    out, indices = max_pool_with_indices(x, **STEM)
    grad = LAYOUTS[layout](torch.randn(out.shape))
    geometry = ([3, 3], [2, 2], [1, 1], [1, 1], [9, 10])
    pairs = (grad, indices), (grad.contiguous(), indices.contiguous())
    found = [torch.ops.resnet_fast._max_pool_backward(*pair, *geometry) for pair in pairs]
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype):
    """NaN and infinities at every place of a window, and windows of -inf, whose first place inside the map counts."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, -65504.0, 6e-8])
    x = values[torch.randint(len(values), (2, 17, 14, 13))].to(dtype)
    x[:, :, :5] = -INF
    assert_equals_torch(x, **STEM)
    assert_equals_torch(torch.full((1, 3, 6, 6), -INF).to(dtype), kernel_size=3, stride=2, padding=1, dilation=2)


@pytest.mark.parametrize("case", ("unequal", "ceil", "global", "many pixels", "dilation beyond the stride"))
def test_64_bit_offsets(case, monkeypatch):
    monkeypatch.setattr(shared, "MOST_INT32", 0)
    check(case, torch.float32)


@pytest.mark.parametrize("case", ("unequal", "one channel", "many pixels", "ceil, unequal"))
def test_tiles_of_a_gpu(case, monkeypatch):
    monkeypatch.setattr(module, "_INTERPRETER_BLOCK", module._BLOCK)
    check(case, torch.bfloat16)


def test_one_launch_each_way():
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    with launches() as found:
        max_pool_with_indices(x, **STEM)[0].sum().backward()
    assert found == dict(max_pool_kernel=1, max_pool_backward_kernel=1)
