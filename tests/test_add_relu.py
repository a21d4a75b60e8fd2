import os
import subprocess
import sys

import pytest
import torch
from checks import OTHER_LEVELS, assert_passes_at_level, assert_same_special_values
from torch.library import opcheck

import resnet_fast
from resnet_fast.ops import add_relu, add_relu_ref

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Around every vector width (4, 8, 16, 32 elements), around the fp16 chunk, and past the parallel grain of 32768.
SIZES = (0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 1003, 2 * 32768 + 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_equals_torch_bit_for_bit(n, dtype):
    a, b = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    assert torch.equal(add_relu(a, b), add_relu_ref(a, b))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", range(1, 9))
def test_misaligned_starts(offset, dtype):
    a, b = torch.randn(2, 1100).to(dtype).unbind()
    a, b = a[offset:1000], b[offset + 3 : 1003]
    assert torch.equal(add_relu(a, b), add_relu_ref(a, b))


def layouts(x):
    n, c, h, w = x.shape
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
        "strided": torch.empty(n, 2 * c, h, w)[:, ::2].copy_(x),
        "expanded": x[:, :1].expand(n, c, h, w),
    }


@pytest.mark.parametrize("first", ["contiguous", "channels_last", "transposed", "strided", "expanded"])
@pytest.mark.parametrize("second", ["contiguous", "channels_last", "transposed", "strided", "expanded"])
def test_any_strides(first, second):
    a, b = layouts(torch.randn(2, 5, 3, 7))[first], layouts(torch.randn(2, 5, 3, 7))[second]
    before = a.clone(), b.clone()
    out = add_relu(a, b)
    assert torch.equal(out, add_relu_ref(a, b))
    assert out.stride() == torch.empty_like(a).stride()
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


def test_same_tensor_twice():
    a = torch.randn(3, 17)
    assert torch.equal(add_relu(a, a), torch.relu(2 * a))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype):
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 65504.0, 6e-8, 3e38])
    a, b = torch.meshgrid(values, values, indexing="ij")
    a, b = a.to(dtype).reshape(-1), b.to(dtype).reshape(-1)
    ref = add_relu_ref(a, b)
    assert_same_special_values(add_relu(a, b), ref)
    assert torch.equal(add_relu(a, b).nan_to_num(), ref.nan_to_num())


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_every_16_bit_value(dtype):
    a = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    b = a[torch.randperm(len(a))]
    assert_same_special_values(add_relu(a, b), add_relu_ref(a, b))
    assert torch.equal(add_relu(a, b).nan_to_num(), add_relu_ref(a, b).nan_to_num())


def test_float64_runs_on_the_reference():
    a, b = torch.randn(2, 9, dtype=torch.float64).unbind()
    assert torch.equal(add_relu(a, b), torch.relu(a + b))


def test_gradients():
    a, b = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(add_relu, (a, b))
    assert torch.autograd.gradgradcheck(add_relu, (a, b))


def test_gradient_passes_where_torch_passes_it():
    a = torch.tensor([-1.0, 0.0, 1.0, float("nan")])
    ours, stock = a.clone().requires_grad_(), a.clone().requires_grad_()
    add_relu(ours, torch.zeros(4)).sum().backward()
    add_relu_ref(stock, torch.zeros(4)).sum().backward()
    assert torch.equal(ours.grad, stock.grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    for a, b in ((torch.randn(3, 4), torch.randn(4, 3).t()), (torch.randn(0, 2), torch.randn(0, 2))):
        a, b = a.to(dtype).requires_grad_(), b.to(dtype)
        opcheck(torch.ops.resnet_fast.add_relu.default, (a, b))


def test_compiles_without_graph_breaks():
    a, b = torch.randn(2, 2, 8).unbind()
    compiled = torch.compile(lambda a, b: add_relu(a * 2, b) + 1, fullgraph=True)
    assert torch.equal(compiled(a, b), torch.relu(a * 2 + b) + 1)


def test_autocast():
    a, b = torch.randn(4), torch.randn(4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = add_relu(a, b)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, add_relu_ref(a.bfloat16(), b))


def test_transforms_give_torchs_result():
    a, b = torch.randn(2, 4, 8).unbind()
    assert torch.equal(torch.func.vmap(add_relu)(a, b), add_relu_ref(a, b))
    f, g = (lambda x: add_relu(x, b).sum()), (lambda x: add_relu_ref(x, b).sum())
    assert torch.equal(torch.func.grad(f)(a), torch.func.grad(g)(a))
    assert torch.equal(torch.func.jvp(f, (a,), (a,))[1], torch.func.jvp(g, (a,), (a,))[1])


def test_raw_operator_refuses_forward_mode():
    a, b = torch.randn(2, 8).unbind()
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: torch.ops.resnet_fast.add_relu(x, b), (a,), (a,))


BAD = {
    "shape": (torch.ones(2, 3), torch.ones(3, 2), r"same shape, got \(2, 3\) and \(3, 2\)"),
    "no broadcasting": (torch.ones(2, 3), torch.ones(3), r"same shape"),
    "dtype": (torch.ones(2), torch.ones(2).half(), "same dtype, got torch.float32 and torch.float16"),
    "integers": (torch.ones(2).int(), torch.ones(2).int(), "floating point, got torch.int32"),
    "device": (torch.ones(2), torch.ones(2, device="meta"), "same device, got cpu and meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    a, b, message = BAD[case]
    with pytest.raises(RuntimeError, match=message):
        add_relu(a, b)
    if case != "device":
        with pytest.raises(RuntimeError, match=message):
            add_relu(a.to("meta"), b.to("meta"))


def test_not_a_tensor():
    with pytest.raises((TypeError, RuntimeError)):
        add_relu(torch.ones(2), 1.0)


def test_internal_operator_checks_too():
    with pytest.raises(RuntimeError, match="same shape"):
        torch.ops.resnet_fast._add_relu_cpu(torch.ones(2), torch.ones(3))


def test_from_many_threads():
    from concurrent.futures import ThreadPoolExecutor

    a, b = torch.randn(2, 100_003).unbind()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: add_relu(a, b), range(32)))
    assert all(torch.equal(r, add_relu_ref(a, b)) for r in results)


@pytest.mark.parametrize("threads", (1, 2, 3, 16))
def test_thread_counts(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.randn(2, 200_001).unbind()
        assert torch.equal(add_relu(a, b), add_relu_ref(a, b))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("level", OTHER_LEVELS)
def test_every_other_level(level):
    """This file once more, in a process whose kernels are of one level."""
    assert_passes_at_level(__file__, level, "equals_torch or misaligned or special or every_16 or strides")


def test_unknown_level_is_refused_in_words():
    env = {**os.environ, "RESNET_FAST_CPU_LEVEL": "mmx"}
    code = "import torch, resnet_fast; resnet_fast.ops.add_relu(torch.ones(2), torch.ones(2))"
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode != 0 and "must be portable, avx2, avx512 or avx512_bf16" in result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ("cuda", "triton"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_gpu_equals_torch(n, dtype, backend):
    a, b = torch.randn(2, n + 3, device="cuda").to(dtype).unbind()
    with resnet_fast.use_backend(backend):
        for offset in range(4):
            x, y = a[offset : n + offset], b[: len(a[offset : n + offset])]
            assert torch.equal(add_relu(x, y), add_relu_ref(x, y))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ("cuda", "triton"))
def test_gpu_special_values_and_strides(backend):
    values = torch.tensor([0.0, -1.0, 1.0, float("inf"), float("-inf"), float("nan")], device="cuda")
    a, b = torch.meshgrid(values, values, indexing="ij")
    with resnet_fast.use_backend(backend):
        assert_same_special_values(add_relu(a, b.t()), add_relu_ref(a, b.t()))
