from itertools import product

import pytest
import test_avg_pool_flatten
import torch
import torch.nn.functional as F
from checks import LAYOUTS, OTHER_LEVELS, assert_passes_at_level, assert_same_special_values
from torch.library import opcheck

import resnet_fast
from resnet_fast.ops import max_pool, max_pool_ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Around every vector width (4, 8, 16) and around four of them, which the kernel takes at a time.
CHANNELS = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 80)
STEM = dict(kernel_size=3, stride=2, padding=1)


def assert_equals_torch(x, **how):
    before = x.clone()
    out, ref = max_pool(x, **how), max_pool_ref(x, **how)
    assert out.dtype == x.dtype and out.shape == ref.shape
    assert torch.equal(out.nan_to_num(), ref.nan_to_num())
    assert_same_special_values(out, ref)
    assert out.stride() == torch.empty(out.shape, memory_format=torch.channels_last).stride()
    assert torch.equal(x.nan_to_num(), before.nan_to_num()), "the input was changed"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", CHANNELS)
def test_equals_torch_bit_for_bit(c, dtype):
    assert_equals_torch(torch.randn(2, c, 9, 7).to(dtype), **STEM)


def outcome(function, *args):
    try:
        return function(*args)
    except RuntimeError:
        return None


@pytest.mark.parametrize("size", (1, 2, 3, 5, 8))
def test_every_geometry_is_torchs(size):
    """Also where torch refuses, where the last window is cut off, and where a window meets nothing but padding."""
    x = torch.randn(2, 5, size, size + 1)
    cases = list(product((0, 1, 2, 3, 4), (0, 1, 2, 3), (-1, 0, 1, 2), (0, 1, 2, 5), (False, True)))
    results = [(outcome(max_pool, x, *case), outcome(F.max_pool2d, x, *case)) for case in cases]
    for case, (out, ref) in zip(cases, results, strict=True):
        assert (out is None) == (ref is None), case
        assert ref is None or torch.equal(out, ref), case
    assert any(ref is not None for _, ref in results)


GEOMETRIES = {
    "stem": dict(STEM, shape=(1, 64, 112, 112)),
    "unequal": dict(shape=(2, 19, 11, 14), kernel_size=(2, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 1)),
    "ceil": dict(STEM, shape=(2, 17, 10, 12), ceil_mode=True),
    "no stride": dict(shape=(2, 6, 8, 9), kernel_size=2),
    "one element": dict(shape=(2, 6, 8, 9), kernel_size=[2], stride=[1], padding=[1], dilation=[2]),
    "stride beyond the kernel": dict(shape=(2, 6, 9, 9), kernel_size=2, stride=4),
    "one pixel": dict(shape=(3, 17, 1, 1), kernel_size=1),
    "one pixel padded": dict(STEM, shape=(3, 17, 1, 1)),
    "one channel": dict(STEM, shape=(1, 1, 5, 6)),
    "global": dict(shape=(2, 33, 7, 7), kernel_size=7),
    "nothing but padding": dict(shape=(1, 18, 4, 4), kernel_size=2, stride=1, padding=1, dilation=5),
    "batch 0": dict(STEM, shape=(0, 3, 8, 8)),
}


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
@pytest.mark.parametrize("case", GEOMETRIES)
def test_geometries(case, dtype):
    how = dict(GEOMETRIES[case])
    assert_equals_torch(torch.randn(how.pop("shape")).to(dtype), **how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, dtype):
    assert_equals_torch(LAYOUTS[layout](torch.randn(2, 20, 9, 10)).to(dtype), **STEM)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", (3, 21, 64))
def test_special_values(c, dtype):
    """NaN and infinities at every place of a window, in every channel, and windows of -inf and of zeros of both signs."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), -65504.0, 6e-8])
    x = values[torch.randint(len(values), (4, c, 24, 23))].to(dtype)
    x[:, :, :5] = float("-inf")
    assert_equals_torch(x, **STEM)
    few = torch.randn(4, c, 24, 23).to(dtype)
    few.view(-1)[torch.randint(few.numel(), (few.numel() // 40,))] = float("nan")
    few.view(-1)[torch.randint(few.numel(), (few.numel() // 40,))] = float("inf")
    assert_equals_torch(few, **STEM)
    zeros = torch.zeros(2, c, 8, 8).where(torch.rand(2, c, 8, 8) < 0.5, -0.0).to(dtype)
    assert torch.equal(max_pool(zeros, 2).signbit(), max_pool_ref(zeros, 2).signbit())


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_every_16_bit_value(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert_equals_torch(x[torch.randperm(len(x))].view(4, 64, 16, 16), kernel_size=1)
    assert_equals_torch(x[torch.randperm(len(x))].view(4, 64, 16, 16), **STEM)


def test_gradients():
    x = torch.randperm(2 * 3 * 5 * 6).view(2, 3, 5, 6).double().requires_grad_()
    for how in (STEM, dict(kernel_size=2, dilation=2), dict(kernel_size=3, stride=3, ceil_mode=True)):
        assert torch.autograd.gradcheck(lambda x, how=how: max_pool(x, **how), x)
        assert torch.autograd.gradgradcheck(lambda x, how=how: max_pool(x, **how), x)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_equals_torch(dtype, layout):
    x = torch.randint(-2, 3, (2, 17, 9, 8)).to(dtype)  # many equal values
    x[0, 0, 4, 4] = float("nan")
    x = LAYOUTS["channels_last"](x) if layout == "channels_last" else x
    grads = []
    for function in (max_pool, max_pool_ref):
        leaf = x.clone().requires_grad_()
        out = function(leaf, **STEM)
        out.backward(torch.arange(out.numel()).view_as(out).to(dtype))
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_gradient_of_a_window_of_padding():
    """Torch's index of such an output lies outside the map: nothing may be written there."""
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    out = max_pool(x, 2, 1, 1, 5)
    assert out.isneginf().all()
    out.backward(torch.full_like(out, float("nan")))
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    pairs = ([3, 3], [2, 2], [1, 1], [1, 1])
    for shape, ceil_mode in (((2, 5, 8, 7), False), ((1, 1, 1, 1), True), ((0, 3, 8, 8), False)):
        x = torch.randn(shape).to(dtype).requires_grad_()
        opcheck(torch.ops.resnet_fast.max_pool.default, (x, *pairs, ceil_mode))


def test_compiles_without_graph_breaks_with_dynamic_shapes():
    compiled = torch.compile(lambda x: max_pool(x * 2, 3, 2, 1), fullgraph=True, dynamic=True, backend="aot_eager")
    for n, size in ((2, 9), (5, 12)):
        x = torch.randn(n, 4, size, size)
        assert torch.equal(compiled(x), max_pool_ref(x * 2, 3, 2, 1))


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
def test_autocast_keeps_the_dtype_as_torch_does(dtype):
    x = torch.randn(2, 3, 8, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out, ref = max_pool(x, 2), max_pool_ref(x, 2)
    assert out.dtype == ref.dtype and torch.equal(out, ref)


def test_transforms_give_torchs_result():
    x = torch.randn(2, 3, 8, 8)
    f, g = (lambda x: max_pool(x, 3, 2, 1).sum()), (lambda x: max_pool_ref(x, 3, 2, 1).sum())
    assert torch.equal(torch.func.vmap(f)(x[None]), torch.func.vmap(g)(x[None]))
    assert torch.equal(torch.func.grad(f)(x), torch.func.grad(g)(x))
    assert torch.equal(torch.func.jvp(f, (x,), (x,))[1], torch.func.jvp(g, (x,), (x,))[1])


def test_raw_operator_refuses_forward_mode():
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: torch.ops.resnet_fast.max_pool(x, 2, 2, 0, 1, False), (x,), (x,))


X = torch.ones(2, 3, 8, 8)
BAD = {
    "rank": (dict(input=torch.ones(3, 8, 8)), r"input must have 4 dimensions .* got shape \(3, 8, 8\)"),
    "integers": (dict(input=X.int()), "input must be floating point, got torch.int32"),
    "no channels": (dict(input=X[:, :0]), r"must not be empty but for its batch, got shape \(2, 0, 8, 8\)"),
    "no rows": (dict(input=X[:, :, :0]), "must not be empty but for its batch"),
    "kernel_size": (dict(kernel_size=[0, 2]), r"kernel_size must be at least 1, got \(0, 2\)"),
    "stride": (dict(stride=[1, 0]), "stride must be at least 1"),
    "padding": (dict(padding=[-1, 0]), "padding must be at least 0"),
    "dilation": (dict(dilation=[1, 0]), "dilation must be at least 1"),
    "much padding": (dict(padding=[2, 1]), r"padding must be at most half of kernel_size \(3, 3\), got \(2, 1\)"),
    "kernel too large": (dict(kernel_size=[9, 3]), r"dilated \(9\), must not be larger than the padded map \(8\) in H"),
    "kernel length": (dict(kernel_size=[3, 3, 3]), r"kernel_size must be one number or a sequence of 1 or 2, got \[3,"),
    "stride length": (dict(stride=[]), "stride must be one number or a sequence of 1 or 2"),
    "padding length": (dict(padding=[1, 1, 1]), "padding must be one number or a sequence of 1 or 2"),
    "dilation length": (dict(dilation=[1, 1, 1]), "dilation must be one number or a sequence of 1 or 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, message = BAD[case]
    args = dict(input=X, kernel_size=[3, 3], stride=[2, 2], padding=[0, 0], dilation=[1, 1], ceil_mode=False) | change
    with pytest.raises(RuntimeError, match=message):
        max_pool(**args)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.resnet_fast.max_pool(*args.values())
    with pytest.raises(RuntimeError, match=message):
        torch.ops.resnet_fast.max_pool(args.pop("input").to("meta"), *args.values())


def test_internal_operator_checks_too():
    with pytest.raises(RuntimeError, match="4 dimensions"):
        torch.ops.resnet_fast._max_pool_cpu(torch.ones(3, 8, 8), 2, 2, 0, 1, [4, 4])


def test_backends():
    x = torch.randn(2, 17, 8, 8)
    for backend in ("reference", "cpu"):
        with resnet_fast.use_backend(backend):
            assert torch.equal(max_pool(x, 3, 2, 1), max_pool_ref(x, 3, 2, 1))
    with resnet_fast.use_backend("cpu"), pytest.raises(RuntimeError, match="float64 runs on the reference"):
        max_pool(x.double(), 2)


@pytest.mark.parametrize("threads", (1, 2, 3, 16))
def test_thread_counts(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(3, 64, 37, 40)
        assert torch.equal(max_pool(x, 3, 2, 1), max_pool_ref(x, 3, 2, 1))
    finally:
        torch.set_num_threads(before)


def test_from_many_threads():
    from concurrent.futures import ThreadPoolExecutor

    x = torch.randn(2, 64, 40, 40)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: max_pool(x, 3, 2, 1), range(32)))
    ref = max_pool_ref(x, 3, 2, 1)
    assert all(torch.equal(r, ref) for r in results)


@pytest.mark.parametrize("level", OTHER_LEVELS)
def test_every_other_level(level):
    """This file and that of the other pooling once more, in a process whose kernels are of one level."""
    tests = f"equals_torch or special or every_16 or geometries or strides or {test_avg_pool_flatten.LEVEL_TESTS}"
    assert_passes_at_level([__file__, test_avg_pool_flatten.__file__], level, tests)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", (None, "cuda"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_gpu_equals_torch(geometry, dtype, backend):
    how = dict(GEOMETRIES[geometry])
    x = torch.randn(how.pop("shape"), device="cuda").to(dtype)
    x.view(-1)[::50] = float("nan")
    with resnet_fast.use_backend(backend):
        for format in (torch.channels_last, torch.contiguous_format):
            assert_equals_torch(x.contiguous(memory_format=format), **how)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", (None, "cuda"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_channels(dtype, backend):
    with resnet_fast.use_backend(backend):
        for c in CHANNELS:
            assert_equals_torch(torch.randn(2, c, 9, 7, device="cuda").to(dtype), **STEM)
