from itertools import product

import pytest
import torch
from checks import LAYOUTS, assert_accurate, assert_same_special_values
from torch.library import opcheck

import resnet_fast
from resnet_fast.ops import avg_pool_flatten, avg_pool_flatten_ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Around every vector width (4, 8, 16), around four of them, and around the 256 channels that a thread takes at a time.
CHANNELS = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 255, 256, 257, 600)
LEVEL_TESTS = "channels or sizes or nothing"  # with test_max_pool.py, in one process a level
FORMATS = (torch.contiguous_format, torch.channels_last)


def assert_right(x):
    before = x.clone()
    out = avg_pool_flatten(x)
    stock = [avg_pool_flatten_ref(x.contiguous(memory_format=f)) for f in FORMATS]
    assert_accurate(out, avg_pool_flatten_ref(x.double()), stock)
    assert out.is_contiguous() and torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("c", CHANNELS)
def test_channels(c, format, dtype):
    assert_right(torch.randn(3, c, 7, 5).to(dtype).contiguous(memory_format=format))


# Around the vectors of a plane and the runs of 64 pixels (channels_last) or vectors (contiguous).
SIZES = (
    (1, 1),
    (1, 2),
    (3, 5),
    (4, 4),
    (1, 17),
    (7, 7),
    (7, 9),
    (8, 8),
    (5, 13),
    (16, 16),
    (33, 31),
    (40, 26),
    (64, 65),
)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, format, dtype):
    x = torch.randn(2, 21, *size).to(dtype).contiguous(memory_format=format)
    assert_right(x)
    whole = torch.randint(-9, 10, (2, 21, *size)).to(dtype).contiguous(memory_format=format)
    exact = avg_pool_flatten_ref(whole.double()).to(torch.float32 if dtype != torch.float64 else dtype).to(dtype)
    assert torch.equal(avg_pool_flatten(whole), exact)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    assert_right(LAYOUTS[layout](torch.randn(2, 20, 7, 9)))


@pytest.mark.parametrize("shape", ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0), (0, 0, 0, 0)))
@pytest.mark.parametrize("format", FORMATS)
def test_nothing(shape, format):
    x = torch.ones(shape).contiguous(memory_format=format)
    out, ref = avg_pool_flatten(x), avg_pool_flatten_ref(x)
    assert out.shape == ref.shape and torch.equal(out.isnan(), ref.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_special_values(format, dtype):
    x = torch.randn(2, 37, 7, 7).to(dtype)
    nan, inf = float("nan"), float("inf")
    for i, values in enumerate(((nan,), (inf,), (-inf,), (inf, -inf), (nan, inf), (inf, inf))):
        for at in (0, 20, 48 - len(values)):
            x[1, 6 * i + at // 20].view(-1)[at : at + len(values)] = torch.tensor(values).to(dtype)
    largest = torch.finfo(dtype).max
    x[0, 3], x[0, 30] = largest, -largest  # sums that float32, or torch in float32, may not hold
    x = x.contiguous(memory_format=format)
    out, ref = avg_pool_flatten(x), avg_pool_flatten_ref(x)
    assert not ref.isfinite().all() and ref.isnan().any()
    assert_same_special_values(out, ref)
    finite = ref.isfinite()
    assert torch.allclose(out[finite].float(), ref[finite].float(), rtol=2e-2, atol=1e-2)


def test_gradients():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(avg_pool_flatten, x)
    assert torch.autograd.gradgradcheck(avg_pool_flatten, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_equals_torch(dtype):
    grads = []
    for function in (avg_pool_flatten, avg_pool_flatten_ref):
        torch.manual_seed(1)
        leaf = torch.randn(2, 5, 7, 7).to(dtype).requires_grad_()
        function(leaf).backward(torch.randn(2, 5).to(dtype))
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    for x in (torch.randn(2, 5, 3, 4), torch.randn(4, 5, 3, 2).permute(3, 0, 2, 1), torch.randn(0, 3, 2, 2)):
        opcheck(torch.ops.resnet_fast.avg_pool_flatten.default, (x.to(dtype).requires_grad_(),))


def test_compiles_without_graph_breaks_with_dynamic_shapes():
    compiled = torch.compile(lambda x: avg_pool_flatten(x * 2) + 1, fullgraph=True, dynamic=True)
    for n, size in ((2, 9), (5, 12)):
        x = torch.randn(n, 4, size, size)
        assert torch.allclose(compiled(x), avg_pool_flatten_ref(x * 2) + 1, atol=1e-6)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
def test_autocast_keeps_the_dtype_as_torch_does(dtype):
    x = torch.randn(2, 3, 8, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out, ref = avg_pool_flatten(x), avg_pool_flatten_ref(x)
    assert out.dtype == ref.dtype and torch.equal(out, avg_pool_flatten(x))


def test_transforms_give_torchs_result():
    x = torch.randn(2, 3, 8, 8)
    f, g = (lambda x: avg_pool_flatten(x).square().sum()), (lambda x: avg_pool_flatten_ref(x).square().sum())
    assert torch.equal(torch.func.vmap(f)(x[None]), torch.func.vmap(g)(x[None]))
    assert torch.equal(torch.func.grad(f)(x), torch.func.grad(g)(x))
    assert torch.equal(torch.func.jvp(f, (x,), (x,))[1], torch.func.jvp(g, (x,), (x,))[1])


def test_raw_operator_refuses_forward_mode():
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(torch.ops.resnet_fast.avg_pool_flatten, (x,), (x,))


BAD = {
    "rank": (torch.ones(3, 8, 8), r"input must have 4 dimensions .* got shape \(3, 8, 8\)"),
    "integers": (torch.ones(2, 3, 8, 8).int(), "input must be floating point, got torch.int32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    x, message = BAD[case]
    for bad in (x, x.to("meta")):
        with pytest.raises(RuntimeError, match=message):
            avg_pool_flatten(bad)


def test_not_a_tensor():
    with pytest.raises((TypeError, RuntimeError)):
        avg_pool_flatten(1.0)


def test_internal_operator_checks_too():
    with pytest.raises(RuntimeError, match="4 dimensions"):
        torch.ops.resnet_fast._avg_pool_flatten_cpu(torch.ones(3, 8, 8))


def test_backends():
    x = torch.randn(2, 17, 8, 8)
    with resnet_fast.use_backend("reference"):
        assert torch.equal(avg_pool_flatten(x), avg_pool_flatten_ref(x))
    with resnet_fast.use_backend("cpu"):
        assert_right(x)
        with pytest.raises(RuntimeError, match="float64 runs on the reference"):
            avg_pool_flatten(x.double())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("threads", (1, 2, 3, 16))
def test_thread_counts(threads, format):
    x = torch.randn(3, 700, 7, 7).contiguous(memory_format=format)
    before = torch.get_num_threads()
    out = avg_pool_flatten(x)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(avg_pool_flatten(x), out)
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", (None, "cuda"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_is_right(dtype, backend):
    shapes = [(3, c, 7, 5) for c in CHANNELS] + [(2, 21, *size) for size in SIZES]
    with resnet_fast.use_backend(backend):
        for shape, format in product(shapes, FORMATS):
            assert_right(torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=format))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", (None, "cuda"))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_gpu_special_values(value, backend):
    x = torch.randn(3, 19, 7, 7, device="cuda").contiguous(memory_format=torch.channels_last)
    x[1, 4, 3, 3] = value
    with resnet_fast.use_backend(backend):
        assert_same_special_values(avg_pool_flatten(x), avg_pool_flatten_ref(x))
