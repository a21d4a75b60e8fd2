"""The convolution through descriptors: which problems it takes, and that it computes them."""

import pytest
import torch
from checks import assert_same_special_values, rounded_to_tf32
from test_conv_bn_relu import assert_right, in_double, problem

from resnet_fast.kernels import configs, conv_tma
from resnet_fast.measure import relative_rms
from resnet_fast.ops import conv_bn_relu, conv_bn_relu_ref

from .kernels import launches

pytestmark = pytest.mark.usefixtures("triton_backend")

_16_BIT = (torch.bfloat16, torch.float16)
ONE = dict(kernel=(1, 1), padding=(0, 0))
CASES = {
    "1x1": dict(c=64, k=72, **ONE),
    "1x1 bias": dict(c=16, k=8, bias=True, **ONE),
    "1x1 no affine": dict(c=48, k=24, affine=False, **ONE),
    "1x1 stride 2": dict(c=32, k=40, stride=(2, 2), **ONE),
    "1x1 stride 2 on even sides": dict(c=32, k=40, h=8, w=6, stride=(2, 2), **ONE),
    "1x1 strides 3 and 1": dict(c=32, k=40, stride=(3, 1), **ONE),
    "1x1 many filters": dict(c=80, k=264, h=3, w=3, **ONE),
    "1x1 deep": dict(c=272, k=16, h=3, w=3, **ONE),
    "1x1 one pixel": dict(n=3, c=64, k=16, h=1, w=1, **ONE),
    "3x3": dict(c=64, k=64),
    "3x3 one image": dict(n=1, c=32, k=16, h=13, w=15),
    "3x3 many images": dict(n=9, c=16, k=16, h=3, w=5),
    "3x3 on 7x7": dict(n=3, c=16, k=136, h=7, w=7),
    "3x3 one row": dict(n=2, c=16, k=16, h=1, w=33),
    "3x3 stride 2": dict(c=32, k=24, h=10, w=14, stride=(2, 2)),
    "3x3 stride 2 on one pixel of output": dict(n=3, c=32, k=24, h=2, w=2, stride=(2, 2)),
    "3x3 stride 2 without padding": dict(c=16, k=24, h=10, w=14, stride=(2, 2), padding=(0, 0)),
    "3x3 dilation 2": dict(c=32, k=24, dilation=(2, 2), padding=(2, 2)),
    "3x3 stride 2 dilation 3": dict(c=16, k=24, h=12, w=10, stride=(2, 2), dilation=(3, 3), padding=(3, 3)),
    "3x3 wide padding": dict(c=16, k=24, padding=(3, 4)),
    "1x3": dict(c=16, k=24, kernel=(1, 3), padding=(0, 1)),
    "5x4 stride 2": dict(c=16, k=24, h=12, w=10, kernel=(5, 4), stride=(2, 2), padding=(2, 1)),
    "1x1 in padding": dict(c=16, k=24, kernel=(1, 1), padding=(1, 2)),
}
TAILS = (dict(residual=True), dict(relu=False), dict(residual=True, relu=False, bias=True))


def assert_by_descriptors(found):
    assert found == {"conv_tma_kernel": 1}


@pytest.mark.parametrize("dtype", _16_BIT)
@pytest.mark.parametrize("case", CASES)
def test_cases(case, dtype, table):
    with launches() as found:
        assert_right(*problem(**CASES[case], dtype=dtype))
    assert_by_descriptors(found)


@pytest.mark.parametrize("dtype", _16_BIT)
@pytest.mark.parametrize("tail", TAILS, ids=str)
@pytest.mark.parametrize("case", ("1x1", "1x1 stride 2", "3x3", "3x3 stride 2", "3x3 on 7x7"))
def test_tails(case, tail, dtype):
    assert_right(*problem(**CASES[case] | tail, dtype=dtype))


@pytest.mark.parametrize("case", CASES)
def test_tf32_is_that_of_rounded_operands(case, table, allow_tf32):
    tensors, how = problem(**CASES[case], residual=True)
    with launches() as found:
        out = conv_bn_relu(**tensors, **how)
    assert_by_descriptors(found)
    rounded = {**tensors, **{name: rounded_to_tf32(tensors[name]) for name in ("input", "weight")}}
    exact = conv_bn_relu_ref(**in_double(rounded), **how)
    assert relative_rms(out, exact) < 1e-6 < relative_rms(out, conv_bn_relu_ref(**in_double(tensors), **how))


@pytest.mark.parametrize("dtype", (torch.float32, *_16_BIT))
@pytest.mark.parametrize("case", CASES)
def test_integers_bit_for_bit(case, dtype, table, allow_tf32):
    tensors, how = problem(**CASES[case] | dict(bias=True), residual=True, integers=True, eps=0.0, dtype=dtype)
    with launches() as found:
        out = conv_bn_relu(**tensors, **how)
    assert_by_descriptors(found)
    assert torch.equal(out, conv_bn_relu_ref(**in_double(tensors), **how).to(dtype))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on what is asked for here
@pytest.mark.parametrize("where", ("input", "weight", "residual", "bn_bias", "running_var"))
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("case", ("1x1", "3x3", "3x3 stride 2"))
def test_nan_and_inf(case, value, where):
    # No padding around an infinite weight: its product with a zero there is NaN to a GEMM, and skipped by others.
    padding = dict(padding=(0, 0)) if where == "weight" else {}
    tensors, how = problem(**CASES[case] | padding, residual=True, relu=False, dtype=torch.bfloat16)
    tensors[where].view(-1)[tensors[where].numel() // 2] = value
    assert_same_special_values(conv_bn_relu(**tensors, **how), conv_bn_relu_ref(**in_double(tensors), **how))


REFUSED = {
    "odd channels": dict(c=65, k=64),
    "24 channels": dict(c=24, k=64),
    "odd filters": dict(c=64, k=65),
    "groups": dict(c=64, k=64, groups=2),
    "stride 3": dict(c=32, k=32, stride=(3, 3)),
    "strides 2 and 1": dict(c=32, k=32, h=8, w=8, stride=(2, 1)),
    "stride 2 on odd sides": dict(c=32, k=32, h=9, w=8, stride=(2, 2)),
}


@pytest.mark.parametrize("dtype", _16_BIT)
@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_take_goes_to_pointers(case, dtype):
    with launches() as found:
        assert_right(*problem(**REFUSED[case], residual=True, dtype=dtype))
    assert found == {"conv_pointers_kernel": 1}


@pytest.mark.parametrize("name", ("input", "weight", "residual"))
def test_what_begins_between_vectors_goes_to_pointers(name):
    tensors, how = problem(c=32, k=32, residual=True, dtype=torch.bfloat16)
    t = tensors[name].contiguous(memory_format=torch.channels_last)
    storage = torch.empty(t.numel() + 1, dtype=t.dtype)
    tensors[name] = storage.as_strided(t.shape, t.stride(), 1).copy_(t)
    with launches() as found:
        conv_bn_relu(**tensors, **how)
    assert found == {"conv_pointers_kernel": 1}


def test_full_float32_goes_to_pointers():
    with launches() as found:
        assert_right(*problem(c=64, k=64))
    assert found == {"conv_pointers_kernel": 1}


def test_architectures_without_a_table_take_pointers():
    assert configs.has_descriptors("sm_90") and configs.has_descriptors("sm_100")
    assert not any(map(configs.has_descriptors, ("sm_80", "sm_86", "sm_89", "sm_120", "sm_75")))


@pytest.mark.parametrize(
    ("sizes", "block_m", "box"),
    [
        ((256, 56, 56), 128, (2, 8, 8)),
        ((256, 28, 28), 128, (8, 4, 4)),
        ((256, 14, 14), 128, (32, 2, 2)),
        ((256, 7, 7), 128, (128, 1, 1)),
        ((1, 112, 112), 128, (1, 8, 16)),
        ((1, 7, 7), 64, (1, 8, 8)),
        ((1, 1, 1), 64, (1, 1, 64)),
    ],
)
def test_boxes_waste_least(sizes, block_m, box):
    assert conv_tma.box_of(*sizes, block_m) == box


@pytest.mark.parametrize("n", (1, 3, 8, 300))
@pytest.mark.parametrize("p", (1, 7, 14, 56, 300))
def test_boxes_are_whole_tiles_of_legal_sides(n, p):
    box = conv_tma.box_of(n, p, p, 128)
    assert box[0] * box[1] * box[2] == 128 and max(box) <= 256


def test_choices_that_were_measured_without_descriptors_keep_to_pointers(monkeypatch):
    """`choose_on_cuda` sends layers to Triton by times of the kernel with pointers."""
    import sys

    from resnet_fast.choose import Choice

    module = sys.modules["resnet_fast.ops.conv_bn_relu"]
    monkeypatch.setattr(module, "forced", lambda: None)
    monkeypatch.setattr(module, "choose", lambda *arguments: Choice("triton", "Triton", ""))
    with launches() as found:
        assert_right(*problem(**CASES["1x1"], dtype=torch.bfloat16))
    assert found == {"conv_pointers_kernel": 1}
