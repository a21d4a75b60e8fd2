from types import SimpleNamespace

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
from torch.library import opcheck
from winograd import LARGEST_ERROR

import resnet_fast
from resnet_fast.bench import layers
from resnet_fast.choose import choose_conv_on_cpu, has_few_channels
from resnet_fast.measure import relative_rms
from resnet_fast.ops import conv_bn_relu, conv_bn_relu_ref
from resnet_fast.ops.conv_bn_relu import conv_pairs
from resnet_fast.ops.weight_cache import packed_weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHANNELS = (1, 3, 7, 8, 9, 15, 16, 17)
VECTORS = ("bias", "bn_weight", "bn_bias", "running_mean", "running_var")


def problem(
    n=2, c=8, k=16, h=9, w=7, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1,
    bias=False, affine=True, residual=False, relu=True, eps=1e-5, dtype=torch.float32, integers=False,
):  # fmt: skip
    """Arguments of conv_bn_relu: (tensors, geometry), random and seeded by the fixture."""

    def values(*shape):
        return torch.randint(-3, 4, shape).float() if integers else torch.randn(shape)

    weight = values(k, c // groups, *kernel)
    if not integers:
        weight /= weight[0].numel() ** 0.5
    geometry = dict(
        stride=list(stride), padding=list(padding), dilation=list(dilation), groups=groups, eps=eps, relu=relu
    )
    tensors = dict(
        input=values(n, c, h, w).to(dtype),
        weight=weight.to(dtype),
        bias=values(k).to(dtype) if bias else None,
        bn_weight=values(k) if affine else None,
        bn_bias=values(k) if affine else None,
        running_mean=values(k),
        running_var=4.0 ** torch.randint(-1, 2, (k,)) if integers else torch.rand(k) + 0.5,
        residual=None,
    )
    if residual:
        shape = conv_bn_relu_ref(*tensors.values(), **geometry).shape
        tensors["residual"] = values(*shape).to(dtype)
    return tensors, geometry


def in_double(tensors):
    return {name: None if t is None else t.double() for name, t in tensors.items()}


def in_channels_last(tensors):
    return {
        name: t.contiguous(memory_format=torch.channels_last) if t is not None and t.dim() == 4 else t
        for name, t in tensors.items()
    }


def winograd_tile(tensors, geometry, output_size):
    """Width of the tiles if Winograd's algorithm runs, else 0."""
    pairs = conv_pairs(*(geometry[name] for name in ("stride", "padding", "dilation")))
    sizes = (tensors["input"].shape, tensors["weight"].shape, output_size)
    has_residual, dtype = tensors["residual"] is not None, tensors["input"].dtype
    return choose_conv_on_cpu(*sizes, *pairs, groups=geometry["groups"], has_residual=has_residual, dtype=dtype).tile


def assert_right(tensors, geometry):
    before = {name: None if t is None else t.clone() for name, t in tensors.items()}
    out = conv_bn_relu(**tensors, **geometry)
    stock = [conv_bn_relu_ref(**t, **geometry) for t in (tensors, in_channels_last(tensors))]
    exact, tile = conv_bn_relu_ref(**in_double(tensors), **geometry), winograd_tile(tensors, geometry, out.shape)
    if tile and out.dtype == torch.float32:
        assert relative_rms(out, exact) <= LARGEST_ERROR[tile]
    else:
        assert_accurate(out, exact, stock)
    expected = torch.empty(out.shape, memory_format=torch.channels_last)
    assert out.stride() == expected.stride()
    assert all(t is None or torch.equal(t, before[name]) for name, t in tensors.items()), "an input was changed"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", CHANNELS)
@pytest.mark.parametrize("c", CHANNELS)
def test_channels(c, k, dtype):
    assert_right(*problem(c=c, k=k, dtype=dtype))


@pytest.mark.parametrize("layer", layers.distinct(layers.MODELS), ids=str)
def test_every_layer_of_the_models(layer):
    size = min(layer.size, 14)  # channels decide what runs; a map of 14 pixels has edges, and is quick
    kernel, stride, padding = ((n, n) for n in (layer.kernel, layer.stride, layer.padding))
    geometry = dict(kernel=kernel, stride=stride, padding=padding, groups=layer.groups, h=size, w=size)
    tail = dict(residual=layer.residual, relu=layer.relu)
    assert_right(*problem(n=1, c=layer.channels, k=layer.filters, **geometry, **tail))


GEOMETRIES = {
    "1x1": dict(kernel=(1, 1), padding=(0, 0)),
    "1x1 stride 2": dict(kernel=(1, 1), padding=(0, 0), stride=(2, 2)),
    "3x3 stride 2": dict(stride=(2, 2)),
    "3x3 odd": dict(h=13, w=11),
    "one pixel": dict(h=1, w=1),
    "one row": dict(h=1, w=17),
    "no padding": dict(padding=(0, 0), h=3, w=3),
    "much padding": dict(padding=(4, 5)),
    "7x7 stem": dict(c=3, k=64, kernel=(7, 7), stride=(2, 2), padding=(3, 3), h=32, w=30),
    "5x5": dict(kernel=(5, 5), padding=(2, 2)),
    "3x1": dict(kernel=(3, 1), padding=(1, 0)),
    "dilated": dict(dilation=(2, 2), padding=(2, 2)),
    "unequal": dict(stride=(2, 1), padding=(0, 2), dilation=(1, 3), h=12, w=15),
    "groups": dict(groups=4, k=16),
    "depthwise": dict(groups=8, k=8),
    "depthwise multiplier": dict(groups=8, k=24),
    "odd groups": dict(c=15, k=9, groups=3),
    "batch 1": dict(n=1),
    "batch 5": dict(n=5),
}
TAILS = {
    "plain": dict(relu=False),
    "relu": dict(),
    "residual": dict(residual=True),
    "residual without relu": dict(residual=True, relu=False),
    "bias": dict(bias=True, residual=True),
    "no affine": dict(affine=False, bias=True),
    "large eps": dict(eps=0.5),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", ("relu", "residual"))
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_geometries(geometry, tail, dtype):
    assert_right(*problem(**GEOMETRIES[geometry], **TAILS[tail], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", TAILS)
def test_tails(tail, dtype):
    assert_right(*problem(**TAILS[tail], dtype=dtype))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_integers_bit_for_bit(geometry, dtype):
    tensors, how = problem(**GEOMETRIES[geometry], bias=True, residual=True, integers=True, eps=0.0, dtype=dtype)
    assert_equal_or_near(conv_bn_relu(**tensors, **how), tensors, how)


def assert_equal_or_near(out, tensors, how):
    """``out`` is exact, but for algorithms with constants that float32 rounds."""
    ref = conv_bn_relu_ref(**in_double(tensors), **how)
    if winograd_tile(tensors, how, ref.shape) > 2:
        assert torch.allclose(out.double(), ref, rtol=0, atol=1e-5 * ref.abs().max().item())
    else:
        assert torch.equal(out.double(), ref)


# What the C++ kernel for few input channels computes: filters around its blocks (8, 16, 32), pixels around its tiles (6,
# 12), kernel rows that meet no pixel, and more rows than one thread gets.
FIRST_LAYERS = {
    "7x7 stem": dict(c=3, k=64, kernel=(7, 7), stride=(2, 2), padding=(3, 3), h=64, w=62),
    "7x7 stem by Winograd": dict(c=3, k=24, kernel=(7, 7), stride=(2, 2), padding=(3, 3), h=113, w=118),
    "3x3": dict(c=3, k=16, h=32, w=32),
    "17 filters, 5 columns": dict(c=1, k=17, w=5),
    "31 filters, 6 columns": dict(c=2, k=31, w=6, bias=True),
    "33 filters, 7 columns": dict(c=4, k=33, w=7, affine=False),
    "12 columns": dict(c=3, k=32, w=12, kernel=(1, 1), padding=(0, 0)),
    "13 columns": dict(c=3, k=24, w=13, kernel=(5, 2), padding=(2, 0)),
    "one pixel": dict(c=3, k=16, h=1, w=1, n=3),
    "more padding than image": dict(c=3, k=16, h=2, w=3, kernel=(7, 7), padding=(6, 5)),
    "rows of padding only": dict(c=3, k=16, h=2, w=9, padding=(4, 4)),
    "unequal": dict(c=3, k=16, h=13, w=14, stride=(1, 3), padding=(2, 0), dilation=(2, 3)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", (True, False))
@pytest.mark.parametrize("layer", FIRST_LAYERS)
def test_first_layers(layer, relu, dtype):
    tensors, how = problem(**FIRST_LAYERS[layer], relu=relu, dtype=dtype)
    assert has_few_channels(tensors["weight"].shape, 1)
    assert (
        layer != "7x7 stem by Winograd" or dtype != torch.float32 or winograd_tile(tensors, how, (2, 24, 57, 59)) == 3
    )
    assert_right(tensors, how)
    assert_right({**tensors, "input": tensors["input"].contiguous(memory_format=torch.channels_last)}, how)
    assert_right({**tensors, "input": tensors["input"].transpose(2, 3).contiguous().transpose(2, 3)}, how)


@pytest.mark.parametrize("layer", FIRST_LAYERS)
def test_first_layers_bit_for_bit(layer):
    tensors, how = problem(**FIRST_LAYERS[layer], integers=True, eps=0.0)
    assert_equal_or_near(conv_bn_relu(**tensors, **how), tensors, how)


@pytest.mark.parametrize("relu", (True, False))
@pytest.mark.parametrize("layer", ("3x3", "7x7 stem by Winograd"))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_first_layer_nan_and_inf(value, layer, relu):
    tensors, how = problem(**FIRST_LAYERS[layer], relu=relu)
    tensors["input"][0, 1, 0, 5] = tensors["input"][1, 2, 31, 31] = value
    ref = conv_bn_relu_ref(**tensors, **how)
    assert not ref.isfinite().all()
    assert_same_special_values(conv_bn_relu(**tensors, **how), ref)


@pytest.mark.parametrize("threads", (1, 2, 3, 16))
@pytest.mark.parametrize("layer", ("7x7 stem", "7x7 stem by Winograd"))
def test_first_layer_thread_counts(layer, threads):
    tensors, how = problem(**FIRST_LAYERS[layer])
    before = torch.get_num_threads()
    out = conv_bn_relu(**tensors, **how)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(conv_bn_relu(**tensors, **how), out)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("level", OTHER_LEVELS)
def test_every_other_level(level):
    assert_passes_at_level(__file__, level, "first_layer")


def test_batch_0():
    tensors, how = problem(n=0, residual=True, c=3, k=5)
    out = conv_bn_relu(**tensors, **how)
    assert out.shape == (0, 5, 9, 7) and out.dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_input_weight_and_residual(layout):
    tensors, how = problem(c=6, k=6, h=8, w=8, residual=True)
    change = LAYOUTS[layout]
    for name in ("input", "weight", "residual"):
        assert_right({**tensors, name: change(tensors[name])}, how)


def test_strided_batch_norm_vectors():
    tensors, how = problem()
    for name in VECTORS[1:]:
        wide = torch.randn(32).abs() + 0.5
        assert_right({**tensors, name: wide[::2]}, how)


@pytest.mark.parametrize("bn_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_norm_of_another_dtype(dtype, bn_dtype):
    tensors, how = problem(dtype=dtype)
    for name in VECTORS[1:]:
        tensors[name] = tensors[name].to(bn_dtype)
    out = conv_bn_relu(**tensors, **how)
    ref = conv_bn_relu_ref(**in_double(tensors), **how)
    stock = F.conv2d(tensors["input"], tensors["weight"], padding=1)
    stock = F.batch_norm(
        stock, *(tensors[v].to(dtype) for v in ("running_mean", "running_var", "bn_weight", "bn_bias"))
    )
    assert out.dtype == dtype
    assert_accurate(out, ref, [torch.relu(stock)])


def test_residual_may_be_the_input():
    tensors, how = problem(c=8, k=8)
    assert_right({**tensors, "residual": tensors["input"]}, how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", (True, False))
@pytest.mark.parametrize("where", ("input", "weight", "residual", *VECTORS[1:]))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_nan_and_inf(value, where, relu, dtype):
    tensors, how = problem(c=3, k=5, residual=True, relu=relu, dtype=dtype)
    tensors[where].view(-1)[tensors[where].numel() // 2] = value
    out, ref = conv_bn_relu(**tensors, **how), conv_bn_relu_ref(**tensors, **how)
    assert_same_special_values(out, ref)
    finite = ref.isfinite()
    assert torch.allclose(out[finite].float(), ref[finite].float(), rtol=8 * UNIT_ROUNDOFF[dtype], atol=0.1)


def test_scale_that_overflows_the_folded_weight():
    tensors, how = problem(eps=0.0)
    tensors["weight"] *= 1e20
    tensors["input"] *= 1e-20
    tensors["bn_weight"] *= 1e25
    tensors["running_var"] *= 1e10
    assert_same_special_values(conv_bn_relu(**tensors, **how), conv_bn_relu_ref(**tensors, **how))
    tensors["running_var"][3] = 0.0
    assert_same_special_values(conv_bn_relu(**tensors, **how), conv_bn_relu_ref(**tensors, **how))


def test_one_number_or_one_element_geometry():
    tensors, how = problem(h=12, w=12)
    pairs = dict(stride=2, padding=1, dilation=1)
    ref = conv_bn_relu(**tensors, **{**how, **{k: [v, v] for k, v in pairs.items()}})
    assert torch.equal(conv_bn_relu(**tensors, **{**how, **pairs}), ref)
    assert torch.equal(conv_bn_relu(**tensors, **{**how, **{k: (v,) for k, v in pairs.items()}}), ref)


GRADIENT_CASES = {
    "all": dict(bias=True, residual=True),
    "no relu": dict(bias=True, relu=False),
    "no affine": dict(affine=False),
    "stride and groups": dict(stride=(2, 1), groups=2, residual=True),
}


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradcheck_twice(case):
    tensors, how = problem(n=1, c=2, k=4, h=4, w=5, **GRADIENT_CASES[case])
    tensors = in_double(tensors)
    names = [n for n, t in tensors.items() if t is not None and not n.startswith("running")]

    def run(*values):
        return conv_bn_relu(**{**tensors, **dict(zip(names, values, strict=True))}, **how)

    values = [tensors[n].requires_grad_() for n in names]
    assert torch.autograd.gradcheck(run, values)
    assert torch.autograd.gradgradcheck(run, values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ("all", "stride and groups"))
def test_gradients_against_float64(case, dtype):
    tensors, how = problem(**GRADIENT_CASES[case], dtype=dtype)
    names = [n for n, t in tensors.items() if t is not None and not n.startswith("running")]
    grad = torch.randn(conv_bn_relu_ref(**tensors, **how).shape).to(dtype)
    # One output for every path: the ReLU's mask must be the same, or flips near zero drown the comparison.
    mask = conv_bn_relu(**tensors, **how) > 0

    def gradients(function, tensors, layout=torch.contiguous_format):
        leaves = {n: tensors[n].detach().clone().requires_grad_() for n in names}
        args = {**tensors, **leaves}
        args["input"] = args["input"].contiguous(memory_format=layout)
        out = function(**args, **{**how, "relu": False})
        out.backward((grad * mask).to(out.dtype))
        return [leaves[n].grad for n in names]

    ref = gradients(conv_bn_relu_ref, in_double(tensors))
    stock = [gradients(conv_bn_relu_ref, tensors, f) for f in (torch.contiguous_format, torch.channels_last)]
    for i, (out, exact) in enumerate(zip(gradients(conv_bn_relu, tensors), ref, strict=True)):
        assert_accurate(out, exact, [s[i] for s in stock])


def test_gradient_through_the_relu_equals_torch():
    tensors, how = problem(integers=True, eps=0.0, residual=True, bias=True)
    results = []
    for function in (conv_bn_relu, conv_bn_relu_ref):
        leaf = tensors["input"].clone().requires_grad_()
        function(**{**tensors, "input": leaf}, **how).sum().backward()
        results.append(leaf.grad)
    assert torch.equal(*results)


def test_running_statistics_get_no_gradient():
    tensors, how = problem()
    for name in ("input", "running_mean", "running_var"):
        tensors[name].requires_grad_()
    conv_bn_relu(**tensors, **how).sum().backward()
    assert tensors["input"].grad is not None
    assert tensors["running_mean"].grad is None and tensors["running_var"].grad is None


def raw(tensors, how):
    """Positional arguments of torch.ops.resnet_fast.conv_bn_relu."""
    order = ("stride", "padding", "dilation", "groups", "eps", "relu")
    return (*tensors.values(), *(how[name] for name in order))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    cases = (
        dict(bias=True, residual=True),
        dict(n=1, c=1, k=1, h=3, w=3, padding=(0, 0)),
        dict(n=0),
        dict(groups=8, k=8),
    )
    for case in cases:
        tensors, how = problem(**case, dtype=dtype)
        tensors["weight"].requires_grad_()
        opcheck(torch.ops.resnet_fast.conv_bn_relu.default, raw(tensors, how))


def test_compiles_without_graph_breaks_with_dynamic_shapes():
    tensors, how = problem(residual=True)
    rest = {n: t for n, t in tensors.items() if n not in ("input", "residual")}
    compiled = torch.compile(lambda x, r: conv_bn_relu(x, **rest, residual=r, **how), fullgraph=True, dynamic=True)
    for n in (2, 5):
        x, r = torch.randn(n, 8, 9, 7), torch.randn(n, 16, 9, 7)
        # Not bit for bit: inductor may hand the operator another layout of x.
        assert torch.allclose(compiled(x, r), conv_bn_relu(x, **rest, residual=r, **how), atol=1e-5)


def test_compiled_graph_obeys_the_switch():
    tensors, how = problem()

    @torch.compile(fullgraph=True)
    def compiled(x):
        return conv_bn_relu(**{**tensors, "input": x}, **how)

    x, ref = tensors["input"], conv_bn_relu_ref(**tensors, **how)
    for backend, packed in ((None, 1), ("reference", 0), (None, 1)):
        resnet_fast.clear_cache()
        with resnet_fast.use_backend(backend):
            assert torch.allclose(compiled(x), ref, atol=1e-5)
        assert len(packed_weights) == packed


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype):
    tensors, how = problem(bias=True, residual=True)
    cast = {n: t.to(dtype) if n in ("input", "weight", "bias", "residual") else t for n, t in tensors.items()}
    with torch.autocast("cpu", dtype):
        out = conv_bn_relu(**tensors, **how)
        again = conv_bn_relu(**tensors, **how)
        double = conv_bn_relu(**in_double(tensors), **how)
    assert out.dtype == dtype and double.dtype == torch.float64
    assert torch.equal(out, conv_bn_relu(**cast, **how)) and torch.equal(out, again)


def test_autocast_keeps_gradients():
    tensors, how = problem()
    tensors["weight"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        conv_bn_relu(**tensors, **how).float().sum().backward()
    assert tensors["weight"].grad.dtype == torch.float32 and tensors["weight"].grad.abs().sum() > 0


def test_autocast_sees_a_changed_weight():
    tensors, how = problem()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        first = conv_bn_relu(**tensors, **how)
        tensors["weight"].data.mul_(2)
        second = conv_bn_relu(**tensors, **how)
    assert not torch.equal(first, second)


def test_transforms_give_torchs_result():
    tensors, how = problem()
    rest = {n: t for n, t in tensors.items() if n != "input"}
    x = tensors["input"]

    def ours(x):
        return conv_bn_relu(x, **rest, **how).sum()

    def stock(x):
        return conv_bn_relu_ref(x, **rest, **how).sum()

    assert torch.equal(torch.func.grad(ours)(x), torch.func.grad(stock)(x))
    assert torch.equal(torch.func.jvp(ours, (x,), (x,))[1], torch.func.jvp(stock, (x,), (x,))[1])
    assert torch.equal(torch.func.vmap(ours)(x[None]), torch.func.vmap(stock)(x[None]))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        tangents = [torch.autograd.forward_ad.unpack_dual(f(dual)).tangent for f in (ours, stock)]
    assert torch.equal(*tangents)


def test_raw_operator_never_returns_zero_derivatives():
    tensors, how = problem()

    def ours(x):
        return torch.ops.resnet_fast.conv_bn_relu(*raw({**tensors, "input": x}, how)).sum()

    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(ours, (tensors["input"],), (tensors["input"],))
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(ours)(tensors["input"])


BAD = {
    "input rank": (dict(input=torch.ones(8, 9, 7)), r"input must have 4 dimensions .* got shape \(8, 9, 7\)"),
    "weight rank": (dict(weight=torch.ones(16, 8, 3)), "weight must have 4 dimensions"),
    "channels": (dict(input=torch.ones(2, 5, 9, 7)), "input must have 8 channels"),
    "groups": (dict(groups=3), "groups must be positive and divide the 16 filters, got 3"),
    "no groups": (dict(groups=0), "groups must be positive"),
    "empty weight": (dict(weight=torch.ones(16, 8, 0, 3)), "weight must not be empty"),
    "weight dtype": (dict(weight=torch.ones(16, 8, 3, 3).half()), "weight must have input's dtype torch.float32, got torch.float16"),
    "bias dtype": (dict(bias=torch.ones(16).double()), "bias must have input's dtype"),
    "integers": (dict(input=torch.ones(2, 8, 9, 7).int()), "input must be floating point, got torch.int32"),
    "integer statistics": (dict(running_mean=torch.ones(16).int()), "running_mean must be floating point"),
    "bias length": (dict(bias=torch.ones(15)), r"bias must have shape \(16,\), one value per filter, got \(15,\)"),
    "variance rank": (dict(running_var=torch.ones(16, 1)), "running_var must have shape"),
    "bn_weight length": (dict(bn_weight=torch.ones(1)), "bn_weight must have shape"),
    "residual shape": (dict(residual=torch.ones(2, 16, 9, 6)), r"residual must have the output's shape \(2, 16, 9, 7\), got \(2, 16, 9, 6\)"),
    "residual dtype": (dict(residual=torch.ones(2, 16, 9, 7).half()), "residual must have input's dtype"),
    "device": (dict(running_var=torch.ones(16, device="meta")), "running_var must be on input's device cpu, got meta"),
    "stride": (dict(stride=[0, 1]), r"stride must be at least 1, got \(0, 1\)"),
    "dilation": (dict(dilation=[1, 0]), "dilation must be at least 1"),
    "padding": (dict(padding=[-1, 0]), "padding must be at least 0"),
    "stride length": (dict(stride=[1, 1, 1]), r"stride must be one number or a sequence of 1 or 2, got \[1, 1, 1\]"),
    "padding length": (dict(padding=[1, 1, 1, 1]), "padding must be one number or a sequence of 1 or 2"),
    "dilation length": (dict(dilation=[]), "dilation must be one number or a sequence of 1 or 2"),
    "kernel too large": (dict(input=torch.ones(2, 8, 1, 1), padding=[0, 0]), "must not be larger than the padded input"),
}  # fmt: skip


def bad_problem(case):
    """Arguments of which one breaks a rule, and the words that say so."""
    tensors, how = problem(bias=True)
    change, message = BAD[case]
    for name, value in change.items():
        (tensors if name in tensors else how)[name] = value
    return tensors, how, message


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    tensors, how, message = bad_problem(case)
    with pytest.raises(RuntimeError, match=message):
        conv_bn_relu(**tensors, **how)
    with pytest.raises(RuntimeError, match=message):  # and the operator itself
        torch.ops.resnet_fast.conv_bn_relu(*raw(tensors, how))
    if case != "device":  # and its fake
        meta = {n: None if t is None else t.to("meta") for n, t in tensors.items()}
        with pytest.raises(RuntimeError, match=message):
            torch.ops.resnet_fast.conv_bn_relu(*raw(meta, how))


def test_forced_backend_refuses_in_words():
    tensors, how = problem()
    with resnet_fast.use_backend("cpu"), pytest.raises(RuntimeError, match="float64 runs on the reference"):
        conv_bn_relu(**in_double(tensors), **how)


def test_reference_backend_is_torch():
    tensors, how = problem(residual=True, bias=True)
    with resnet_fast.use_backend("reference"):
        assert torch.equal(conv_bn_relu(**tensors, **how), conv_bn_relu_ref(**tensors, **how))


def test_mkldnn_switched_off():
    tensors, how = problem()
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(conv_bn_relu(**tensors, **how), conv_bn_relu_ref(**tensors, **how))


def test_many_input_sizes_stay_right():
    """More sizes than are kept packed, twice."""
    tensors, how = problem(n=1)
    for size in list(range(5, 25)) * 2:
        assert_right({**tensors, "input": torch.randn(1, 8, size, size + 1)}, how)


def test_from_many_threads():
    from concurrent.futures import ThreadPoolExecutor

    cases = [SimpleNamespace(args=problem(h=8 + i, w=9)) for i in range(8)]
    for case in cases:
        case.args[0]["weight"] = cases[0].args[0]["weight"]  # one weight under several BatchNorms and sizes
        case.ref = conv_bn_relu_ref(**case.args[0], **case.args[1])

    def run(i):
        case = cases[i % len(cases)]
        return torch.allclose(conv_bn_relu(**case.args[0], **case.args[1]), case.ref, atol=1e-5)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(200)))
