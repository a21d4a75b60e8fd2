"""The Triton kernel of the stem with its max-pooling, through the public operator."""

import pytest
import torch
from checks import assert_accurate, assert_same_special_values, rounded_to_tf32
from test_conv_bn_relu import in_channels_last, in_double, problem

from resnet_fast.kernels import configs, conv_few_channels
from resnet_fast.measure import relative_rms
from resnet_fast.ops import conv_bn_relu_max_pool, conv_bn_relu_max_pool_ref

from .kernels import launches

pytestmark = pytest.mark.usefixtures("triton_backend")

_16_BIT = (torch.bfloat16, torch.float16)
STEM = dict(n=1, kernel=(7, 7), stride=(2, 2), padding=(3, 3))
SMALL = dict(kernel=(3, 3), stride=(2, 2), padding=(1, 1))  # a program's time here goes with its kernel's rows
CASES = {
    "7x7": dict(c=3, k=16, h=14, w=16, **STEM),
    "7x7, odd sides": dict(c=3, k=16, h=13, w=17, **STEM),
    "7x7, one pixel": dict(c=3, k=16, h=1, w=1, **STEM),
    "odd output": dict(c=3, k=16, h=17, w=18, **SMALL),
    "wide": dict(n=1, c=3, k=8, h=3, w=300, **SMALL),
    "high": dict(n=1, c=3, k=8, h=34, w=3, **SMALL),
    "odd filters": dict(c=3, k=17, h=8, w=10, **SMALL),
    "many filters": dict(c=3, k=72, h=8, w=10, **SMALL),
    "1 channel": dict(c=1, k=16, h=8, w=10, **SMALL),
    "2 channels": dict(c=2, k=16, h=8, w=10, **SMALL),
    "4 channels": dict(c=4, k=16, h=8, w=10, **SMALL),
    "stride 1": dict(c=3, k=16, h=7, w=6),
    "5x4, strides 2 and 3": dict(c=3, k=16, h=13, w=16, kernel=(5, 4), stride=(2, 3), padding=(1, 2)),
    "4x4, stride 4": dict(c=3, k=16, h=17, w=18, kernel=(4, 4), stride=(4, 4), padding=(0, 0)),
    "dilation": dict(c=3, k=16, h=9, w=10, dilation=(2, 1), padding=(2, 1)),
    "bias, no affine": dict(c=3, k=16, h=8, w=8, bias=True, affine=False, **SMALL),
}
UNFUSED = {
    "other pooling": (dict(pool_kernel_size=2, pool_stride=2, pool_padding=0), CASES["7x7"]),
    "many channels": ({}, dict(c=8, k=16, h=10, w=10, **STEM)),
    "groups": ({}, dict(c=4, k=16, h=20, w=20, groups=2, **STEM)),
    "dilated columns": ({}, dict(c=3, k=16, h=20, w=20, dilation=(1, 2))),
}


def stem(**how):
    tensors, geometry = problem(**how)
    del tensors["residual"], geometry["relu"]
    return tensors, geometry


def assert_right(tensors, how):
    out = conv_bn_relu_max_pool(**tensors, **how)
    stock = [conv_bn_relu_max_pool_ref(**t, **how) for t in (tensors, in_channels_last(tensors))]
    assert_accurate(out, conv_bn_relu_max_pool_ref(**in_double(tensors), **how), stock)
    assert out.stride() == torch.empty(out.shape, memory_format=torch.channels_last).stride()


@pytest.fixture(params=("descriptors", "pointers"))
def path(request, monkeypatch):
    if request.param == "pointers":
        monkeypatch.setattr(conv_few_channels, "has_descriptors", lambda target: False)


@pytest.fixture(params=("interpreter", "sm_90", "default"))
def table(request, monkeypatch):
    monkeypatch.setitem(configs.STEMS, "interpreter", configs.STEMS[request.param])


def assert_fused(found):
    assert found == {"pad_kernel": 1, "conv_few_channels_max_pool_kernel": 1}


@pytest.mark.parametrize("dtype", _16_BIT)
@pytest.mark.parametrize("case", ("7x7", "7x7, odd sides", "odd output", "bias, no affine"))
def test_cases(case, dtype, path):
    with launches() as found:
        assert_right(*stem(**CASES[case], dtype=dtype))
    assert_fused(found)


@pytest.mark.parametrize("case", ("odd output", "wide", "high", "many filters"))
def test_tiles_of_a_gpu(case, path, table):
    assert_right(*stem(**CASES[case], dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("case", CASES)
def test_integers_bit_for_bit(case, dtype, path, allow_tf32):
    tensors, how = stem(**CASES[case] | dict(bias=True), integers=True, eps=0.0, dtype=dtype)
    with launches() as found:
        out = conv_bn_relu_max_pool(**tensors, **how)
    assert_fused(found)
    assert torch.equal(out, conv_bn_relu_max_pool_ref(**in_double(tensors), **how).to(dtype))


@pytest.mark.parametrize("case", ("7x7, odd sides", "1 channel", "bias, no affine"))
def test_tf32_is_that_of_rounded_operands(case, path, allow_tf32):
    tensors, how = stem(**CASES[case])
    rounded = {**tensors, **{name: rounded_to_tf32(tensors[name]) for name in ("input", "weight")}}
    out = conv_bn_relu_max_pool(**tensors, **how)
    assert relative_rms(out, conv_bn_relu_max_pool_ref(**in_double(rounded), **how)) < 1e-6


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on what is asked for here
@pytest.mark.parametrize("case", ("7x7, odd sides", "1 channel", "stride 1"))
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_nan_and_inf_reach_their_windows_alone(value, case, path):
    tensors, how = stem(**CASES[case], dtype=torch.bfloat16)
    for corner in (0, -1):
        tensors["input"][0, -1, corner, corner] = value
    out, ref = conv_bn_relu_max_pool(**tensors, **how), conv_bn_relu_max_pool_ref(**in_double(tensors), **how)
    assert_same_special_values(out, ref)


@pytest.mark.parametrize("dtype", _16_BIT)
@pytest.mark.parametrize("case", UNFUSED)
def test_everything_else_runs_as_two_kernels(case, dtype):
    pool, layer = UNFUSED[case]
    tensors, how = stem(**layer, dtype=dtype)
    with launches() as found:
        assert_right(tensors, {**how, **pool})
    assert found["max_pool_kernel"] == 1 and found["conv_few_channels_max_pool_kernel"] == 0


def test_full_float32_runs_as_two_kernels():
    with launches() as found:
        assert_right(*stem(**CASES["7x7"]))
    assert found == {"conv_pointers_kernel": 1, "max_pool_kernel": 1}


def test_batch_0():
    tensors, how = stem(**CASES["7x7"] | dict(n=0))
    assert conv_bn_relu_max_pool(**tensors, **how).shape == (0, 16, 4, 4)
