import pytest
import torch
from checks import LAYOUTS, OTHER_LEVELS, assert_accurate, assert_passes_at_level, assert_same_special_values
from test_conv_bn_relu import VECTORS, in_channels_last, in_double, problem, winograd_tile
from torch.library import opcheck
from winograd import LARGEST_ERROR

import resnet_fast
from resnet_fast.kernels.packing import pack_few_channels
from resnet_fast.measure import relative_rms
from resnet_fast.ops import conv_bn_relu, conv_bn_relu_max_pool, conv_bn_relu_max_pool_ref, max_pool
from resnet_fast.ops.conv_bn_relu_max_pool import kernel_for
from resnet_fast.ops.weight_cache import packed_weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POOL = dict(pool_kernel_size=[3, 3], pool_stride=[2, 2], pool_padding=[1, 1])
STEM = dict(c=3, k=64, kernel=(7, 7), stride=(2, 2), padding=(3, 3))
BY_NAME = ("stride", "padding", "dilation", "groups", "eps")


def stem(pool=POOL, **how):
    """Arguments: (tensors, geometry), as `problem` makes them for conv_bn_relu."""
    tensors, geometry = problem(**how)
    del tensors["residual"], geometry["relu"]
    return tensors, {**geometry, **pool}


def raw(tensors, how):
    """Positional arguments of torch.ops.resnet_fast.conv_bn_relu_max_pool."""
    return (*tensors.values(), *(how[name] for name in (*BY_NAME, *POOL)))


def one_after_the_other(tensors, how):
    out = conv_bn_relu(**tensors, residual=None, **{name: how[name] for name in BY_NAME})
    return max_pool(out, *(how[name] for name in POOL))


def winograd_tile_of(tensors, how):
    return winograd_tile({**tensors, "residual": None}, how, one_after_the_other(tensors, {**how, **NO_POOL}).shape)


def assert_right(tensors, how):
    before = {name: None if t is None else t.clone() for name, t in tensors.items()}
    out = conv_bn_relu_max_pool(**tensors, **how)
    stock = [conv_bn_relu_max_pool_ref(**t, **how) for t in (tensors, in_channels_last(tensors))]
    exact, tile = conv_bn_relu_max_pool_ref(**in_double(tensors), **how), winograd_tile_of(tensors, how)
    if tile and out.dtype == torch.float32:
        assert relative_rms(out, exact) <= LARGEST_ERROR[tile]
    else:
        assert_accurate(out, exact, stock)
    assert torch.equal(out, one_after_the_other(tensors, how))
    assert torch.equal(out, conv_bn_relu_max_pool(**tensors, **how)), "the second call, which finds packed weights"
    assert out.stride() == torch.empty(out.shape, memory_format=torch.channels_last).stride()
    assert all(t is None or torch.equal(t, before[name]) for name, t in tensors.items()), "an input was changed"


def pool(kernel_size, stride, padding):
    return dict(pool_kernel_size=list(kernel_size), pool_stride=list(stride), pool_padding=list(padding))


NO_POOL = pool((1, 1), (1, 1), (0, 0))

# Filters around the blocks (8, 16, 32) and vectors of four levels; bands of output rows; windows that step over rows of
# the map or keep many of them.
FUSED = {
    "stem": dict(**STEM, h=64, w=62),
    "stem by Winograd": dict(**STEM, h=114, w=117),
    "batch 5": dict(**STEM, n=5, h=36, w=38),
    "17 filters": dict(c=1, k=17, w=5),
    "31 filters": dict(c=2, k=31, w=6, bias=True),
    "33 filters": dict(c=4, k=33, w=7, affine=False),
    "one pixel": dict(c=3, k=16, h=1, w=1, n=3),
    "unequal": dict(c=3, k=24, h=21, w=14, pool=pool((2, 3), (1, 2), (1, 0))),
    "steps over rows": dict(c=3, k=16, h=23, w=23, pool=pool((2, 2), (5, 4), (0, 1))),
    "keeps many rows": dict(c=3, k=16, h=23, w=23, pool=pool((7, 5), (1, 1), (3, 2))),
    "global": dict(c=3, k=16, h=8, w=9, pool=pool((8, 9), (8, 9), (0, 0))),
    "no pooling": dict(c=3, k=16, h=8, w=9, pool=NO_POOL),
    "3x3, rows of padding only": dict(c=3, k=16, h=2, w=9, padding=(4, 4)),
}
# The kernel for few channels does not take these.
UNFUSED = {
    "many channels": dict(c=8, k=16, kernel=(5, 5), padding=(2, 2)),
    "groups": dict(c=4, k=16, groups=2),
    "few filters": dict(c=3, k=5),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", FUSED)
def test_fused_cases(case, dtype):
    tensors, how = stem(**FUSED[case], dtype=dtype)
    if dtype == torch.float32:
        assert "max-pooling in the same pass" in kernel_for(*raw(tensors, how))[0]
    assert_right(tensors, how)
    assert_right({**tensors, "input": LAYOUTS["channels_last"](tensors["input"])}, how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", UNFUSED)
def test_unfused_cases(case, dtype):
    tensors, how = stem(**UNFUSED[case], dtype=dtype)
    assert "max-pooling" not in kernel_for(*raw(tensors, how))[0]
    assert_right(tensors, how)


@pytest.mark.parametrize("case", (*FUSED, *UNFUSED))
def test_integers_bit_for_bit(case):
    tensors, how = stem(**(FUSED | UNFUSED)[case], integers=True, eps=0.0)
    ref = conv_bn_relu_max_pool_ref(**in_double(tensors), **how)
    out = conv_bn_relu_max_pool(**tensors, **how).double()
    if winograd_tile_of(tensors, how):  # has constants that float32 rounds
        assert torch.allclose(out, ref, rtol=0, atol=1e-5 * ref.abs().max().item())
    else:
        assert torch.equal(out, ref)


def test_float64_runs_on_the_reference():
    tensors, how = stem(**FUSED["17 filters"])
    out = conv_bn_relu_max_pool(**in_double(tensors), **how)
    assert torch.equal(out, conv_bn_relu_max_pool_ref(**in_double(tensors), **how))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_kernel_reads_and_writes_every_type(dtype):
    """Whatever `choose` sends to it."""
    x = torch.randn(2, 3, 20, 33).to(dtype)
    packed, bias = pack_few_channels(torch.randn(37, 3, 5, 5) / 9, [1, 1], False), torch.randn(37)
    geometry = ([2, 1], [2, 2], [1, 1])
    out = torch.ops.resnet_fast._conv_few_channels_max_pool(x, packed, bias, *geometry, [3, 3], [2, 2], [1, 1])
    apart = torch.ops.resnet_fast._conv_few_channels(x, packed, bias, *geometry, True)
    assert out.dtype == dtype and torch.equal(out, max_pool(apart, 3, 2, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_input_and_weight(layout):
    tensors, how = stem(c=3, k=16, h=12, w=12)
    for name in ("input", "weight"):
        assert_right({**tensors, name: LAYOUTS[layout](tensors[name])}, how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ("input", "weight", *VECTORS[1:]))
@pytest.mark.parametrize("layer", (dict(c=3, k=40, h=32, w=30), dict(**STEM, h=112, w=113)), ids=("3x3", "stem"))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_special_values(value, layer, where, dtype):
    tensors, how = stem(**layer, dtype=dtype)
    tensors[where].view(-1)[tensors[where].numel() // 2] = value
    ref = conv_bn_relu_max_pool_ref(**tensors, **how)
    assert_same_special_values(conv_bn_relu_max_pool(**tensors, **how), ref)
    assert_same_special_values(one_after_the_other(tensors, how), ref)


def test_batch_0():
    tensors, how = stem(**STEM, n=0, h=32, w=32)
    assert conv_bn_relu_max_pool(**tensors, **how).shape == (0, 64, 8, 8)


def test_one_number_geometry_and_defaults():
    tensors, how = stem(**STEM, h=40, w=44)
    ref = conv_bn_relu_max_pool(**tensors, **how)
    assert torch.equal(conv_bn_relu_max_pool(*tensors.values(), stride=2, padding=3), ref)
    how = dict(stride=2, padding=[3], pool_kernel_size=2, pool_stride=None, pool_padding=[0])
    out = conv_bn_relu_max_pool(**tensors, **how)
    assert torch.equal(out, max_pool(conv_bn_relu(**tensors, residual=None, stride=2, padding=3), 2))


def test_shares_packed_weights_with_conv_bn_relu():
    tensors, how = stem(**STEM, h=32, w=32)
    one_after_the_other(tensors, how)
    conv_bn_relu_max_pool(**tensors, **how)
    conv_bn_relu_max_pool(**tensors, **{**how, **pool((2, 2), (2, 2), (0, 0))})
    assert len(packed_weights) == 1


CHANGES = {
    "in place": lambda t: t.mul_(1.5),
    "through .data": lambda t: t.data.mul_(1.5),
    "one statistic": lambda t: t.data.view(-1)[-1:].add_(1),
}


# A single element of a weight is not noticed: see clear_cache.
NOTICED = [(n, c) for n in ("weight", *VECTORS[1:]) for c in CHANGES if (n, c) != ("weight", "one statistic")]


@pytest.mark.parametrize(("name", "change"), NOTICED)
def test_nothing_goes_stale(name, change):
    tensors, how = stem(c=3, k=16, h=16, w=16)
    first = conv_bn_relu_max_pool(**tensors, **how)
    CHANGES[change](tensors[name])
    assert_right(tensors, how)
    assert not torch.equal(conv_bn_relu_max_pool(**tensors, **how), first)


GRADIENT_CASES = {
    "all": dict(bias=True),
    "no affine": dict(affine=False),
    "stride and groups": dict(stride=(2, 1), groups=2),
    "overlapping windows": dict(pool=pool((2, 3), (1, 1), (1, 1)), bias=True),
}


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradcheck_twice(case):
    tensors, how = stem(n=1, c=2, k=4, h=5, w=6, **GRADIENT_CASES[case])
    tensors = in_double(tensors)
    names = [n for n, t in tensors.items() if t is not None and not n.startswith("running")]

    def run(*values):
        return conv_bn_relu_max_pool(**{**tensors, **dict(zip(names, values, strict=True))}, **how)

    values = [tensors[n].requires_grad_() for n in names]
    assert torch.autograd.gradcheck(run, values)
    assert torch.autograd.gradgradcheck(run, values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ("stem", "unequal"))
def test_gradients_are_those_of_the_two_operators(case, dtype):
    tensors, how = stem(**FUSED[case], dtype=dtype)
    names = [n for n, t in tensors.items() if t is not None and not n.startswith("running")]
    results = []
    for function in (lambda t, how: conv_bn_relu_max_pool(**t, **how), one_after_the_other):
        leaves = {n: tensors[n].clone().requires_grad_() for n in names}
        out = function({**tensors, **leaves}, how)
        out.backward(torch.arange(out.numel()).view_as(out).sin().to(dtype))
        results.append([leaves[n].grad for n in names])
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(*results, strict=True))


def test_running_statistics_get_no_gradient():
    tensors, how = stem(c=3, k=16)
    for name in ("input", "running_mean", "running_var"):
        tensors[name].requires_grad_()
    conv_bn_relu_max_pool(**tensors, **how).sum().backward()
    assert tensors["input"].grad is not None
    assert tensors["running_mean"].grad is None and tensors["running_var"].grad is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    for case in (dict(c=3, k=16, bias=True), dict(c=8, k=16), dict(c=3, k=16, n=0)):
        tensors, how = stem(**case, dtype=dtype)
        tensors["weight"].requires_grad_()
        opcheck(torch.ops.resnet_fast.conv_bn_relu_max_pool.default, raw(tensors, how))


def test_compiles_without_graph_breaks():
    tensors, how = stem(c=3, k=16)
    rest = {n: t for n, t in tensors.items() if n != "input"}
    compiled = torch.compile(lambda x: conv_bn_relu_max_pool(x, **rest, **how) + 1, fullgraph=True)
    assert torch.allclose(compiled(tensors["input"]), conv_bn_relu_max_pool(**tensors, **how) + 1, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype):
    tensors, how = stem(c=3, k=16, bias=True)
    cast = {n: t.to(dtype) if n in ("input", "weight", "bias") else t for n, t in tensors.items()}
    with torch.autocast("cpu", dtype):
        out = conv_bn_relu_max_pool(**tensors, **how)
        double = conv_bn_relu_max_pool(**in_double(tensors), **how)
    assert out.dtype == dtype and double.dtype == torch.float64
    assert torch.equal(out, conv_bn_relu_max_pool(**cast, **how))


def test_transforms_give_torchs_result():
    tensors, how = stem(c=3, k=16)
    rest = {n: t for n, t in tensors.items() if n != "input"}
    x = tensors["input"]

    def ours(x):
        return conv_bn_relu_max_pool(x, **rest, **how).sum()

    def stock(x):
        return conv_bn_relu_max_pool_ref(x, **rest, **how).sum()

    assert torch.equal(torch.func.grad(ours)(x), torch.func.grad(stock)(x))
    assert torch.equal(torch.func.jvp(ours, (x,), (x,))[1], torch.func.jvp(stock, (x,), (x,))[1])
    assert torch.equal(torch.func.vmap(ours)(x[None]), torch.func.vmap(stock)(x[None]))
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(
            lambda x: torch.ops.resnet_fast.conv_bn_relu_max_pool(*raw({**tensors, "input": x}, how)), (x,), (x,)
        )


BAD = {
    "input rank": (dict(input=torch.ones(3, 9, 7)), "input must have 4 dimensions"),
    "channels": (dict(input=torch.ones(2, 5, 9, 7)), "input must have 3 channels"),
    "statistics": (dict(running_var=torch.ones(15)), r"running_var must have shape \(16,\)"),
    "stride": (dict(stride=[0, 1]), r"stride must be at least 1, got \(0, 1\)"),
    "pool kernel": (dict(pool_kernel_size=[0, 3]), r"pool_kernel_size must be at least 1, got \(0, 3\)"),
    "pool stride": (dict(pool_stride=[2, 0]), "pool_stride must be at least 1"),
    "pool padding": (dict(pool_padding=[2, 0]), r"pool_padding must be at most half of pool_kernel_size \(3, 3\)"),
    "negative padding": (dict(pool_padding=[-1, 0]), "pool_padding must be at least 0"),
    "pool too large": (dict(pool_kernel_size=[3, 12]), r"pool_kernel_size, dilated \(12\), .* padded map \(9\) in W"),
    "pool length": (dict(pool_stride=[1, 1, 1]), r"pool_stride must be one number or a sequence of 1 or 2, got \[1, 1"),
}


@pytest.mark.parametrize("known", (False, True))
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, known):
    """Also where the convolution's weight is packed already, so that its own arguments are checked no more."""
    tensors, how = stem(c=3, k=16, bias=True)
    if known:
        conv_bn_relu_max_pool(**tensors, **how)
    change, message = BAD[case]
    for name, value in change.items():
        (tensors if name in tensors else how)[name] = value
    with pytest.raises(RuntimeError, match=message):
        conv_bn_relu_max_pool(**tensors, **how)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.resnet_fast.conv_bn_relu_max_pool(*raw(tensors, how))
    meta = {n: t.to("meta") for n, t in tensors.items()}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.resnet_fast.conv_bn_relu_max_pool(*raw(meta, how))


def test_backends():
    tensors, how = stem(c=3, k=16)
    ref = conv_bn_relu_max_pool_ref(**tensors, **how)
    with resnet_fast.use_backend("reference"):
        assert torch.equal(conv_bn_relu_max_pool(**tensors, **how), ref)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.allclose(conv_bn_relu_max_pool(**tensors, **how), ref, atol=1e-5)
    with resnet_fast.use_backend("cpu"):
        assert_right(tensors, how)
        with pytest.raises(RuntimeError, match="float64 runs on the reference"):
            conv_bn_relu_max_pool(**in_double(tensors), **how)


@pytest.mark.parametrize("threads", (1, 2, 3, 16))
@pytest.mark.parametrize("n", (1, 4))
def test_thread_counts(threads, n):
    tensors, how = stem(**STEM, n=n, h=64, w=62)
    before = torch.get_num_threads()
    out = conv_bn_relu_max_pool(**tensors, **how)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(conv_bn_relu_max_pool(**tensors, **how), out)
    finally:
        torch.set_num_threads(before)


def test_from_many_threads():
    from concurrent.futures import ThreadPoolExecutor

    cases = [stem(c=3, k=16, h=16 + i, w=20) for i in range(12)]  # more sizes than are kept packed
    for tensors, _ in cases:
        tensors["weight"] = cases[0][0]["weight"]
    refs = [conv_bn_relu_max_pool_ref(**tensors, **how) for tensors, how in cases]

    def run(i):
        tensors, how = cases[i % len(cases)]
        return torch.allclose(conv_bn_relu_max_pool(**tensors, **how), refs[i % len(cases)], atol=1e-5)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(200)))


@pytest.mark.parametrize("level", OTHER_LEVELS)
def test_every_other_level(level):
    assert_passes_at_level(__file__, level, "test_fused or special or integers")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_is_right(dtype):
    tensors, how = stem(**STEM, h=64, w=62, dtype=dtype)
    tensors = {n: None if t is None else t.cuda() for n, t in tensors.items()}
    stock = [conv_bn_relu_max_pool_ref(**t, **how) for t in (tensors, in_channels_last(tensors))]
    ref = conv_bn_relu_max_pool_ref(**in_double(tensors), **how)
    assert_accurate(conv_bn_relu_max_pool(**tensors, **how), ref, stock)
