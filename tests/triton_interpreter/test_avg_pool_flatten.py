"""The Triton kernel of avg_pool_flatten, through the public operator.

The error against float64 stays under twice stock torch's own, plus one rounding, though the interpreter adds up the rows
of a tile one after the other, where a GPU adds pairs.
"""

import pytest
import torch
from checks import LAYOUTS, assert_same_special_values
from test_avg_pool_flatten import DTYPES, FORMATS, assert_right

from resnet_fast.kernels import avg_pool_flatten as module
from resnet_fast.kernels import shared
from resnet_fast.ops import avg_pool_flatten, avg_pool_flatten_ref

pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy on the special values that are asked for here
]

# Around a vector of 16 bytes, and around the channels of one program and of two.
CHANNELS = (1, 3, 7, 8, 17, 64, 65, 130)
# Around the 16 to 64 pixels of a tile, and the 16 tiles of a run.
SIZES = ((1, 1), (1, 2), (3, 5), (1, 17), (7, 7), (8, 8), (5, 13), (16, 16), (33, 31))
LAYOUTS = {
    **LAYOUTS,
    "inside a tensor": lambda t: torch.empty(t.numel() + 3, dtype=t.dtype)[3:].view(t.shape).copy_(t),
    "inside a map": lambda t: LAYOUTS["channels_last"](torch.nn.functional.pad(t, (1, 2, 3, 1)))[:, :, 3:-1, 1:-2],
}


@pytest.fixture(params=("few programs", "many programs"))
def programs(request, monkeypatch):
    """Many of them take 32 bytes of a pixel each, few of them 128."""
    monkeypatch.setattr(module, "_ENOUGH_PROGRAMS", {"few programs": 1, "many programs": 2**31}[request.param])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", CHANNELS)
def test_channels(c, dtype, programs):
    assert_right(torch.randn(3, c, 7, 5).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, dtype, programs):
    assert_right(torch.randn(2, 21, *size).to(dtype))
    whole = torch.randint(-9, 10, (1, 21, *size)).to(dtype)
    exact = avg_pool_flatten_ref(whole.double()).float().to(dtype)
    assert torch.equal(avg_pool_flatten(whole), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", (0.0, 1.0))
def test_large_map(mean, dtype):
    assert_right((torch.randn(1, 8, 112, 112) + mean).to(dtype))


@pytest.mark.parametrize("element_size", (2, 4))
def test_one_image_keeps_a_gpu_busy(element_size):
    """ResNet-50's last map; with more images a program takes a cache line."""
    assert 2048 // module._block_c(1, 2048, element_size) >= 128
    assert module._block_c(64, 2048, element_size) * element_size == 128


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, format):
    assert_right(LAYOUTS[layout](torch.randn(2, 20, 7, 9).contiguous(memory_format=format)))


@pytest.mark.parametrize("shape", ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0), (0, 0, 0, 0)))
def test_nothing(shape):
    out, ref = avg_pool_flatten(torch.ones(shape)), avg_pool_flatten_ref(torch.ones(shape))
    assert out.shape == ref.shape and torch.equal(out.isnan(), ref.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype):
    x = torch.randn(2, 37, 7, 7).to(dtype)
    nan, inf = float("nan"), float("inf")
    for i, values in enumerate(((nan,), (inf,), (-inf,), (inf, -inf), (nan, inf), (inf, inf))):
        for channel, at in ((6 * i, 0), (6 * i + 1, 20), (6 * i + 2, 49 - len(values))):
            x[1, channel].view(-1)[at : at + len(values)] = torch.tensor(values).to(dtype)
    out, ref = avg_pool_flatten(x), avg_pool_flatten_ref(x)
    assert ref.isnan().any() and ref.isposinf().any() and ref.isneginf().any()
    assert_same_special_values(out, ref)
    finite = ref.isfinite()
    assert torch.allclose(out[finite].float(), ref[finite].float(), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_that_the_dtype_cannot_hold(dtype):
    largest = torch.finfo(dtype).max if dtype == torch.float16 else 1e36
    x = torch.full((1, 9, 7, 7), largest).to(dtype)
    torch.testing.assert_close(avg_pool_flatten(x), x[..., 0, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ((1, 1), (7, 7), (14, 15)))
def test_64_bit_offsets(size, dtype, monkeypatch):
    monkeypatch.setattr(shared, "MOST_INT32", 0)
    assert_right(torch.randn(3, 65, *size).to(dtype))
