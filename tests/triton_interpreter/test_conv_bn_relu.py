"""The Triton kernel of conv_bn_relu, through the public operator.

The problems and the rule of what is right are those of the CPU's tests: the error against float64 stays under twice
stock torch's own, plus one rounding.
"""

import pytest
import torch
from checks import UNIT_ROUNDOFF, assert_same_special_values, rounded_to_tf32
from test_conv_bn_relu import CHANNELS, DTYPES, GEOMETRIES, TAILS, VECTORS, assert_right, in_double, problem

from resnet_fast.kernels import configs, shared
from resnet_fast.measure import relative_rms
from resnet_fast.ops import conv_bn_relu, conv_bn_relu_ref

pytestmark = pytest.mark.usefixtures("triton_backend")

# As many channels as a step is deep, and more: then a step keeps to one tap. More rows and filters than a tile has.
DEEP = {
    "64 channels": dict(c=64, k=8, h=5, w=4),
    "65 channels": dict(c=65, k=8, h=5, w=4),
    "72 channels": dict(c=72, k=17, h=5, w=4, stride=(2, 1), dilation=(1, 2), padding=(2, 1)),
    "128 channels 1x1": dict(c=128, k=140, h=5, w=4, kernel=(1, 1), padding=(0, 0)),
    "many rows": dict(n=3, c=5, k=16, h=13, w=15),
    "many filters": dict(c=8, k=130),
    "deep groups": dict(c=130, k=6, groups=2, h=4, w=4),
    "wide groups": dict(c=4, k=262, groups=2, h=4, w=4),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", (1, 8, 17))
@pytest.mark.parametrize("c", CHANNELS)
def test_channels(c, k, dtype):
    assert_right(*problem(c=c, k=k, h=5, residual=True, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", {**GEOMETRIES, **DEEP})
def test_geometries(geometry, dtype):
    assert_right(*problem(**{**GEOMETRIES, **DEEP}[geometry], residual=True, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", TAILS)
def test_tails(tail, dtype):
    assert_right(*problem(**TAILS[tail], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", {**GEOMETRIES, **DEEP})
def test_integers_bit_for_bit(geometry, dtype):
    """Every product, sum and scale is exact in float32, so the one rounding at the end is all there is."""
    geometry = {**GEOMETRIES, **DEEP}[geometry]
    tensors, how = problem(**geometry, bias=True, residual=True, integers=True, eps=0.0, dtype=dtype)
    ref = conv_bn_relu_ref(**in_double(tensors), **how)
    assert torch.equal(conv_bn_relu(**tensors, **how), ref.to(dtype))


@pytest.mark.parametrize("geometry", ("7x7 stem", "unequal", "odd groups", "72 channels", "many rows"))
def test_64_bit_offsets(geometry, monkeypatch):
    monkeypatch.setattr(shared, "MOST_INT32", 0)
    assert_right(*problem(**{**GEOMETRIES, **DEEP}[geometry], residual=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("geometry", ("7x7 stem", "unequal", "odd groups", "72 channels", "many rows", "many filters"))
def test_tiles_of_a_gpu(geometry, dtype, monkeypatch):
    monkeypatch.setitem(configs.CONFIGS, "interpreter", configs.CONFIGS["default"])
    assert_right(*problem(**{**GEOMETRIES, **DEEP}[geometry], residual=True, dtype=dtype))


def test_batch_0():
    tensors, how = problem(n=0, residual=True, c=3, k=5)
    assert conv_bn_relu(**tensors, **how).shape == (0, 5, 9, 7)


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": lambda t: torch.empty(t.shape[0], 2 * t.shape[1], *t.shape[2:], dtype=t.dtype)[:, ::2].copy_(t),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda t: t[:, :, :1].expand_as(t),
    "inside a tensor": lambda t: torch.empty(t.numel() + 3, dtype=t.dtype)[3:].view(t.shape).copy_(t),
}


@pytest.mark.parametrize("c", (6, 64))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_input_weight_and_residual(layout, c):
    tensors, how = problem(c=c, k=6, h=5, w=5, residual=True)
    for name in ("input", "weight", "residual"):
        assert_right({**tensors, name: LAYOUTS[layout](tensors[name])}, how)


def test_strided_vectors():
    tensors, how = problem(bias=True)
    for name in VECTORS:
        wide = torch.randn(32).abs() + 0.5
        assert_right({**tensors, name: wide[::2]}, how)


@pytest.mark.parametrize("bn_dtype", (*DTYPES, torch.float64))
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_norm_of_another_dtype(dtype, bn_dtype):
    tensors, how = problem(dtype=dtype, eps=0.25)
    for name in VECTORS[1:]:
        tensors[name] = tensors[name].to(bn_dtype)
    out = conv_bn_relu(**tensors, **how)
    # The same values in float32: float64 statistics are rounded to it, which is far below either error.
    ref = conv_bn_relu(**{n: t if t is None or n not in VECTORS[1:] else t.float() for n, t in tensors.items()}, **how)
    assert out.dtype == dtype and torch.equal(out, ref)


def test_weight_changed_in_place_is_seen():
    tensors, how = problem()
    conv_bn_relu(**tensors, **how)
    tensors["weight"].data.mul_(-1)
    tensors["running_var"].data.add_(1)
    assert_right(tensors, how)


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_may_be_the_input(dtype):
    tensors, how = problem(c=8, k=8, dtype=dtype)
    assert_right({**tensors, "residual": tensors["input"]}, how)


def textbook(tensors, how):
    """The formula of the BatchNorm paper, which the kernel follows. torch's CPU code computes x * scale + (shift - mean *
    scale) instead: the same but for an infinite scale, which makes it NaN."""
    t = {name: None if v is None else v.float() for name, v in tensors.items()}
    mean, var, gamma, beta = (
        t[name].view(-1, 1, 1) for name in ("running_mean", "running_var", "bn_weight", "bn_bias")
    )
    pairs = (how[name] for name in ("stride", "padding", "dilation"))
    out = torch.nn.functional.conv2d(t["input"], t["weight"], t["bias"], *pairs, how["groups"])
    out = (out - mean) * (gamma / (var + how["eps"]).sqrt()) + beta + t["residual"]
    return torch.relu(out) if how["relu"] else out


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on what is asked for here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", (True, False))
@pytest.mark.parametrize("where", ("input", "weight", "residual", *VECTORS))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_nan_and_inf(value, where, relu, dtype):
    # No padding around an infinite weight: its product with a zero there is NaN to a GEMM, and skipped by others.
    padding = (0, 0) if where == "weight" else (1, 1)
    tensors, how = problem(c=3, k=5, h=5, w=5, padding=padding, bias=True, residual=True, relu=relu, dtype=dtype)
    tensors[where].view(-1)[tensors[where].numel() // 2] = value
    out, ref = conv_bn_relu(**tensors, **how), conv_bn_relu_ref(**tensors, **how)
    if where == "bn_weight":
        ref = textbook(tensors, how)
    assert_same_special_values(out, ref)
    if not relu and where != "running_var":  # an infinite variance makes a scale of 0
        assert not ref.isfinite().all(), "the value did not reach the output"
    finite = ref.isfinite()
    assert torch.allclose(out[finite].float(), ref[finite].float(), rtol=8 * UNIT_ROUNDOFF[dtype], atol=0.1)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("kernel", (1, 3, 5, 7))
@pytest.mark.parametrize("c", (1, 2, 3, 4))
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_nan_and_inf_beside_the_window_stay_there(value, c, kernel, dtype):
    """The kernel for few channels reads more columns than the window has."""
    tensors, how = problem(n=1, c=c, k=5, h=7, w=33, kernel=(kernel, kernel), stride=(2, 2), relu=False, dtype=dtype)
    for column in (0, 11, 20, 32):
        tensors["input"][0, c - 1, 3, column] = value
        # In float64: on a CPU with AVX-512 BF16 torch's own bfloat16 lets such a NaN out where c is odd.
        assert_same_special_values(conv_bn_relu(**tensors, **how), conv_bn_relu_ref(**in_double(tensors), **how))
        tensors["input"][0, c - 1, 3, column] = 1.0


@pytest.mark.parametrize("geometry", ("1x1", "7x7 stem", "groups", "72 channels"))
def test_tf32_rounds_its_operands(geometry, monkeypatch):
    """To the nearest, so that the error is that of the rounded operands and no more."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    tensors, how = problem(**{**GEOMETRIES, **DEEP}[geometry], residual=True)
    tf32 = {**tensors, **{name: rounded_to_tf32(tensors[name]) for name in ("input", "weight")}}
    out, ref = conv_bn_relu(**tensors, **how), conv_bn_relu_ref(**in_double(tf32), **how)
    assert relative_rms(out, ref) < 1e-6 < relative_rms(out, conv_bn_relu_ref(**in_double(tensors), **how))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("where", ("input", "weight"))
@pytest.mark.parametrize("bits", (0x7FFFFFFF, 0x7F800001, -1, 0x7F800000), ids=hex)  # NaN of every kind, infinity
def test_tf32_keeps_nan_and_inf(bits, where, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    tensors, how = problem(c=3, k=5, h=5, w=5, padding=(0, 0), relu=False)
    tensors[where].view(-1).view(torch.int32)[tensors[where].numel() // 2] = bits
    assert_same_special_values(conv_bn_relu(**tensors, **how), conv_bn_relu_ref(**tensors, **how))


def test_tf32_follows_torch():
    """By the older switch and the newer one; after the newer one is set, reading the older may raise."""
    cudnn = torch.backends.cudnn
    cudnn.allow_tf32 = True
    assert cudnn.allow_tf32 and shared.tf32_allowed()
    try:
        cudnn.allow_tf32 = False
        assert not shared.tf32_allowed()
        cudnn.allow_tf32 = True
        assert shared.tf32_allowed()
        if hasattr(cudnn, "conv"):
            cudnn.conv.fp32_precision = "ieee"
            assert not shared.tf32_allowed()
            cudnn.conv.fp32_precision = "tf32"
            assert shared.tf32_allowed()
    finally:
        cudnn.allow_tf32 = True
