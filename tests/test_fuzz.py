"""Any convolution: shapes, geometries, dtypes and layouts that nobody thought of, always the same ones."""

import math

import torch
import torch.nn.functional as F
from checks import LAYOUTS, UNIT_ROUNDOFF
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from resnet_fast.ops import conv_bn_relu, conv_bn_relu_ref

ops = torch.ops.resnet_fast
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW = settings(
    derandomize=True,
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


def pairs(least, most):
    return st.tuples(st.integers(least, most), st.integers(least, most))


@st.composite
def geometries(draw):
    """(sizes of input [N, C, H, W] and weight [K, C / groups, R, S], arguments of F.conv2d)."""
    n, (h, w), (r, s) = draw(st.integers(0, 3)), draw(pairs(1, 20)), draw(pairs(1, 5))
    c, k = draw(pairs(1, 70))
    how = dict(stride=draw(pairs(1, 3)), padding=draw(pairs(0, 4)), dilation=draw(pairs(1, 3)))
    common = math.gcd(c, k)
    how["groups"] = draw(st.sampled_from([g for g in range(1, 1 + common) if common % g == 0]))
    fits = [
        size + 2 * how["padding"][d] > how["dilation"][d] * (kernel - 1)
        for d, (size, kernel) in enumerate(((h, r), (w, s)))
    ]
    assume(all(fits))
    return (n, c, h, w), (k, c // how["groups"], r, s), how


def integers(*size):
    return torch.randint(-3, 4, size).float()


def rms(t):
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def stock_result(*args, **how):
    """torch's, without oneDNN, which crashes where outputs see padding alone (kernels/packing.py)."""
    with torch.backends.mkldnn.flags(enabled=False):
        return conv_bn_relu_ref(*args, **how)


def rms_of_terms(x, weight, bias, gamma, beta, mean, var, residual, how):
    """Of what is added up to a value of the output, if the signs are random."""
    squares = F.conv2d(x**2, weight**2, None if bias is None else bias**2, **how) + (mean**2).view(-1, 1, 1)
    squares = squares * (gamma**2 / (var + 1e-5)).view(-1, 1, 1) + (beta**2).view(-1, 1, 1)
    return rms((squares if residual is None else squares + residual**2).sqrt())


@FEW
@given(
    geometries(),
    st.sampled_from(DTYPES),
    st.sampled_from(["contiguous", *LAYOUTS]),
    st.sampled_from(["contiguous", *LAYOUTS]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_convolution(geometry, dtype, layout, residual_layout, has_residual, has_bias, relu, seed):
    torch.manual_seed(seed)
    input_size, weight_size, how = geometry
    k = weight_size[0]

    def lay(t, name):
        return t if name == "contiguous" or 0 in t.shape else LAYOUTS[name](t)

    x = lay(torch.randn(input_size).to(dtype), layout)
    weight = (torch.randn(weight_size) / math.prod(weight_size[1:]) ** 0.5).to(dtype)
    bias = torch.randn(k).to(dtype) if has_bias else None
    bn = (torch.rand(k) + 0.5, torch.randn(k), torch.randn(k), torch.rand(k) + 0.5)
    residual = None
    if has_residual:
        shape = F.conv2d(x.to("meta"), weight.to("meta"), **how).shape
        residual = lay(torch.randn(shape).to(dtype), residual_layout)
    with torch.no_grad():
        out = conv_bn_relu(x, weight, bias, *bn, residual, **how, relu=relu)
        stock = stock_result(x, weight, bias, *bn, residual, **how, relu=relu)
        wide = [None if t is None else t.double() for t in (x, weight, bias, *bn, residual)]
        ref = conv_bn_relu_ref(*wide, **how, relu=relu)
    assert out.numel() == 0 or out.is_contiguous(memory_format=torch.channels_last)
    assert out.shape == ref.shape and out.dtype == dtype and torch.isfinite(out).all()
    # As in checks.py, but the roundings are those of the terms: of a few values all may be small, or cut by the ReLU.
    assert rms(out - ref) <= 2 * rms(stock - ref) + 2 * UNIT_ROUNDOFF[dtype] * rms_of_terms(*wide, how)


@FEW
@given(geometries(), st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_gemm_is_exact_on_integers(geometry, dtype, has_residual, relu, seed):
    torch.manual_seed(seed)
    input_size, weight_size, how = geometry
    x, weight, bias = integers(*input_size), integers(*weight_size), integers(weight_size[0])
    ref = F.conv2d(x.double(), weight.double(), bias.double(), **how)
    residual = integers(*ref.shape) if has_residual else None
    ref = ref if residual is None else ref + residual
    ref = ref.relu() if relu else ref
    packed = ops._pack_gemm(weight, how["groups"])
    residual = None if residual is None else residual.to(dtype)
    out = ops._conv_gemm(x.to(dtype), packed, bias, residual, how["stride"], how["padding"], how["dilation"], how["groups"], relu)  # fmt: skip
    assert torch.equal(out, ref.to(dtype))


@FEW
@given(
    st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 20), st.integers(1, 20)),
    st.integers(1, 70),
    pairs(0, 4),
    st.sampled_from((2, 4, 5)),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_winograd_on_integers(input_size, k, padding, tile, dtype, has_residual, relu, seed):
    """F(2,3) is exact, its weights are multiples of a quarter; the others err by what float32 loses in their transforms."""
    assume(input_size[2] + 2 * padding[0] >= 3 and input_size[3] + 2 * padding[1] >= 3)
    torch.manual_seed(seed)
    x, weight, bias = integers(*input_size), integers(k, input_size[1], 3, 3), integers(k)
    ref = F.conv2d(x.double(), weight.double(), bias.double(), padding=padding)
    residual = integers(*ref.shape) if has_residual else None
    ref = ref if residual is None else ref + residual
    ref = ref.relu() if relu else ref
    packed = ops._pack_winograd(weight, tile)
    residual = None if residual is None else residual.to(dtype)
    out, finite = ops._conv_winograd(x.to(dtype), packed, bias, residual, padding, relu)
    assert finite and out.dtype == dtype
    if tile == 2:
        assert torch.equal(out, ref.to(dtype))
        return
    # Sums of 9 C products of at most 9, each with a relative error of some 2^-24 times what the transforms magnify.
    magnitude = F.conv2d(x.abs().double(), weight.abs().double(), padding=padding) + 6
    rounding = 2 * UNIT_ROUNDOFF[dtype] * ref.abs() if dtype != torch.float32 else 0.0
    assert ref.numel() == 0 or ((out.double() - ref).abs() <= 1e-5 * magnitude.amax() + rounding).all()
