"""The CPU's convolution kernels one by one: every kernel at every instruction-set level and edge of its blocking."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checks import (
    LAYOUTS,
    OTHER_LEVELS,
    UNIT_ROUNDOFF,
    assert_accurate,
    assert_passes_at_level,
    assert_same_special_values,
)
from winograd import LARGEST_ERROR, winograd, winograd_stem

from resnet_fast.backends import CPU_LEVELS, cpu_level
from resnet_fast.bench import layers
from resnet_fast.kernels.packing import pack_few_channels
from resnet_fast.measure import relative_rms

ops = torch.ops.resnet_fast
TILES = (2, 4, 5)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensors(n=2, c=8, k=16, h=9, w=7, kernel=(3, 3), groups=1, integers=False):
    """input, weight, bias"""

    def values(*shape):
        return torch.randint(-3, 4, shape).float() if integers else torch.randn(shape)

    weight = values(k, c // groups, *kernel)
    return values(n, c, h, w), weight if integers else weight / weight[0].numel() ** 0.5, values(k)


def reference(x, weight, bias, residual=None, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, relu=True):
    out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    out = out if residual is None else out + residual
    return out.relu() if relu else out


def gemm(x, weight, bias, residual=None, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, relu=True):
    packed = ops._pack_gemm(weight, groups)
    return ops._conv_gemm(x, packed, bias, residual, stride, padding, dilation, groups, relu)


def grouped(x, weight, bias, residual=None, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, relu=True):
    packed = ops._pack_grouped(weight, groups)
    return ops._conv_grouped(x, packed, bias, residual, stride, padding, dilation, groups, relu)


def depthwise(x, weight, bias, residual=None, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, relu=True):
    assert len(weight) == groups
    packed = weight.squeeze(1).permute(1, 2, 0).contiguous()
    return ops._conv_depthwise(x, packed, bias, residual, stride, padding, dilation, relu)


def fast(x, weight, bias, tile, residual=None, padding=(1, 1), relu=True):
    return ops._conv_winograd(x, ops._pack_winograd(weight, tile), bias, residual, padding, relu)


def to(dtype, *args):
    return [None if t is None else t.to(dtype) for t in args]


def double(*args):
    return to(torch.float64, *args)


# Channels around the vectors of 4, 8 and 16 floats; filters around the panels of 8, 16 and 64; pixels around tiles of 6
# rows; depths around the chunks of 256.
GEMM = {
    "plain": dict(),
    "one of everything": dict(n=1, c=1, k=1, h=1, w=1),
    "one channel": dict(c=1, k=5),
    "7 filters": dict(k=7),
    "9 filters": dict(k=9, c=3),
    "15 filters": dict(k=15),
    "17 filters": dict(k=17, c=17),
    "33 filters": dict(k=33),
    "63 filters": dict(k=63, c=5),
    "65 filters": dict(k=65),
    "130 filters": dict(k=130),
    "many pixels": dict(n=1, c=4, k=24, h=33, w=31),
    "1x1": dict(kernel=(1, 1), padding=(0, 0), c=24, k=40),
    "1x1 stride 2": dict(kernel=(1, 1), padding=(0, 0), stride=(2, 2)),
    "1x1 padded": dict(kernel=(1, 1), padding=(2, 1)),
    "1x1 deep": dict(kernel=(1, 1), padding=(0, 0), c=515, k=20, h=5, w=5),
    "3x3 deep": dict(c=257, k=20, h=5, w=5),
    "3x3 stride 2": dict(stride=(2, 2), h=12, w=13),
    "5x5": dict(kernel=(5, 5), padding=(2, 2)),
    "7x7 stride 2": dict(kernel=(7, 7), padding=(3, 3), stride=(2, 2), h=20, w=22),
    "2x4": dict(kernel=(2, 4), padding=(0, 2)),
    "dilated": dict(dilation=(2, 3), padding=(2, 3)),
    "padding only": dict(h=1, w=1, padding=(4, 4)),
    "unequal": dict(stride=(2, 1), padding=(0, 2), dilation=(1, 3), h=12, w=15),
    "2 groups": dict(groups=2, c=34, k=36),
    "groups of 3 and 5": dict(groups=4, c=12, k=20),
    "depthwise": dict(groups=8, k=8),
    "depthwise multiplier": dict(groups=8, k=24),
}


def split(case):
    """(arguments of `tensors`, geometry)"""
    geometry = {n: case[n] for n in ("stride", "padding", "dilation", "groups") if n in case}
    return {n: v for n, v in case.items() if n not in geometry or n == "groups"}, geometry


def check_direct(convolution, case, integers, dtype):
    """With and without ReLU and residual: integers are exact, the rest is as accurate as torch."""
    sizes, geometry = split(case)
    x, weight, bias = (t.to(dtype).float() for t in tensors(**sizes, integers=integers))
    for relu in (True, False):
        for residual in (None, torch.randint(-9, 9, reference(x, weight, bias, **geometry).shape).float()):
            how = dict(**geometry, relu=relu)
            out = convolution(x.to(dtype), weight, bias, *to(dtype, residual), **how)
            exact = reference(*double(x, weight, bias, residual), **how)
            if integers or not exact.any():
                assert torch.equal(out, exact.to(dtype))
            else:
                assert_accurate(out, exact, [reference(*to(dtype, x, weight, bias, residual), **how)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("integers", (False, True))
@pytest.mark.parametrize("case", GEMM)
def test_kernels_gemm(case, integers, dtype):
    check_direct(gemm, GEMM[case], integers, dtype)


# Channels of a group around halves and multiples of the vectors of 4, 8 and 16 floats, groups that fill no vector and
# no pair of them; rows of pixels around tiles of 4, 7 and 8.
GROUPED = {f"5 groups of {d}": dict(groups=5, c=5 * d, k=5 * d) for d in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17)}
GROUPED |= {f"3 groups of {d}": dict(groups=3, c=3 * d, k=3 * d, h=5) for d in (24, 32, 40, 64)}
GROUPED |= {f"rows of {w}": dict(groups=9, c=36, k=36, h=3, w=w) for w in (1, 2, 3, 5, 6, 8, 9, 13, 14, 15, 16, 20, 33)}
GROUPED |= {
    f"stride 2, rows of {w}": dict(groups=4, k=32, c=32, stride=(2, 2), w=w) for w in (1, 2, 12, 13, 14, 28, 33)
}
GROUPED |= {
    "32 groups of 4": dict(groups=32, c=128, k=128),
    "more filters": dict(groups=4, c=12, k=20),
    "fewer filters": dict(groups=4, c=20, k=8),
    "many filters": dict(groups=2, c=6, k=70),
    "many channels": dict(groups=2, c=70, k=6),
    "multiplier": dict(groups=8, k=24),
    "large multiplier": dict(groups=3, c=3, k=51),
    "one group": dict(c=19, k=37),
    "one of everything": dict(n=1, c=1, k=1, h=1, w=1),
    "one pixel": dict(groups=8, c=32, k=32, h=1, w=1),
    "padding only": dict(groups=8, c=32, k=32, h=1, w=1, padding=(4, 4)),
    "padding over the kernel": dict(groups=4, c=16, k=16, h=2, w=3, padding=(5, 6)),
    "no padding": dict(groups=4, c=16, k=16, padding=(0, 0)),
    "1x1": dict(groups=4, c=16, k=16, kernel=(1, 1), padding=(0, 0)),
    "1x1 stride 2": dict(groups=4, c=16, k=16, kernel=(1, 1), padding=(0, 0), stride=(2, 2)),
    "5x5": dict(groups=4, c=16, k=16, kernel=(5, 5), padding=(2, 2)),
    "5x5 depthwise stride 2": dict(groups=16, c=16, k=16, kernel=(5, 5), padding=(2, 2), stride=(2, 2)),
    "5x3": dict(groups=4, c=32, k=32, kernel=(5, 3), padding=(2, 1)),
    "2x4": dict(groups=4, c=16, k=16, kernel=(2, 4), padding=(0, 2)),
    "stride 3": dict(groups=4, c=16, k=16, stride=(3, 3), h=12, w=13),
    "stride over the kernel": dict(groups=4, c=16, k=16, stride=(5, 4), padding=(0, 0), h=17, w=13),
    "dilated": dict(groups=4, c=16, k=16, dilation=(2, 3), padding=(2, 3)),
    "dilated and broadcast": dict(groups=2, c=36, k=40, dilation=(3, 2), padding=(3, 2)),
    "dilated rows only": dict(groups=4, c=16, k=16, dilation=(2, 1), padding=(2, 1)),
    "unequal": dict(groups=4, c=16, k=16, stride=(2, 1), padding=(0, 2), dilation=(1, 3), h=12, w=15),
    "many blocks": dict(n=1, groups=64, c=256, k=256, h=15, w=56),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("integers", (False, True))
@pytest.mark.parametrize("case", GROUPED)
def test_kernels_grouped(case, integers, dtype):
    check_direct(grouped, GROUPED[case], integers, dtype)


# Channels around the vectors of 4, 8 and 16 floats; rows of pixels around tiles of 4, 7 and 8; kernels that are taken by
# rows and by positions.
DEPTHWISE = {f"{c} channels": dict(c=c) for c in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64)}
DEPTHWISE |= {f"rows of {w}": dict(c=20, h=3, w=w) for w in (1, 2, 3, 4, 6, 8, 9, 11, 15, 16, 17, 28, 33)}
DEPTHWISE |= {f"stride 2, rows of {w}": dict(c=20, stride=(2, 2), w=w) for w in (1, 2, 7, 13, 14, 15, 32, 57)}
DEPTHWISE |= {
    "one of everything": dict(n=1, c=1, h=1, w=1),
    "no image": dict(c=16, n=0),
    "padding only": dict(c=8, h=1, w=1, padding=(4, 4)),
    "padding over the kernel": dict(c=16, h=2, w=3, padding=(5, 6)),
    "no padding": dict(c=16, padding=(0, 0)),
    "1x1": dict(c=17, kernel=(1, 1), padding=(0, 0)),
    "5x5": dict(c=17, kernel=(5, 5), padding=(2, 2), h=12, w=29),
    "7x7 stride 2": dict(c=16, kernel=(7, 7), padding=(3, 3), stride=(2, 2), h=12, w=35),
    "5x3": dict(c=24, kernel=(5, 3), padding=(2, 1)),
    "2x4": dict(c=24, kernel=(2, 4), padding=(0, 2), w=23),
    "stride 3": dict(c=16, stride=(3, 3), h=12, w=29),
    "unequal": dict(c=16, stride=(2, 1), padding=(0, 2), dilation=(1, 3), h=12, w=31),
    "dilated rows only": dict(c=16, dilation=(2, 1), padding=(2, 1), w=20),
    "many blocks": dict(n=1, c=256, h=15, w=56),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("integers", (False, True))
@pytest.mark.parametrize("case", DEPTHWISE)
def test_kernels_depthwise(case, integers, dtype):
    c = DEPTHWISE[case]["c"]
    check_direct(depthwise, DEPTHWISE[case] | dict(k=c, groups=c), integers, dtype)


def test_depthwise_weight_of_another_convolution_is_refused():
    x, _, bias = tensors(c=8, k=8, groups=8)
    for packed in (torch.ones(3, 3, 7), torch.ones(3, 3, 8, 1), torch.ones(3, 8, 3).mT, torch.ones(3, 3, 8).double()):
        with pytest.raises(RuntimeError, match=r"packed_weight must be|float32, bfloat16 or float16"):
            ops._conv_depthwise(x, packed, bias, None, [1, 1], [1, 1], [1, 1], True)


def check_special_values(convolution, tensors, groups, value, places):
    """In one channel of the input, they reach the filters of its own group only; in the residual, one value."""
    x, weight, bias = tensors
    for at in places:
        y = x.clone()
        y[at] = value
        out = convolution(y, weight, bias, groups=groups)
        assert_same_special_values(out, reference(y, weight, bias, groups=groups))
        residual = torch.zeros_like(x)
        residual[at] = value
        out = convolution(x, weight, bias, residual, groups=groups)
        assert_same_special_values(out, reference(x, weight, bias, residual, groups=groups))


@pytest.mark.parametrize("depth", (1, 3, 4, 16, 24))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_kernels_grouped_special_values(value, depth):
    places = ((0, 0, 0, 0), (1, 3 * depth - 1, 8, 6), (0, depth, 4, 3))
    check_special_values(grouped, tensors(c=3 * depth, k=3 * depth, groups=3), 3, value, places)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_kernels_depthwise_special_values(value):
    places = ((0, 0, 0, 0), (1, 18, 8, 16), (0, 7, 4, 8))
    check_special_values(depthwise, tensors(c=19, k=19, groups=19, w=17), 19, value, places)


WINOGRAD = {
    "plain": dict(),
    "one pixel": dict(n=1, h=1, w=1, c=1, k=1),
    "one row": dict(h=1, w=17),
    "7 channels, 9 filters": dict(c=7, k=9),
    "9 channels, 7 filters": dict(c=9, k=7),
    "15 channels, 17 filters": dict(c=15, k=17),
    "17 channels, 33 filters": dict(c=17, k=33),
    "33 channels, 65 filters": dict(c=33, k=65),
    "130 filters": dict(k=130),
    "whole tiles": dict(h=20, w=20),
    "one too many": dict(h=21, w=21),
    "one too few": dict(h=19, w=19),
    "no padding": dict(padding=(0, 0)),
    "3x3 into one pixel": dict(padding=(0, 0), h=3, w=3),
    "much padding": dict(padding=(5, 3)),
    "unequal padding": dict(padding=(0, 2)),
    "many tiles": dict(n=5, c=32, k=24, h=30, w=31),
    "batch 7": dict(n=7, c=64, k=16, h=7, w=7),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("case", WINOGRAD)
def test_kernels_winograd(case, tile, dtype):
    sizes, geometry = split(WINOGRAD[case])
    x, weight, bias = tensors(**sizes)
    x, rounding = x.to(dtype), 0.0 if dtype == torch.float32 else UNIT_ROUNDOFF[dtype]
    for relu in (True, False):
        for residual in (None, torch.randn(reference(x.float(), weight, bias, **geometry).shape).to(dtype)):
            how = dict(**geometry, relu=relu)
            out, finite = fast(x, weight, bias, tile, residual, **how)
            exact = reference(*double(x, weight, bias, residual), **how)
            assert out.dtype == dtype
            assert finite and out.shape == exact.shape and out.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(out.double(), exact) or relative_rms(out, exact) <= LARGEST_ERROR[tile] + rounding


@pytest.mark.parametrize("case", WINOGRAD)
def test_kernels_winograd_exact(case):
    """F(2,3) is exact on multiples of 4: its weights have quarters, its other constants are 1 and -1."""
    sizes, geometry = split(WINOGRAD[case])
    x, weight, bias = tensors(**sizes, integers=True)
    out, _ = fast(x, weight, bias, 2, **geometry)
    assert torch.equal(out.double(), reference(*double(x, weight, bias), **geometry))


multiplies_bf16 = pytest.mark.skipif(not ops._multiplies_bf16(), reason="this level does not multiply bfloat16")


@multiplies_bf16
@pytest.mark.parametrize("integers", (False, True))
@pytest.mark.parametrize("case", GEMM)
def test_kernels_gemm_of_bfloat16(case, integers):
    sizes, geometry = split(GEMM[case])
    x, weight, bias = tensors(**sizes, integers=integers)
    x, weight = x.bfloat16(), weight.bfloat16()
    packed = ops._pack_gemm(weight.float(), geometry.get("groups", 1), True)
    geometry = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1) | geometry
    for relu in (True, False):
        size = reference(x.float(), weight.float(), bias, **geometry).shape
        for residual in (None, torch.randint(-9, 9, size).bfloat16()):
            out = ops._conv_gemm(x, packed, bias, residual, *geometry.values(), relu)
            exact = reference(*double(x, weight, bias, residual), **geometry, relu=relu)
            if integers or not exact.any():
                assert torch.equal(out, exact.bfloat16())
            else:
                stock = reference(*to(torch.bfloat16, x, weight, bias, residual), **geometry, relu=relu)
                assert_accurate(out, exact, [stock])


def grouped_of_pairs(
    x, weight, bias, residual=None, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, relu=True
):
    packed = ops._pack_grouped(weight, groups, True)
    return ops._conv_grouped(x, packed, bias, residual, stride, padding, dilation, groups, relu)


@multiplies_bf16
@pytest.mark.parametrize("integers", (False, True))
@pytest.mark.parametrize("case", [n for n, how in GROUPED.items() if how.get("c", 8) // how.get("groups", 1) % 2 == 0])
def test_kernels_grouped_of_bfloat16(case, integers):
    check_direct(grouped_of_pairs, GROUPED[case], integers, torch.bfloat16)


@multiplies_bf16
@pytest.mark.parametrize("depth", (2, 4, 16, 24, 32, 34))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_kernels_grouped_of_bfloat16_special_values(value, depth):
    places = ((0, 0, 0, 0), (1, 3 * depth - 1, 8, 6), (0, depth, 4, 3))
    x, weight, bias = (t.bfloat16() for t in tensors(c=3 * depth, k=3 * depth, groups=3))
    for at in places:
        y = x.clone()
        y[at] = value
        out = grouped_of_pairs(y, weight.float(), bias.float(), groups=3)
        assert_same_special_values(out, reference(y.float(), weight.float(), bias.float(), groups=3))


@multiplies_bf16
@pytest.mark.parametrize("integers", (False, True))
@pytest.mark.parametrize("case", WINOGRAD)
def test_kernels_winograd_of_bfloat16(case, integers):
    sizes, geometry = split(WINOGRAD[case])
    x, weight, bias = tensors(**sizes, integers=integers)
    x, weight = x.bfloat16(), weight.bfloat16()
    padding = geometry.get("padding", (1, 1))
    packed = ops._pack_winograd(weight.float(), 2, True)
    residual = torch.randint(-9, 9, reference(x.float(), weight.float(), bias, **geometry).shape).bfloat16()
    for r in (None, residual):
        out, finite = ops._conv_winograd(x, packed, bias, r, padding, False)
        exact = reference(*double(x, weight, bias, r), **geometry, relu=False)
        assert finite and out.shape == exact.shape
        if integers:  # transformed values are quarters below 64, which bfloat16 holds
            assert torch.equal(out, exact.bfloat16())
        elif exact.numel() > 100:  # of a few values the error is a matter of luck
            assert_accurate(out, exact, [reference(*to(torch.bfloat16, x, weight, bias, r), **geometry, relu=False)])


@multiplies_bf16
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_kernels_of_bfloat16_and_special_values(value):
    x, weight, bias = tensors(c=10, k=17, h=11, w=11)
    x, weight = x.bfloat16(), weight.bfloat16().float()
    for at in ((0, 0, 0, 0), (1, 8, 10, 10), (0, 3, 5, 6)):
        y = x.clone()
        y[at] = value
        assert not ops._conv_winograd(y, ops._pack_winograd(weight, 2, True), bias, None, [1, 1], True)[1]
        geometry = ([1, 1], [1, 1], [1, 1], 1, True)
        out = ops._conv_gemm(y, ops._pack_gemm(weight, 1, True), bias, None, *geometry)
        assert_same_special_values(out, reference(y.float(), weight, bias))


FEW_CHANNELS = {
    "7x7 stem": dict(c=3, k=64, kernel=(7, 7), stride=(2, 2), padding=(3, 3), h=37, w=70),
    "one value": dict(c=1, k=1, kernel=(1, 1), padding=(0, 0), h=1, w=1),
    "2 channels, odd kernel": dict(c=2, k=15, kernel=(2, 5), padding=(1, 4), h=6, w=13),
    "4 channels, patches": dict(c=4, k=33, kernel=(4, 4), stride=(4, 4), padding=(0, 0), h=30, w=29),
    "more padding than image": dict(c=3, k=17, kernel=(5, 7), padding=(6, 8), h=2, w=3),
    "stride beyond the kernel": dict(c=3, k=130, kernel=(2, 3), stride=(5, 4), h=19, w=23),
    "dilated": dict(c=3, k=16, padding=(2, 3), dilation=(3, 2), h=15, w=14),
    "dilated columns of one": dict(c=1, k=66, kernel=(3, 1), padding=(1, 0), dilation=(2, 2), h=9, w=40),
    "no image": dict(c=3, k=16, n=0),
}


def few_channels(x, weight, bias, bfloat16, stride=(1, 1), padding=(1, 1), dilation=(1, 1), relu=True):
    packed = pack_few_channels(weight.float(), dilation, bfloat16)
    return ops._conv_few_channels(x, packed, bias, stride, padding, dilation, relu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("integers", (False, True))
@pytest.mark.parametrize("case", FEW_CHANNELS)
def test_kernels_few_channels(case, integers, dtype):
    sizes, geometry = split(FEW_CHANNELS[case])
    x, weight, bias = tensors(**sizes, integers=integers)
    x, weight = x.to(dtype), weight.to(dtype)
    exact = reference(*double(x, weight, bias), **geometry)
    stock = reference(*to(dtype, x, weight, bias), **geometry)
    for bfloat16 in {False, dtype == torch.bfloat16 and ops._multiplies_bf16()}:
        for layout in (x, *(LAYOUTS[name](x) for name in ("channels_last", "sliced", "transposed"))):
            out = few_channels(layout, weight, bias, bfloat16, **geometry)
            assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
            if integers or not exact.any():
                assert torch.equal(out, exact.to(dtype))
            else:
                assert_accurate(out, exact, [stock])


@multiplies_bf16
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("where", ((0, 0, 0, 0), (1, 2, 10, 11), (0, 1, 5, 6)))
def test_special_values_stay_in_their_window(where, value):
    """The last value of an odd depth has the next pixel behind it."""
    x, weight, bias = tensors(c=3, k=17, h=11, w=12)
    x[where] = value
    x, weight = x.bfloat16(), weight.bfloat16().float()
    exact = reference(x.float(), weight, bias)
    assert_same_special_values(few_channels(x, weight, bias, True), exact)
    gemm = ops._conv_gemm(x, ops._pack_gemm(weight, 1, True), bias, None, [1, 1], [1, 1], [1, 1], 1, True)
    assert_same_special_values(gemm, exact)


def test_few_channels_are_at_most_four():
    x, weight, bias = tensors(c=5, k=16)
    with pytest.raises(RuntimeError, match="at most 4"):
        few_channels(x, weight, bias, False)
    with pytest.raises(RuntimeError, match="packed for this input"):
        few_channels(x[:, :4], weight[:, :3], bias, False)


# Channels whose phases fill the vectors or not; filters around the panels; pixels around tiles of 3 and groups of 6.
STEMS = {
    "3 channels": dict(c=3, k=64, h=37, w=70),
    "1 channel, 1 filter": dict(c=1, k=1, h=30, w=31),
    "2 channels, 17 filters": dict(c=2, k=17, h=41, w=26),
    "4 channels, 65 filters": dict(c=4, k=65, h=19, w=53),
    "15 filters": dict(c=3, k=15, h=16, w=16),
    "130 filters": dict(c=3, k=130, h=16, w=17),
    "one pixel": dict(c=3, k=16, h=1, w=1, n=3),
    "one output": dict(c=3, k=16, h=7, w=8, padding=(0, 0)),
    "one row": dict(c=3, k=16, h=2, w=99),
    "no padding": dict(c=3, k=16, h=24, w=57, padding=(0, 0)),
    "odd and even padding": dict(c=3, k=16, h=13, w=12, padding=(1, 2)),
    "more padding than image": dict(c=3, k=16, h=2, w=3, padding=(6, 9)),
    "batch 5": dict(c=3, k=8, h=35, w=36, n=5),
    "no image": dict(c=3, k=16, n=0),
}


def stem_case(name, **how):
    sizes = {"padding": (3, 3), **STEMS[name]}
    padding = sizes.pop("padding")
    return *tensors(kernel=(7, 7), **sizes, **how), padding


def stem(x, weight, bias, padding, relu=True):
    return ops._conv_winograd_stem(x, ops._pack_winograd_stem(weight), bias, padding, relu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", STEMS)
def test_kernels_winograd_stem(case, dtype):
    x, weight, bias, padding = stem_case(case)
    x, rounding = x.to(dtype), 0.0 if dtype == torch.float32 else UNIT_ROUNDOFF[dtype]
    for relu in (True, False):
        exact = reference(*double(x, weight, bias), stride=(2, 2), padding=padding, relu=relu)
        for layout in (x, *(LAYOUTS[name](x) for name in ("channels_last", "sliced", "transposed"))):
            out, finite = stem(layout, weight, bias, padding, relu)
            assert finite and out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
            assert out.shape == exact.shape
            assert torch.equal(out.double(), exact) or relative_rms(out, exact) <= LARGEST_ERROR[3] + rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", ((3, 2, 1), (2, 2, 0), (5, 1, 2), (6, 3, 3), (2, 5, 1), (1, 1, 0)))
def test_kernels_winograd_stem_max_pool(pool, dtype):
    """Windows that meet one to three blocks of three rows, or step over one."""
    x, weight, bias, padding = stem_case("batch 5")
    x, packed = x.to(dtype), ops._pack_winograd_stem(weight)
    out, finite = ops._conv_winograd_stem_max_pool(x, packed, bias, padding, *([n, n] for n in pool))
    apart, _ = ops._conv_winograd_stem(x, packed, bias, padding, True)
    assert finite and out.dtype == dtype and torch.equal(out, F.max_pool2d(apart, *pool))


@pytest.mark.parametrize("channels", (1, 3, 4))
def test_kernels_winograd_stem_error(channels):
    """Not more than the same algorithm has in plain torch by half."""
    x, weight, _ = tensors(n=1, c=channels, k=64, h=50, w=61, kernel=(7, 7))
    out, _ = stem(x, weight, torch.zeros(64), [3, 3], relu=False)
    exact = F.conv2d(x.double(), weight.double(), stride=2, padding=3)
    assert relative_rms(winograd_stem(x.double(), weight.double(), 3), exact) < 1e-13
    assert relative_rms(out, exact) <= 1.5 * relative_rms(winograd_stem(x, weight, 3), exact)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf"), 3e38))
def test_kernels_winograd_stem_says_what_is_not_finite(value):
    x, weight, bias = tensors(c=3, k=17, h=33, w=30, kernel=(7, 7))
    packed = ops._pack_winograd_stem(weight)
    for at in ((0, 0, 0, 0), (1, 2, 32, 29), (0, 1, 17, 14), (1, 0, 4, 0)):
        y = x.clone()
        y[at] = value
        if value == 3e38:
            y[:] = value  # products overflow
        assert not ops._conv_winograd_stem(y, packed, bias, [3, 3], True)[1]
        assert not ops._conv_winograd_stem_max_pool(y, packed, bias, [3, 3], [3, 3], [2, 2], [1, 1])[1]


def test_winograd_stem_refuses_other_convolutions():
    x, weight, bias = tensors(c=3, k=16, kernel=(7, 7))
    five, _, _ = tensors(c=5)
    with pytest.raises(RuntimeError, match="at most 4"):
        ops._conv_winograd_stem(five, ops._pack_winograd_stem(weight), bias, [3, 3], True)
    for packed in (ops._pack_winograd_stem(weight[:, :2]), ops._pack_winograd_stem(torch.cat([weight] * 6)), weight):
        with pytest.raises(RuntimeError, match="packed_weight must come from _pack_winograd_stem"):
            ops._conv_winograd_stem(x, packed, bias, [3, 3], True)
    for other in (weight[..., :5], weight.bfloat16(), torch.cat([weight, weight], 1)):
        with pytest.raises(RuntimeError, match=r"weight must be \[K, C, 7, 7\]"):
            ops._pack_winograd_stem(other)
    pool = ([40, 40], [2, 2], [1, 1])
    with pytest.raises(RuntimeError, match="must fit into the padded map"):
        ops._conv_winograd_stem_max_pool(x, ops._pack_winograd_stem(weight), bias, [3, 3], *pool)


@multiplies_bf16
def test_kernels_of_bfloat16_refuse_what_they_cannot():
    x, weight, bias = tensors(c=8, k=16)
    geometry = (bias, None, [1, 1], [1, 1], [1, 1], 1, True)
    with pytest.raises(RuntimeError, match="for a bfloat16 input"):
        ops._conv_gemm(x, ops._pack_gemm(weight, 1, True), *geometry)
    first = x[:, :3], pack_few_channels(weight[:, :3], [1, 1], True)
    with pytest.raises(RuntimeError, match="for a bfloat16 input"):
        ops._conv_few_channels(*first, bias, [1, 1], [1, 1], [1, 1], True)
    with pytest.raises(RuntimeError, match="2 pixels wide, got 4"):
        ops._pack_winograd(weight, 4, True)
    with pytest.raises(RuntimeError, match="even number of channels, got 3"):
        ops._pack_grouped(weight[:, :3], 2, True)
    with pytest.raises(RuntimeError, match="for a bfloat16 input"):
        ops._conv_grouped(x, ops._pack_grouped(weight, 1, True), *geometry)


def test_kernels_of_bfloat16_are_those_of_one_level():
    assert ops._multiplies_bf16() == (cpu_level() == "avx512_bf16")


LAYERS = [la for la in layers.distinct(layers.MODELS) if la.kernel == 3 and la.stride == la.groups == 1]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_winograd_error(layer, tile):
    """Not more than the same algorithm has in plain torch by half, nor than what is promised."""
    size = min(layer.size, 14)
    x, weight, _ = tensors(1, layer.channels, layer.filters, size, size)
    zeros = torch.zeros(layer.filters)
    out, _ = fast(x, weight, zeros, tile, relu=False)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    plain = relative_rms(winograd(x, weight, tile, 1), exact)
    assert relative_rms(winograd(x.double(), weight.double(), tile, 1), exact) < 1e-13
    assert relative_rms(out, exact) <= min(1.5 * plain, LARGEST_ERROR[tile])


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_kernels_say_what_is_not_finite(value, tile):
    x, weight, bias = tensors(c=9, k=17, h=11, w=11)
    for at in ((0, 0, 0, 0), (1, 8, 10, 10), (0, 3, 5, 6), (1, 0, 4, 0)):
        y = x.clone()
        y[at] = value
        assert not fast(y, weight, bias, tile)[1]
        assert_same_special_values(gemm(y, weight, bias), reference(y, weight, bias))
    residual = torch.full((2, 17, 11, 11), value)
    out, finite = fast(x, weight, bias, tile, residual)
    assert finite  # the residual spreads nowhere
    assert_same_special_values(out, reference(x, weight, bias, residual))
    assert not fast(torch.full_like(x, 3e38), weight, bias, tile)[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_strides(layout):
    x, weight, bias = tensors(c=6, k=6, h=8, w=8)
    residual = torch.randn(2, 6, 8, 8)
    change = LAYOUTS[layout]
    for args in (
        (change(x), weight, bias, residual),
        (x, change(weight), bias, residual),
        (x, weight, bias, change(residual)),
    ):
        exact = reference(*double(*args))
        assert_accurate(gemm(*args), exact, [reference(*args)])
        assert_accurate(grouped(*args), exact, [reference(*args)])
        assert relative_rms(fast(*args[:3], 4, args[3])[0], exact) <= LARGEST_ERROR[4]


def test_kernels_empty_batch():
    x, weight, bias = tensors(n=0)
    assert (
        grouped(x, weight, bias).shape
        == gemm(x, weight, bias).shape
        == fast(x, weight, bias, 4)[0].shape
        == (0, 16, 9, 7)
    )


@pytest.mark.parametrize("threads", (1, 2, 3, 16))
def test_kernels_give_the_same_bits_for_any_number_of_threads(threads):
    before = torch.get_num_threads()
    x, weight, bias = tensors(n=3, c=40, k=72, h=17, w=19)
    few, one = tensors(n=3, c=48, k=48, h=17, w=19, groups=12), tensors(n=1, c=40, k=72, h=17, w=19, groups=4)

    def run():
        in_groups = [grouped(*few, groups=12), grouped(*one, groups=4), gemm(*one, groups=4)]
        return [gemm(x, weight, bias), *in_groups, *(fast(x, weight, bias, tile)[0] for tile in TILES)]

    expected = run()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    finally:
        torch.set_num_threads(before)


def test_packed_weight_of_another_convolution_is_refused():
    x, weight, bias = tensors(c=8, k=16)
    for packed in (ops._pack_gemm(weight[:, :7], 1), ops._pack_gemm(torch.cat([weight] * 6), 1)):
        with pytest.raises(RuntimeError, match="packed_weight must come from _pack_gemm"):
            ops._conv_gemm(x, packed, bias, None, [1, 1], [1, 1], [1, 1], 1, True)
    for packed in (ops._pack_grouped(weight[:, :7], 1), ops._pack_grouped(torch.cat([weight] * 6), 1), weight):
        with pytest.raises(RuntimeError, match="packed_weight must come from _pack_grouped"):
            ops._conv_grouped(x, packed, bias, None, [1, 1], [1, 1], [1, 1], 1, True)
    for packed in (ops._pack_winograd(weight[:, :7], 4), ops._pack_gemm(weight, 1)):
        with pytest.raises(RuntimeError, match="packed_weight must come from _pack_winograd"):
            ops._conv_winograd(x, packed, bias, None, [1, 1], True)
    with pytest.raises(RuntimeError, match="2, 4 or 5 pixels wide, got 3"):
        ops._pack_winograd(weight, 3)


@pytest.mark.parametrize("level", CPU_LEVELS)
def test_nothing_is_read_behind_the_arguments(level):
    script = Path(__file__).with_name("protected.py")
    env = {**os.environ, "RESNET_FAST_CPU_LEVEL": level}
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env)
    if "does not have that level" in result.stderr:
        pytest.skip(f"this CPU does not have {level}")
    assert result.stdout == "read nothing behind the end\n", result.stderr[-2000:]
    assert result.returncode == -signal.SIGSEGV, "the pages behind the arguments were not protected"


@pytest.mark.parametrize("level", OTHER_LEVELS)
def test_every_other_level(level):
    assert_passes_at_level(__file__, level, "kernels")
