"""conv_bn_relu on CUDA: on a GPU, and what can be judged without one. The problems are those of test_conv_bn_relu.py."""

import re
import sys

import pytest
import torch
from checkout import ROOT
from checks import assert_accurate, assert_same_special_values, rounded_to_tf32
from test_conv_bn_relu import (
    BAD,
    DTYPES,
    FIRST_LAYERS,
    GEOMETRIES,
    TAILS,
    assert_right,
    bad_problem,
    in_channels_last,
    in_double,
    problem,
)

import resnet_fast
from resnet_fast import choose
from resnet_fast.ops import conv_bn_relu, conv_bn_relu_ref

GPU_BACKENDS = ("cuda", "cudnn", "triton")
IN_TF32 = ("cuda", "triton")  # what these do to float32 operands, of whatever size


def on_gpu(tensors):
    return {name: None if t is None else t.cuda() for name, t in tensors.items()}


def in_tf32(tensors, how):
    """The exact result of float32 operands rounded to TF32. (cuDNN computes small problems in full float32.)"""
    short = {**tensors, **{name: rounded_to_tf32(tensors[name]) for name in ("input", "weight")}}
    return conv_bn_relu_ref(**in_double(short), **how).float()


def assert_right_on_gpu(tensors, how, backend):
    tensors = on_gpu(tensors)
    with resnet_fast.use_backend(backend):
        out = conv_bn_relu(**tensors, **how)
    stock = [conv_bn_relu_ref(**t, **how) for t in (tensors, in_channels_last(tensors))]
    if backend in IN_TF32 and out.dtype == torch.float32:
        stock.append(in_tf32(tensors, how))
    assert_accurate(out, conv_bn_relu_ref(**in_double(tensors), **how), stock)
    assert out.stride() == torch.empty(out.shape, memory_format=torch.channels_last).stride()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_gpu_geometries(geometry, dtype, backend):
    assert_right_on_gpu(*problem(**GEOMETRIES[geometry], bias=True, residual=True, dtype=dtype), backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", (*GPU_BACKENDS, None))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", TAILS)
def test_gpu_tails(tail, dtype, backend):
    assert_right_on_gpu(*problem(c=64, k=72, **TAILS[tail], dtype=dtype), backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", FIRST_LAYERS)
def test_gpu_first_layer(layer, dtype, backend):
    assert_right_on_gpu(*problem(**FIRST_LAYERS[layer], dtype=dtype), backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ("input", "residual", "bias", "bn_bias", "running_mean"))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_gpu_nan_and_inf(value, where, dtype, backend):
    tensors, how = problem(c=64, k=64, bias=True, residual=True, dtype=dtype)
    tensors[where].view(-1)[tensors[where].numel() // 2] = value
    tensors = on_gpu(tensors)
    with resnet_fast.use_backend(backend):
        assert_same_special_values(conv_bn_relu(**tensors, **how), conv_bn_relu_ref(**tensors, **how))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_gpu_residual_may_be_the_input_and_nothing_goes_stale(backend):
    tensors, how = problem(c=64, k=64, dtype=torch.bfloat16)
    tensors = on_gpu({**tensors, "residual": tensors["input"]})
    tensors["residual"] = tensors["input"]
    for _ in range(2):
        assert_right_on_gpu(tensors, how, backend)
        tensors["weight"].data.mul_(-1)
        tensors["running_var"].data.add_(1)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", (*GPU_BACKENDS, None))
def test_gpu_inside_a_cuda_graph(backend):
    tensors, how = problem(c=64, k=64, residual=True, dtype=torch.bfloat16)
    tensors = on_gpu(tensors)
    with torch.no_grad(), resnet_fast.use_backend(backend):
        conv_bn_relu(**tensors, **how)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = conv_bn_relu(**tensors, **how)
        tensors["input"].normal_()
        graph.replay()
        assert torch.equal(out, conv_bn_relu(**tensors, **how))


@pytest.mark.gpu
@pytest.mark.parametrize("case", BAD)
def test_gpu_bad_input(case):
    tensors, how, message = bad_problem(case)
    moved = {n: t if t is None or t.is_meta else t.cuda() for n, t in tensors.items()}
    with pytest.raises(RuntimeError, match=message.replace("device cpu", "device cuda:0")):
        conv_bn_relu(**moved, **how)


@pytest.mark.gpu
def test_gpu_batch_0_and_numbers_for_pairs():
    tensors, how = problem(n=0, dtype=torch.bfloat16)
    assert conv_bn_relu(**on_gpu(tensors), **how).shape == (0, 16, 9, 7)
    tensors, how = problem(dtype=torch.bfloat16)
    ref = conv_bn_relu(**on_gpu(tensors), **how)
    assert torch.equal(conv_bn_relu(**on_gpu(tensors), **(how | {"stride": 1, "padding": [1], "dilation": (1,)})), ref)


def test_choice_on_cuda(monkeypatch):
    """By shape and architecture alone, so that it can be asked without a GPU."""

    def chosen(n, c, size, k, kernel, stride=1, groups=1, residual=False, relu=True, dtype=torch.bfloat16, on="sm_90"):
        x = torch.empty(n, c, size, size, dtype=dtype, device="meta")
        weight = torch.empty(k, c // groups, kernel, kernel, dtype=dtype, device="meta")
        return choose.choose_on_cuda(x, weight, [stride] * 2, groups, residual, relu, architecture=on)

    for has_triton, triton in ((True, "triton"), (False, "cudnn")):
        monkeypatch.setattr(choose, "_triton_takes_cuda", lambda has_triton=has_triton: has_triton)
        assert chosen(256, 3, 224, 64, 7, 2) == triton
        assert chosen(256, 64, 56, 256, 1, relu=False) == triton
        assert chosen(256, 64, 56, 256, 1, residual=True) == "cudnn"
        assert chosen(1, 3, 224, 64, 7, 2) == "cudnn"
        assert chosen(256, 3, 224, 64, 7, 2, dtype=torch.float32) == "cudnn"
        assert chosen(256, 64, 56, 64, 3) == "cudnn"
        assert chosen(256, 64, 56, 64, 1, groups=2, relu=False) == "cudnn"
        assert chosen(256, 3, 224, 64, 7, 2, on="sm_80") == "cudnn"  # nothing was measured there
        assert choose.choose_for_large(2**31 - 1) == "cudnn"
        assert choose.choose_for_large(2**31) == ("triton" if has_triton else "reference")


def test_tiles_of_the_cuda_kernel():
    """The table in Python names what the header declares, in its order, which is how the operator counts them."""
    header = (ROOT / "csrc" / "cuda" / "conv_bn_relu_sm80.h").read_text()
    names = re.search(r"enum class ConvTile \{(.*?)\};", re.sub("//.*", "", header), re.DOTALL)[1]
    assert tuple(name.strip() for name in names.split(",")) == (*choose.CUDA_TILES, "count")


@pytest.fixture(params=("cuda", "cudnn"))
def cuda_stand_in(request, monkeypatch):
    """What the operator does on CUDA, on CPU tensors: the C++ operator is replaced by torch's, which as bluntly refuses
    what it cannot run. Counts its calls."""
    module = sys.modules["resnet_fast.ops.conv_bn_relu"]
    calls = []

    def op_cuda(input, weight, *rest):
        calls.append(input.shape)
        stride, padding, dilation = rest[6:9]
        if not (len(stride) == len(padding) == len(dilation) == 2 and input.numel() > 0):
            raise RuntimeError("conv_bn_relu: bad arguments")
        module.check_conv_args(input, weight, *rest[:6], stride, padding, dilation, rest[9])
        return conv_bn_relu_ref(input, weight, *rest).contiguous(memory_format=torch.channels_last)

    monkeypatch.setitem(module._ops_cuda, request.param, op_cuda)
    monkeypatch.setattr(module, "choose", lambda *_: choose.Choice(request.param, "stand-in", ""))
    monkeypatch.setattr(module, "choose_on_cuda", lambda *_: request.param)
    return calls


def test_on_cuda_the_operator_is_called_first_and_once(cuda_stand_in):
    tensors, how = problem(bias=True, residual=True)
    assert_right(tensors, how)
    assert len(cuda_stand_in) == 1
    for change in ({"stride": [1]}, {"padding": (1,)}, {"dilation": 1}):
        assert_right(tensors, how | change)
    assert conv_bn_relu(**{**tensors, "input": tensors["input"][:0], "residual": None}, **how).shape == (0, 16, 9, 7)


@pytest.mark.parametrize("case", BAD)
def test_on_cuda_bad_input_is_refused_in_the_same_words(case, cuda_stand_in):
    tensors, how, message = bad_problem(case)
    with pytest.raises(RuntimeError, match=message):
        conv_bn_relu(**tensors, **how)


@pytest.mark.gpu
def test_gpu_more_elements_than_32_bits_count():
    """cuDNN's fused convolution does not take that many."""
    n = 2**31 // (64 * 56 * 56) + 1
    tensors, how = problem(c=64, k=64, kernel=(1, 1), padding=(0, 0), dtype=torch.bfloat16)
    tensors = on_gpu(tensors)
    tensors["input"] = torch.randn(n, 56, 56, 64, device="cuda", dtype=torch.bfloat16).permute(0, 3, 1, 2)
    with torch.no_grad():
        out = conv_bn_relu(**tensors, **how)
        for part in (slice(0, 2), slice(n - 2, n)):
            with resnet_fast.use_backend("triton"):
                assert torch.equal(out[part], conv_bn_relu(**{**tensors, "input": tensors["input"][part]}, **how))
        with resnet_fast.use_backend("cudnn"), pytest.raises(RuntimeError, match="2\\^31"):
            conv_bn_relu(**tensors, **how)
        del out
        with resnet_fast.use_backend("cuda"):
            out = conv_bn_relu(**tensors, **how)
            for part in (slice(0, 2), slice(n - 2, n)):
                few = conv_bn_relu(**{**tensors, "input": tensors["input"][part]}, **how)
                assert torch.equal(out[part], few)  # every tile adds up in the same order
