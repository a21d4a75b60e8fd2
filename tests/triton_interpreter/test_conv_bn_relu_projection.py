"""The Triton kernels of conv_bn_relu_projection, through the public operator."""

import pytest
import torch
from checks import assert_accurate, assert_same_special_values, rounded_to_tf32
from test_conv_bn_relu import DTYPES, in_channels_last, in_double
from test_conv_bn_relu_projection import CASES, ONE_BY_ONE, block

from resnet_fast.kernels import conv_tma
from resnet_fast.measure import relative_rms
from resnet_fast.ops import conv_bn_relu_projection, conv_bn_relu_projection_ref

from .kernels import launches

pytestmark = pytest.mark.usefixtures("triton_backend")

_16_BIT = (torch.bfloat16, torch.float16)
HALVED = dict(h=18, w=14)
# What the kernel with descriptors takes: of the block's last convolution and of the shortcut.
BLOCKS = {
    "bottleneck": dict(k=128, main=dict(c=32, **ONE_BY_ONE), shortcut=dict(c=64, **HALVED)),
    "bottleneck, odd sides": dict(k=72, main=dict(c=32, **ONE_BY_ONE), shortcut=dict(c=48)),
    "bottleneck, first stage": dict(k=64, main=dict(c=16, **ONE_BY_ONE), shortcut=dict(c=32, h=9, w=7, stride=(1, 1))),
    "basic block": dict(k=32, main=dict(c=32), shortcut=dict(c=16, **HALVED)),
    "basic block, one image": dict(n=1, k=136, main=dict(c=16), shortcut=dict(c=64, **HALVED)),
    "basic block, first stage": dict(k=16, main=dict(c=16), shortcut=dict(c=16, h=9, w=7, stride=(1, 1))),
    "stride in the last": dict(k=16, main=dict(c=16, h=18, w=14, stride=(2, 2)), shortcut=dict(c=16, **HALVED)),
    "without BatchNorm": dict(k=24, main=dict(c=32), shortcut=dict(c=16), batch_norm=False),
    "without BatchNorm, bias": dict(k=24, main=dict(c=32), shortcut=dict(c=16), batch_norm=False, bias=True),
    "no affine": dict(k=24, main=dict(c=32), shortcut=dict(c=16), affine=False, bias=True),
}


def assert_right(tensors, how):
    before = {name: None if t is None else t.clone() for name, t in tensors.items()}
    out = conv_bn_relu_projection(**tensors, **how)
    stock = [conv_bn_relu_projection_ref(**t, **how) for t in (tensors, in_channels_last(tensors))]
    assert_accurate(out, conv_bn_relu_projection_ref(**in_double(tensors), **how), stock)
    assert out.stride() == torch.empty(out.shape, memory_format=torch.channels_last).stride()
    assert all(t is None or torch.equal(t, before[name]) for name, t in tensors.items()), "an input was changed"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_any_shape(case, dtype):
    assert_right(*block(**CASES[case], dtype=dtype))


@pytest.mark.parametrize("dtype", _16_BIT)
@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_by_descriptors(case, dtype, table):
    with launches() as found:
        assert_right(*block(**BLOCKS[case], dtype=dtype))
    assert found == {"conv_tma_kernel": 1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_by_pointers(case, dtype, monkeypatch):
    monkeypatch.setattr(conv_tma, "takes", lambda *arguments: False)
    with launches() as found:
        assert_right(*block(**BLOCKS[case], dtype=dtype))
    assert found == {"conv_projection_pointers_kernel": 1}


@pytest.mark.parametrize("path", ("descriptors", "pointers"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BLOCKS)
def test_integers_bit_for_bit(case, dtype, path, monkeypatch, allow_tf32):
    if path == "pointers":
        monkeypatch.setattr(conv_tma, "takes", lambda *arguments: False)
    arguments = BLOCKS[case] | dict(integers=True, eps=0.0, dtype=dtype)
    tensors, how = block(**arguments)
    out = conv_bn_relu_projection(**tensors, **how)
    assert torch.equal(out, conv_bn_relu_projection_ref(**in_double(tensors), **how).to(dtype))


@pytest.mark.parametrize("case", BLOCKS)
def test_tf32_is_that_of_rounded_operands(case, table, allow_tf32):
    tensors, how = block(**BLOCKS[case])
    with launches() as found:
        out = conv_bn_relu_projection(**tensors, **how)
    assert found == {"conv_tma_kernel": 1}
    names = ("input", "weight", "shortcut", "shortcut_weight")
    rounded = {**tensors, **{name: rounded_to_tf32(tensors[name]) for name in names}}
    assert relative_rms(out, conv_bn_relu_projection_ref(**in_double(rounded), **how)) < 1e-6


@pytest.mark.parametrize("path", ("descriptors", "pointers"))
@pytest.mark.parametrize("zero", (("bn_weight",), ("shortcut_bn_weight",), ("bn_weight", "shortcut_bn_weight")))
def test_gamma_of_zero(zero, path, monkeypatch):
    """A branch that training has switched off, or not yet on (zero_init_residual)."""
    if path == "pointers":
        monkeypatch.setattr(conv_tma, "takes", lambda *arguments: False)
    tensors, how = block(**BLOCKS["bottleneck"], dtype=torch.bfloat16)
    for name in zero:
        tensors[name] = torch.zeros_like(tensors[name])
    assert_right(tensors, how)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on what is asked for here
@pytest.mark.parametrize("path", ("descriptors", "pointers"))
@pytest.mark.parametrize("where", ("input", "weight", "shortcut", "shortcut_weight", "bn_bias", "shortcut_bn_bias"))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_nan_and_inf(value, where, path, monkeypatch):
    if path == "pointers":
        monkeypatch.setattr(conv_tma, "takes", lambda *arguments: False)
    tensors, how = block(**BLOCKS["bottleneck"], dtype=torch.bfloat16)
    tensors[where].view(-1)[tensors[where].numel() // 2] = value
    out, ref = (f(**tensors, **how) for f in (conv_bn_relu_projection, conv_bn_relu_projection_ref))
    assert_same_special_values(out, ref)


def test_64_bit_offsets(monkeypatch):
    from resnet_fast.kernels import shared

    monkeypatch.setattr(shared, "MOST_INT32", 0)
    with launches() as found:
        assert_right(*block(**BLOCKS["basic block"]))
    assert found == {"conv_projection_pointers_kernel": 1}


def test_batch_0():
    tensors, how = block(n=0, **{k: v for k, v in BLOCKS["basic block"].items() if k != "n"})
    assert conv_bn_relu_projection(**tensors, **how).shape == (0, 32, 9, 7)
