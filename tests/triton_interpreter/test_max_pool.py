"""The Triton kernel of max_pool, through the public operator: torch's result, bit for bit."""

from itertools import product

import pytest
import torch
from checks import LAYOUTS
from test_max_pool import DTYPES, GEOMETRIES, STEM, assert_equals_torch

from resnet_fast.kernels import max_pool as module
from resnet_fast.kernels import shared
from resnet_fast.ops import max_pool, max_pool_ref

pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy on the special values that are asked for here
]

# Around a vector of 16 bytes, and around the channels of one program and of two.
CHANNELS = (1, 3, 7, 8, 17, 64, 65, 130)
MANY = {
    "many pixels": dict(STEM, shape=(3, 17, 21, 23)),
    "more taps than are unrolled": dict(shape=(3, 8, 11, 9), kernel_size=(7, 5), stride=(2, 1), padding=(3, 2)),
    "ceil, unequal": dict(shape=(1, 65, 12, 13), kernel_size=(3, 2), stride=(2, 3), padding=(1, 1), ceil_mode=True),
}
GEOMETRIES = {**GEOMETRIES, **MANY}
LAYOUTS = {
    **LAYOUTS,
    "inside a tensor": lambda t: torch.empty(t.numel() + 3, dtype=t.dtype)[3:].view(t.shape).copy_(t),
    "inside a map": lambda t: LAYOUTS["channels_last"](torch.nn.functional.pad(t, (1, 2, 3, 1)))[:, :, 3:-1, 1:-2],
}


def check(case, dtype):
    how = dict(GEOMETRIES[case])
    assert_equals_torch(torch.randn(how.pop("shape")).to(dtype), **how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", CHANNELS)
def test_channels(c, dtype):
    assert_equals_torch(torch.randn(2, c, 9, 7).to(dtype), **STEM)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GEOMETRIES)
def test_geometries(case, dtype):
    check(case, dtype)


def fits(x, *case):
    try:
        return max_pool_ref(x, *case) is not None
    except RuntimeError:
        return False


@pytest.mark.parametrize("size", (2, 5))
def test_every_geometry(size):
    """Also where the last window is cut off, and where a window meets nothing but padding."""
    x = torch.randn(2, 3, size, size + 1)
    cases = [case for case in product((1, 2, 3), (1, 3), (0, 1), (1, 5), (False, True)) if fits(x, *case)]
    assert len(cases) > 15
    for case in cases:
        assert torch.equal(max_pool(x, *case), max_pool_ref(x, *case)), case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, dtype):
    assert_equals_torch(LAYOUTS[layout](torch.randn(2, 20, 9, 10).to(dtype)), **STEM)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", (3, 64))
def test_special_values(c, dtype):
    """NaN and infinities at every place of a window, and windows of -inf."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), -65504.0, 6e-8])
    x = values[torch.randint(len(values), (2, c, 24, 23))].to(dtype)
    x[:, :, :5] = float("-inf")
    assert_equals_torch(x, **STEM)
    few = torch.randn(2, c, 24, 23).to(dtype)
    for value in (float("nan"), float("inf")):
        few.view(-1)[torch.randint(few.numel(), (few.numel() // 40,))] = value
    assert_equals_torch(few, **STEM)


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_zeros_the_first_wins(dtype):
    x = torch.zeros(2, 17, 8, 8).where(torch.rand(2, 17, 8, 8) < 0.5, -0.0).to(dtype)
    out, ref = max_pool(x, 3, 2, 1), max_pool_ref(x, 3, 2, 1)
    assert ref.signbit().any() and not ref.signbit().all()
    assert torch.equal(out.signbit(), ref.signbit())


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_every_16_bit_value(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[torch.randperm(2**16)]
    assert_equals_torch(x.view(4, 64, 16, 16), kernel_size=1)
    assert_equals_torch(x.view(4, 64, 16, 16), **STEM)


@pytest.mark.parametrize("case", ("unequal", "ceil", "nothing but padding", "global", *MANY))
def test_64_bit_offsets(case, monkeypatch):
    monkeypatch.setattr(shared, "MOST_INT32", 0)
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("case", ("unequal", "ceil", "one channel", *MANY))
def test_tiles_of_a_gpu(case, dtype, monkeypatch):
    monkeypatch.setattr(module, "_INTERPRETER_BLOCK", module._BLOCK)
    check(case, dtype)
