"""The Triton kernels on a GPU: right in every dtype and on both paths of the convolutions, and fit for CUDA graphs.

What can be judged without a GPU: tests/triton_interpreter and tests/triton_aot.
"""

from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
from checks import assert_accurate, assert_same_special_values, rounded_to_tf32
from networks import images
from test_avg_pool_flatten import SIZES
from test_avg_pool_flatten import assert_right as assert_averaged
from test_conv_bn_relu import DTYPES, GEOMETRIES, in_channels_last, in_double, problem
from test_conv_bn_relu_cuda import on_gpu
from test_conv_bn_relu_max_pool import STEM, stem
from test_conv_bn_relu_projection import ONE_BY_ONE, block
from test_max_pool import GEOMETRIES as POOLS
from test_max_pool import assert_equals_torch

import resnet_fast
from resnet_fast import models, ops
from resnet_fast.bench.kernels import by_pointers, uses_descriptors
from resnet_fast.measure import random_model

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

# Of each kernel the edges of its tiles, of the persistent one also more tiles than programs.
CONVOLUTIONS = {
    "1x1": dict(n=3, c=64, k=256, h=14, w=14, **ONE_BY_ONE),
    "1x1, many tiles": dict(n=16, c=64, k=72, h=56, w=56, **ONE_BY_ONE),
    "1x1 stride 2": dict(n=3, c=64, k=72, h=14, w=13, kernel=(1, 1), padding=(0, 0), stride=(2, 2)),
    "3x3": dict(n=5, c=48, k=40, h=9, w=7),
    "3x3, many tiles": dict(n=16, c=64, k=64, h=56, w=56),
    "3x3, deep": dict(n=1, c=512, k=512, h=7, w=7),
    "3x3, one pixel": dict(n=2, c=128, k=64, h=1, w=1),
    "3x3 stride 2": dict(n=3, c=64, k=128, h=14, w=10, stride=(2, 2)),
    "5x3, dilated": dict(n=2, c=32, k=24, h=13, w=11, kernel=(5, 3), padding=(4, 2), dilation=(2, 2)),
}
BY_POINTERS_ALONE = {
    "3x3 stride 2, odd sides": dict(n=3, c=64, k=128, h=13, w=11, stride=(2, 2)),
    "unequal strides": GEOMETRIES["unequal"],
    "odd channels": dict(n=3, c=65, k=33),
    "groups": dict(n=3, c=128, k=64, groups=2),
    "depthwise": GEOMETRIES["depthwise"],
}
FEW_CHANNELS = {
    "7x7": dict(n=3, h=64, w=62, **STEM),
    "one channel": dict(n=2, c=1, k=24, kernel=(5, 5), padding=(2, 2), h=17, w=15),
}
PROJECTIONS = {
    "first stage": dict(
        n=3, k=256, main=dict(c=64, h=14, w=14, **ONE_BY_ONE), shortcut=dict(c=64, h=14, w=14, stride=(1, 1))
    ),
    "bottleneck": dict(n=3, k=512, main=dict(c=128, h=14, w=14, **ONE_BY_ONE), shortcut=dict(c=256, h=28, w=28)),
    "basic block": dict(n=3, k=128, main=dict(c=128, h=14, w=14), shortcut=dict(c=64, h=28, w=28)),
    "odd sides": dict(n=2, k=72, main=dict(c=32), shortcut=dict(c=48)),
    "many tiles": dict(n=16, k=64, main=dict(c=64, h=56, w=56), shortcut=dict(c=16, h=56, w=56, stride=(1, 1))),
}
STEMS = {
    "one image": dict(n=1, h=224, w=224, **STEM),
    "tails": dict(n=3, h=61, w=90, **STEM),
    "3x3": dict(n=2, c=4, k=40, kernel=(3, 3), stride=(1, 1), padding=(1, 1), h=19, w=23),
}
OPERANDS = ("input", "weight", "shortcut", "shortcut_weight")


def cases(name, make, problems, **how):
    """{case: (operator, reference, what makes its arguments for a dtype)}."""
    operator, reference = getattr(ops, name), getattr(ops, f"{name}_ref")
    return {f"{name}, {case}": (operator, reference, partial(make, **how, **p)) for case, p in problems.items()}


conv = partial(cases, "conv_bn_relu", problem, bias=True, residual=True)
WITH_DESCRIPTORS = conv(CONVOLUTIONS) | cases("conv_bn_relu_projection", block, PROJECTIONS)
WITHOUT = conv(BY_POINTERS_ALONE | FEW_CHANNELS) | cases("conv_bn_relu_max_pool", stem, STEMS)
CASES = WITH_DESCRIPTORS | WITHOUT


def arguments(make, **how):
    tensors, geometry = make(**how)
    return on_gpu(tensors), geometry


def triton(operator, tensors, how):
    """The call of an operator on the backend."""

    @torch.no_grad()
    def call():
        with resnet_fast.use_backend("triton"):
            return operator(**tensors, **how)

    return call


def in_tf32(tensors):
    """float32 operands rounded to TF32. (cuDNN computes small problems in full float32.)"""
    return tensors | {name: rounded_to_tf32(t) for name, t in tensors.items() if name in OPERANDS}


def assert_right(call, reference, tensors, how):
    out, exact = call(), reference(**in_double(tensors), **how)
    stock = [reference(**t, **how) for t in (tensors, in_channels_last(tensors))]
    if out.dtype == torch.float32:
        stock.append(reference(**in_double(in_tf32(tensors)), **how).float())
    assert_accurate(out, exact, stock)
    assert out.stride() == torch.empty(out.shape, memory_format=torch.channels_last).stride()


def has_descriptors():
    from resnet_fast.kernels import configs, shared

    return configs.has_descriptors(shared.target_of(torch.empty(1, device="cuda")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_accuracy(case, dtype):
    operator, reference, make = CASES[case]
    tensors, how = arguments(make, dtype=dtype)
    assert_right(triton(operator, tensors, how), reference, tensors, how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_integers_bit_for_bit(case, dtype):
    """On both paths. Every product, sum and scale is exact in float32 and TF32, so the one rounding is all there is."""
    operator, reference, make = CASES[case]
    tensors, how = arguments(make, dtype=dtype, integers=True, eps=0.0)
    call, ref = triton(operator, tensors, how), reference(**in_double(tensors), **how).to(dtype)
    assert uses_descriptors(call) == (case in WITH_DESCRIPTORS and has_descriptors())
    assert torch.equal(call(), ref)
    if case in WITH_DESCRIPTORS:
        assert torch.equal(by_pointers(call)(), ref)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", WITH_DESCRIPTORS)
def test_accuracy_by_pointers(case, dtype):
    operator, reference, make = CASES[case]
    tensors, how = arguments(make, dtype=dtype)
    assert_right(by_pointers(triton(operator, tensors, how)), reference, tensors, how)


@pytest.mark.parametrize("where", ("input", "weight", "residual"))
def test_a_tensor_that_begins_between_vectors(where):
    tensors, how = arguments(problem, n=3, c=64, k=64, residual=True, dtype=torch.bfloat16)
    t = tensors[where].permute(0, 2, 3, 1)
    tensors[where] = t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t).permute(0, 3, 1, 2)
    call = triton(ops.conv_bn_relu, tensors, how)
    assert not uses_descriptors(call)
    assert_right(call, ops.conv_bn_relu_ref, tensors, how)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("case", ("conv_bn_relu, 3x3", "conv_bn_relu, 7x7", "conv_bn_relu_max_pool, tails"))
def test_nan_and_inf_stay_where_they_are(case, value):
    """Beside padding, the end of a map and the end of a tile."""
    operator, reference, make = CASES[case]
    tensors, how = arguments(make, dtype=torch.bfloat16)
    for pixel in ((0, 0), (-1, -1), (4, 3)):
        tensors["input"][-1, :, pixel[0], pixel[1]] = value
        assert_same_special_values(triton(operator, tensors, how)(), reference(**in_double(tensors), **how))
        tensors["input"][-1, :, pixel[0], pixel[1]] = 1.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", POOLS)
def test_max_pool(case, dtype):
    how = dict(POOLS[case])
    x = torch.randn(how.pop("shape"), device="cuda").to(dtype)
    x.view(-1)[::50] = float("nan")
    with torch.no_grad(), resnet_fast.use_backend("triton"):
        for format in (torch.channels_last, torch.contiguous_format):
            assert_equals_torch(x.contiguous(memory_format=format), **how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", (5, 64, 2048))
def test_avg_pool_flatten(c, dtype):
    with torch.no_grad(), resnet_fast.use_backend("triton"):
        for size in SIZES[::3]:
            x = torch.randn(3, c, *size, device="cuda").to(dtype)
            assert_averaged(x.contiguous(memory_format=torch.channels_last))


@contextmanager
def nothing_waits():
    """Raises where torch would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_a_whole_network_in_a_cuda_graph():
    """Nothing waits and nothing is kept; and a capture, in which any cudaMalloc but that of torch's own allocator
    fails, shows that outputs and scratch come from there. The last layer, torch's, is left out: it may round otherwise
    inside a graph."""
    from resnet_fast.kernels import conv_tma

    net = random_model(models.resnet50, images(4, 3, 64, 64))
    net.fc = torch.nn.Identity()
    net = net.to("cuda", torch.bfloat16, memory_format=torch.channels_last)
    x = images(2, 3, 224, 224).to("cuda", torch.bfloat16, memory_format=torch.channels_last)
    with resnet_fast.use_backend("triton"):
        with mock.patch.object(conv_tma, "run", wraps=conv_tma.run) as run:
            net(x)  # compiles
        assert run.call_count == (53 - 1 - 4 if has_descriptors() else 0)  # without stem and shortcuts
        before = torch.cuda.memory_allocated()
        with nothing_waits():
            out = net(x)
        assert torch.cuda.memory_allocated() - before == out.numel() * out.element_size()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = net(x)
        for _ in range(2):
            x.normal_()
            with nothing_waits():
                graph.replay()
            out = net(x)
            assert out.isfinite().all() and out.std() > 0 and torch.equal(captured, out)
