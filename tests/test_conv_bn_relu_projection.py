import sys

import pytest
import torch
import torch.nn.functional as F
from checks import LAYOUTS, assert_accurate, assert_same_special_values, rounded_to_tf32
from test_conv_bn_relu import DTYPES, VECTORS, in_channels_last, in_double, problem, winograd_tile
from test_conv_bn_relu_cuda import GPU_BACKENDS, IN_TF32, on_gpu
from torch.library import opcheck
from winograd import LARGEST_ERROR

import resnet_fast
from resnet_fast import choose
from resnet_fast.measure import relative_rms
from resnet_fast.ops import conv_bn_relu, conv_bn_relu_projection, conv_bn_relu_projection_ref
from resnet_fast.ops.conv_bn_relu_projection import kernel_for
from resnet_fast.ops.weight_cache import packed_weights

BY_NAME = ("stride", "padding", "dilation", "groups", "eps")
OF_SHORTCUT = tuple(f"shortcut_{name}" for name in BY_NAME)
op = torch.ops.resnet_fast.conv_bn_relu_projection
module = sys.modules["resnet_fast.ops.conv_bn_relu_projection"]


def block(n=2, k=16, main=None, shortcut=None, batch_norm=True, **how):
    """Arguments: (tensors, geometry), those of two problems of conv_bn_relu. The shortcut halves a map of 17x13."""
    tensors, geometry = problem(n=n, k=k, **(main or {}), **how)
    halving = dict(c=24, h=17, w=13, kernel=(1, 1), stride=(2, 2), padding=(0, 0))
    other, other_geometry = problem(n=n, k=k, **halving | (shortcut or {}), **how)
    if not batch_norm:
        other |= dict.fromkeys(VECTORS[1:])
    for t, g in ((tensors, geometry), (other, other_geometry)):
        del t["residual"], g["relu"]
    return {**tensors, **of_shortcut(other)}, {**geometry, **of_shortcut(other_geometry)}


def of_shortcut(arguments):
    return {"shortcut" if name == "input" else f"shortcut_{name}": value for name, value in arguments.items()}


def raw(tensors, how):
    """Positional arguments of torch.ops.resnet_fast.conv_bn_relu_projection."""
    return (*tensors.values(), *(how[name] for name in (*BY_NAME, *OF_SHORTCUT)))


def branches(tensors, how):
    """The arguments of the two convolutions, as `conv_bn_relu` calls them."""
    names, values = ("input", "weight", *VECTORS), list(tensors.values())
    main = dict(zip(names, values[:7], strict=True)), {n: how[n] for n in BY_NAME}
    return main, (dict(zip(names, values[7:], strict=True)), {n: how[f"shortcut_{n}"] for n in BY_NAME})


def one_after_the_other(tensors, how):
    (main, geometry), (other, other_geometry) = branches(tensors, how)
    if other["running_mean"] is None:
        conv = {n: other_geometry[n] for n in BY_NAME[:4]}
        residual = F.conv2d(other["input"], other["weight"], other["bias"], **conv)
    else:
        residual = conv_bn_relu(**other, **other_geometry, relu=False)
    return conv_bn_relu(**main, **geometry, residual=residual)


def tiles(tensors, how, size):
    """Widths of Winograd's tiles in both convolutions; 0 where another algorithm runs."""
    found = branches(tensors, how)
    return [winograd_tile({**t, "residual": r}, g, size) for (t, g), r in zip(found, (True, None), strict=True)]


def assert_right(tensors, how):
    before = {name: None if t is None else t.clone() for name, t in tensors.items()}
    out = conv_bn_relu_projection(**tensors, **how)
    stock = [conv_bn_relu_projection_ref(**t, **how) for t in (tensors, in_channels_last(tensors))]
    exact, tile = conv_bn_relu_projection_ref(**in_double(tensors), **how), max(tiles(tensors, how, out.shape))
    if tile and out.dtype == torch.float32:
        assert relative_rms(out, exact) <= LARGEST_ERROR[tile]
    else:
        assert_accurate(out, exact, stock)
    assert torch.equal(out, one_after_the_other(tensors, how))
    assert torch.equal(out, conv_bn_relu_projection(**tensors, **how)), "the second call, which finds packed weights"
    assert out.stride() == torch.empty(out.shape, memory_format=torch.channels_last).stride()
    assert out.stride() == op(*(None if t is None else t.to("meta") for t in tensors.values()), *raw({}, how)).stride()
    assert all(t is None or torch.equal(t, before[name]) for name, t in tensors.items()), "an input was changed"


ONE_BY_ONE = dict(kernel=(1, 1), padding=(0, 0))
CASES = {
    "basic block": dict(main=dict(c=16)),
    "bottleneck": dict(k=64, main=dict(c=16, **ONE_BY_ONE)),
    "first stage": dict(k=64, main=dict(c=16, **ONE_BY_ONE), shortcut=dict(c=16, h=9, w=7, stride=(1, 1))),
    "stride 2 in both": dict(main=dict(stride=(2, 2), h=18, w=13)),
    "3x3 in both": dict(k=17, shortcut=dict(kernel=(3, 3), padding=(1, 1), h=18, w=14)),
    "groups in both": dict(k=12, main=dict(c=8, groups=4), shortcut=dict(groups=2)),
    "depthwise": dict(k=24, main=dict(c=24, groups=24), shortcut=dict(groups=24)),
    "unequal": dict(
        main=dict(stride=(2, 1), padding=(0, 2), dilation=(1, 3), h=19, w=9),
        shortcut=dict(kernel=(2, 3), stride=(2, 1), dilation=(1, 2), h=18, w=11),
    ),
    "one channel": dict(k=5, main=dict(c=1), shortcut=dict(c=1)),
    "images": dict(main=dict(c=3), shortcut=dict(c=3)),
    "one pixel": dict(n=3, main=dict(h=1, w=1), shortcut=dict(h=2, w=1)),
    "batch 1": dict(n=1),
    "bias": dict(bias=True),
    "no affine": dict(affine=False, bias=True),
    "large eps": dict(main=dict(eps=0.5), shortcut=dict(eps=0.25)),
    "without BatchNorm": dict(batch_norm=False),
    "without BatchNorm, bias": dict(bias=True, batch_norm=False),
    "without BatchNorm, groups": dict(k=12, batch_norm=False, shortcut=dict(groups=4, kernel=(3, 3), padding=(1, 1))),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_cases(case, dtype):
    assert_right(*block(**CASES[case], dtype=dtype))


@pytest.mark.parametrize("case", [case for case in CASES if case != "large eps"])
def test_integers_bit_for_bit(case):
    tensors, how = block(**CASES[case], integers=True, eps=0.0)
    out, ref = conv_bn_relu_projection(**tensors, **how), conv_bn_relu_projection_ref(**in_double(tensors), **how)
    if max(tiles(tensors, how, out.shape)) > 2:  # has constants that float32 rounds
        assert torch.allclose(out.double(), ref, rtol=0, atol=1e-5 * ref.abs().max().item())
    else:
        assert torch.equal(out.double(), ref)


def test_float64_runs_on_the_reference():
    tensors, how = block(bias=True)
    out = conv_bn_relu_projection(**in_double(tensors), **how)
    assert torch.equal(out, conv_bn_relu_projection_ref(**in_double(tensors), **how))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", (("bn_weight",), ("shortcut_bn_weight",), ("bn_weight", "shortcut_bn_weight")))
def test_gamma_of_0(zero, dtype):
    """As torchvision's zero_init_residual makes it."""
    tensors, how = block(dtype=dtype)
    for name in zero:
        tensors[name].zero_()
    assert_right(tensors, how)


@pytest.mark.parametrize("batch_norm", (True, False))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_maps_and_weights(layout, batch_norm):
    tensors, how = block(main=dict(c=6), shortcut=dict(c=6, kernel=(3, 3), padding=(1, 1)), batch_norm=batch_norm)
    for name in ("input", "weight", "shortcut", "shortcut_weight"):
        assert_right({**tensors, name: LAYOUTS[layout](tensors[name])}, how)


def test_one_tensor_in_several_places():
    tensors, how = block(main=dict(c=16), shortcut=dict(c=16, h=9, w=7, kernel=(3, 3), padding=(1, 1), stride=(1, 1)))
    assert_right({**tensors, "shortcut": tensors["input"]}, how)
    same = {name: tensors[name.removeprefix("shortcut_")] for name in tensors if name != "shortcut"}
    assert_right({**tensors, **same}, how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ("input", "weight", *VECTORS[1:]))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_special_values(value, where, dtype):
    for batch_norm in (True, False):
        for name in (where, "shortcut" if where == "input" else f"shortcut_{where}"):
            tensors, how = block(dtype=dtype, batch_norm=batch_norm)
            if tensors[name] is None:
                continue
            tensors[name].view(-1)[tensors[name].numel() // 2] = value
            ref = conv_bn_relu_projection_ref(**tensors, **how)
            assert_same_special_values(conv_bn_relu_projection(**tensors, **how), ref)


@pytest.mark.parametrize("batch_norm", (True, False))
def test_batch_0(batch_norm):
    tensors, how = block(n=0, batch_norm=batch_norm)
    assert conv_bn_relu_projection(**tensors, **how).shape == (0, 16, 9, 7)


def test_one_number_geometry_and_defaults():
    tensors, how = block(main=ONE_BY_ONE, shortcut=dict(h=9, w=7, stride=(1, 1)), batch_norm=False)
    ref = conv_bn_relu_projection(**tensors, **how)
    given = [t for name, t in tensors.items() if t is not None and name != "shortcut_bias"]
    given.insert(2, None)  # bias
    assert torch.equal(conv_bn_relu_projection(*given), ref)
    tensors, how = block()
    numbers = dict(padding=1, stride=[1], shortcut_stride=2, shortcut_padding=(0,), shortcut_dilation=1)
    assert torch.equal(conv_bn_relu_projection(**tensors, **numbers), conv_bn_relu_projection(**tensors, **how))


@pytest.mark.parametrize("batch_norm", (True, False))
def test_nothing_goes_stale(batch_norm):
    tensors, how = block(bias=True, batch_norm=batch_norm)
    for t in tensors.values():
        if t is not None:
            before = conv_bn_relu_projection(**tensors, **how)
            t.data.mul_(1.5)
            assert_right(tensors, how)
            assert not torch.equal(conv_bn_relu_projection(**tensors, **how), before)


def test_shares_packed_weights_with_conv_bn_relu():
    tensors, how = block()
    one_after_the_other(tensors, how)
    conv_bn_relu_projection(**tensors, **how)
    assert len(packed_weights) == 2


GRADIENT_CASES = {
    "all": dict(bias=True),
    "no affine, stride and groups": dict(
        affine=False, main=dict(groups=2, stride=(1, 2), w=5), shortcut=dict(groups=2, stride=(2, 1), w=3)
    ),
    "without BatchNorm": dict(batch_norm=False),
    "without BatchNorm, bias and groups": dict(bias=True, batch_norm=False, shortcut=dict(groups=2)),
}


def small(case):
    how = GRADIENT_CASES[case]
    main = dict(c=2, h=2, w=3) | how.get("main", {})
    shortcut = dict(c=2, h=3, w=5) | how.get("shortcut", {})
    return block(**{**how, "n": 1, "k": 4, "main": main, "shortcut": shortcut})


def differentiable(tensors):
    return [n for n, t in tensors.items() if t is not None and "running" not in n]


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradcheck_twice(case):
    tensors, how = small(case)
    tensors = in_double(tensors)
    names = differentiable(tensors)

    def run(*values):
        return conv_bn_relu_projection(**{**tensors, **dict(zip(names, values, strict=True))}, **how)

    values = [tensors[n].requires_grad_() for n in names]
    assert torch.autograd.gradcheck(run, values)
    assert torch.autograd.gradgradcheck(run, values)


def gradients(function, tensors, how, names):
    leaves = {n: tensors[n].clone().requires_grad_() for n in names}
    out = function({**tensors, **leaves}, how)
    out.backward(torch.arange(out.numel()).view_as(out).sin().to(out.dtype))
    return [out, *(leaves[n].grad for n in names)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ("basic block", "groups in both", "no affine", "without BatchNorm, bias"))
def test_gradients_are_those_of_the_two_operators(case, dtype):
    tensors, how = block(**CASES[case], dtype=dtype)
    names = differentiable(tensors)
    ours = gradients(lambda t, how: conv_bn_relu_projection(**t, **how), tensors, how, names)
    apart = gradients(one_after_the_other, tensors, how, names)
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(ours, apart, strict=True))


@pytest.mark.parametrize("batch_norm", (True, False))
def test_each_gradient_alone(batch_norm):
    tensors, how = block(bias=True, batch_norm=batch_norm)
    names = differentiable(tensors)
    together = gradients(lambda t, how: conv_bn_relu_projection(**t, **how), tensors, how, names)[1:]
    for name, grad in zip(names, together, strict=True):
        alone = gradients(lambda t, how: conv_bn_relu_projection(**t, **how), tensors, how, [name])[1]
        assert torch.allclose(alone, grad, rtol=1e-4, atol=1e-4)


def test_gradient_of_a_shared_input():
    tensors, how = block(main=dict(c=16), shortcut=dict(c=16, h=9, w=7, stride=(1, 1)))
    x, results = tensors["input"], []
    for function in (lambda t, how: conv_bn_relu_projection(**t, **how), one_after_the_other):
        leaf = x.clone().requires_grad_()
        function({**tensors, "input": leaf, "shortcut": leaf}, how).square().sum().backward()
        results.append(leaf.grad)
    assert torch.allclose(*results, rtol=1e-5, atol=1e-4)


def test_running_statistics_get_no_gradient():
    tensors, how = block()
    statistics = [name for name in tensors if "running" in name]
    for name in ("input", *statistics):
        tensors[name].requires_grad_()
    conv_bn_relu_projection(**tensors, **how).sum().backward()
    assert tensors["input"].grad is not None and all(tensors[name].grad is None for name in statistics)


def test_what_the_gradient_does_not_need_may_change():
    """As with torch's layers: an optimizer may step before the backward pass is over."""
    for batch_norm, names in ((True, ("bn_bias", "shortcut_bn_bias")), (False, ("bn_bias", "shortcut_bias"))):
        tensors, how = block(bias=True, batch_norm=batch_norm)
        tensors["input"].requires_grad_()
        out = conv_bn_relu_projection(**tensors, **how)
        for name in names:
            tensors[name].add_(1)
        out.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    for case in (dict(bias=True), dict(bias=True, batch_norm=False), dict(n=0), dict(k=1, main=dict(h=1, w=1), shortcut=dict(h=1, w=1))):  # fmt: skip
        tensors, how = block(**case, dtype=dtype)
        tensors["shortcut_weight"].requires_grad_()
        opcheck(op.default, raw(tensors, how))


def test_compiles_without_graph_breaks_with_dynamic_shapes():
    tensors, how = block()
    rest = {n: t for n, t in tensors.items() if n not in ("input", "shortcut")}

    def run(x, shortcut):
        return conv_bn_relu_projection(**{**tensors, **rest, "input": x, "shortcut": shortcut}, **how) + 1

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for n in (2, 5):
        args = torch.randn(n, 8, 9, 7), torch.randn(n, 24, 17, 13)
        assert torch.allclose(compiled(*args), run(*args), atol=1e-5)


def test_compiles_with_gradients():
    tensors, how = block(bias=True)
    names = differentiable(tensors)
    compiled = torch.compile(lambda t: conv_bn_relu_projection(**t, **how), fullgraph=True, backend="aot_eager")
    ours = gradients(lambda t, how: compiled(t), tensors, how, names)
    apart = gradients(one_after_the_other, tensors, how, names)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(ours, apart, strict=True))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("batch_norm", (True, False))
def test_autocast(batch_norm, dtype):
    tensors, how = block(bias=True, batch_norm=batch_norm)
    convolution = [n for n in tensors if "bn" not in n and "running" not in n]
    cast = {n: t.to(dtype) if n in convolution else t for n, t in tensors.items()}
    with torch.autocast("cpu", dtype):
        out = conv_bn_relu_projection(**tensors, **how)
        double = conv_bn_relu_projection(**in_double(tensors), **how)
        tensors["shortcut_weight"].requires_grad_()
        conv_bn_relu_projection(**tensors, **how).float().sum().backward()
    assert out.dtype == dtype and double.dtype == torch.float64
    assert torch.equal(out, conv_bn_relu_projection(**cast, **how))
    grad = tensors["shortcut_weight"].grad
    assert grad.dtype == torch.float32 and grad.abs().sum() > 0


def test_transforms_give_torchs_result():
    for batch_norm in (True, False):
        tensors, how = block(batch_norm=batch_norm)
        x = tensors["shortcut"]

        def ours(x, tensors=tensors, how=how):
            return conv_bn_relu_projection(**{**tensors, "shortcut": x}, **how).sum()

        def stock(x, tensors=tensors, how=how):
            return conv_bn_relu_projection_ref(**{**tensors, "shortcut": x}, **how).sum()

        assert torch.equal(torch.func.grad(ours)(x), torch.func.grad(stock)(x))
        assert torch.equal(torch.func.jvp(ours, (x,), (x,))[1], torch.func.jvp(stock, (x,), (x,))[1])
        assert torch.equal(torch.func.vmap(ours)(x[None]), torch.func.vmap(stock)(x[None]))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(lambda x, t=tensors, how=how: op(*raw({**t, "shortcut": x}, how)), (x,), (x,))


BAD = {
    "input rank": (dict(input=torch.ones(8, 9, 7)), "projection: input must have 4 dimensions"),
    "input channels": (dict(input=torch.ones(2, 5, 9, 7)), "projection: input must have 8 channels"),
    "statistics": (dict(running_var=torch.ones(15)), r"projection: running_var must have shape \(16,\)"),
    "stride": (dict(stride=[0, 1]), r"projection: stride must be at least 1, got \(0, 1\)"),
    "stride length": (dict(stride=[1, 1, 1]), r"projection: stride must be one number or a sequence of 1 or 2, got \[1, 1"),
    "kernel too large": (dict(input=torch.ones(2, 8, 1, 1), padding=[0, 0]), r"the dilated kernel \(3\) .* padded input \(1\) in H"),
    "shortcut rank": (dict(shortcut=torch.ones(24, 17, 13)), r"shortcut must have 4 dimensions .* got shape \(24, 17, 13\)"),
    "shortcut channels": (dict(shortcut=torch.ones(2, 5, 17, 13)), r"shortcut must have 24 channels \(shortcut_weight \(16, 24, 1, 1\), shortcut_groups 1\), got"),
    "shortcut dtype": (dict(shortcut=torch.ones(2, 24, 17, 13).double(), shortcut_weight=torch.ones(16, 24, 1, 1).double(), shortcut_bias=torch.ones(16).double()), "shortcut must have input's dtype torch.float32, got torch.float64"),
    "shortcut device": (dict(shortcut=torch.ones(2, 24, 17, 13, device="meta")), "shortcut_weight must be on shortcut's device meta, got cpu"),
    "shortcut on a device": ({n: torch.ones(s, device="meta") for n, s in dict(shortcut=(2, 24, 17, 13), shortcut_weight=(16, 24, 1, 1), shortcut_bias=16, shortcut_bn_weight=16, shortcut_bn_bias=16, shortcut_running_mean=16, shortcut_running_var=16).items()}, "shortcut must be on input's device cpu, got meta"),
    "shortcut integers": (dict(shortcut=torch.ones(2, 24, 17, 13).int()), "shortcut must be floating point, got torch.int32"),
    "shortcut batch": (dict(shortcut=torch.ones(1, 24, 17, 13)), r"shortcut must become a map of the output's shape \(2, 16, 9, 7\) in its convolution, got \(1, 16, 9, 7\)"),
    "shortcut size": (dict(shortcut=torch.ones(2, 24, 19, 13)), r"output's shape \(2, 16, 9, 7\) in its convolution, got \(2, 16, 10, 7\)"),
    "shortcut filters": ({f"shortcut_{n}": torch.ones(s) for n, s in dict(weight=(1, 24, 1, 1), bias=1, bn_weight=1, bn_bias=1, running_mean=1, running_var=1).items()}, r"output's shape \(2, 16, 9, 7\) in its convolution, got \(2, 1, 9, 7\)"),
    "one pixel": (dict(shortcut=torch.ones(2, 24, 1, 1)), r"output's shape \(2, 16, 9, 7\) in its convolution, got \(2, 16, 1, 1\)"),
    "shortcut weight rank": (dict(shortcut_weight=torch.ones(16, 24, 1)), "shortcut_weight must have 4 dimensions"),
    "shortcut weight dtype": (dict(shortcut_weight=torch.ones(16, 24, 1, 1).half()), "shortcut_weight must have shortcut's dtype torch.float32, got torch.float16"),
    "shortcut weight empty": (dict(shortcut_weight=torch.ones(16, 24, 0, 1)), "shortcut_weight must not be empty"),
    "shortcut bias": (dict(shortcut_bias=torch.ones(15)), r"shortcut_bias must have shape \(16,\), one value per filter, got \(15,\)"),
    "shortcut bias dtype": (dict(shortcut_bias=torch.ones(16).double()), "shortcut_bias must have shortcut's dtype"),
    "shortcut statistics": (dict(shortcut_running_mean=torch.ones(16, 1)), r"shortcut_running_mean must have shape \(16,\)"),
    "shortcut integer statistics": (dict(shortcut_running_var=torch.ones(16).int()), "shortcut_running_var must be floating point"),
    "shortcut bn_weight": (dict(shortcut_bn_weight=torch.ones(1)), "shortcut_bn_weight must have shape"),
    "shortcut stride": (dict(shortcut_stride=[2, 0]), r"shortcut_stride must be at least 1, got \(2, 0\)"),
    "shortcut padding": (dict(shortcut_padding=[-1, 0]), "shortcut_padding must be at least 0"),
    "shortcut dilation": (dict(shortcut_dilation=[0, 1]), "shortcut_dilation must be at least 1"),
    "shortcut padding length": (dict(shortcut_padding=[0, 0, 0]), "shortcut_padding must be one number or a sequence of 1 or 2"),
    "shortcut dilation length": (dict(shortcut_dilation=[]), "shortcut_dilation must be one number or a sequence of 1 or 2"),
    "shortcut groups": (dict(shortcut_groups=3), "shortcut_groups must be positive and divide the 16 filters, got 3"),
    "no groups": (dict(shortcut_groups=0), "shortcut_groups must be positive"),
    "shortcut kernel too large": (dict(shortcut_dilation=[9, 9], shortcut_weight=torch.ones(16, 24, 3, 1)), r"the dilated kernel \(19\) .* padded shortcut \(17\) in H"),
}  # fmt: skip
STATISTICS = {
    "mean alone": (dict(shortcut_running_var=None), "both be given or both be None, got shortcut_running_mean alone"),
    "variance alone": (dict(shortcut_running_mean=None), "both be None, got shortcut_running_var alone"),
    "scale alone": (dict(shortcut_running_mean=None, shortcut_running_var=None, shortcut_bn_bias=None), r"shortcut_bn_weight must be None where .* got shape \(16,\)"),
    "shift alone": (dict(shortcut_running_mean=None, shortcut_running_var=None, shortcut_bn_weight=None), "shortcut_bn_bias must be None where"),
}  # fmt: skip


def assert_refused(tensors, how, message):
    with pytest.raises(RuntimeError, match=message):
        conv_bn_relu_projection(**tensors, **how)
    with pytest.raises(RuntimeError, match=message):  # and the operator itself
        op(*raw(tensors, how))
    if "device" not in message:  # and its fake
        meta = {n: None if t is None else t.to("meta") for n, t in tensors.items()}
        with pytest.raises(RuntimeError, match=message):
            op(*raw(meta, how))


def bad_block(case, known, batch_norm=True):
    """Arguments of which one breaks a rule, and the words that say so. ``known``: weights are packed before."""
    tensors, how = block(bias=True, batch_norm=batch_norm)
    if known:
        conv_bn_relu_projection(**tensors, **how)
    change, message = (BAD | STATISTICS)[case]
    for name, value in change.items():
        if name in how:
            how[name] = value
        elif value is None or tensors[name] is not None:
            tensors[name] = value
    return tensors, how, message


@pytest.mark.parametrize("known", (False, True))
@pytest.mark.parametrize("case", (*BAD, *STATISTICS))
def test_bad_input(case, known):
    """Also where the weights are packed already, so that what fits them is checked no more."""
    assert_refused(*bad_block(case, known))


OF_BATCH_NORM = {"shortcut statistics", "shortcut integer statistics", "shortcut bn_weight"}


@pytest.mark.parametrize("case", [case for case in BAD if case not in OF_BATCH_NORM])
def test_bad_input_without_batch_norm(case):
    assert_refused(*bad_block(case, True, batch_norm=False))


@pytest.mark.parametrize("case", (*BAD, *STATISTICS))
def test_bad_input_on_the_reference(case):
    tensors, how, message = bad_block(case, False)
    with resnet_fast.use_backend("reference"):
        assert_refused(tensors, how, message)


@pytest.mark.parametrize("case", STATISTICS)
def test_bad_statistics_under_a_transform(case):
    tensors, how, message = bad_block(case, False)
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda x: conv_bn_relu_projection(**{**tensors, "input": x}, **how).sum())(tensors["input"])


def test_other_errors_are_their_own(monkeypatch):
    """What the checks find nothing wrong with."""

    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "conv_kernel", fails)
    tensors, how = block()
    with pytest.raises(RuntimeError, match="out of memory"):
        conv_bn_relu_projection(**tensors, **how)


def test_backends():
    for batch_norm in (True, False):
        tensors, how = block(bias=True, batch_norm=batch_norm)
        ref = conv_bn_relu_projection_ref(**tensors, **how)
        with resnet_fast.use_backend("reference"):
            assert torch.equal(conv_bn_relu_projection(**tensors, **how), ref)
        with torch.backends.mkldnn.flags(enabled=False):
            assert torch.equal(conv_bn_relu_projection(**tensors, **how), conv_bn_relu_projection_ref(**tensors, **how))
        with resnet_fast.use_backend("cpu"):
            assert_right(tensors, how)
            with pytest.raises(RuntimeError, match="float64 runs on the reference"):
                conv_bn_relu_projection(**in_double(tensors), **how)


@pytest.fixture
def choice(monkeypatch):
    """Sets the backend that `choose` names for the operator."""

    def set_to(backend):
        monkeypatch.setattr(module, "choose", lambda *_: choose.Choice(backend, "", "stand-in"))

    return set_to


@pytest.mark.parametrize("batch_norm", (True, False))
def test_triton_gets_checked_pairs_and_a_place_for_the_result(monkeypatch, choice, batch_norm):
    pytest.importorskip("triton")
    from resnet_fast.kernels import conv_bn_relu as kernels

    calls = []

    def launcher(*args):
        calls.append(args)
        return args[-1].copy_(conv_bn_relu_projection_ref(*args[:-1]))

    monkeypatch.setattr(kernels, "conv_bn_relu_projection_triton", launcher, raising=False)
    choice("triton")
    tensors, how = block(bias=True, batch_norm=batch_norm)
    ref = conv_bn_relu_projection_ref(**tensors, **how)
    out = conv_bn_relu_projection(**tensors, **{**how, "padding": 1, "shortcut_stride": [2]})
    assert torch.equal(out, ref) and out.is_contiguous(memory_format=torch.channels_last)
    (args,) = calls
    assert all(a is b for a, b in zip(args[:14], tensors.values(), strict=True))
    assert args[14:24] == raw({}, how) and out.data_ptr() == args[24].data_ptr()
    assert conv_bn_relu_projection(**{**tensors, "input": tensors["input"][:0], "shortcut": tensors["shortcut"][:0]}, **how).numel() == 0  # fmt: skip
    for case in ("shortcut size", "stride length", "shortcut padding", "mean alone"):
        bad, how, message = bad_block(case, False)
        with pytest.raises(RuntimeError, match=message):
            conv_bn_relu_projection(**bad, **how)
    assert len(calls) == 1


def test_kernels_in_words(choice):
    tensors, how = block(main=dict(c=16))
    assert all(words.startswith("C++") and ours for words, ours in kernel_for(*raw(tensors, how)))
    plain, plain_how = block(main=dict(c=16), batch_norm=False)
    assert kernel_for(*raw(plain, plain_how))[1] == ("torch", False)
    with resnet_fast.use_backend("reference"):
        assert kernel_for(*raw(tensors, how)) == (("torch", False),) * 2
    choice("triton")
    assert kernel_for(*raw(tensors, how))[0] == ("Triton, with the projection", True)
    assert kernel_for(*raw(*block(**CASES["groups in both"]))) == (("Triton", True),) * 2


def test_choice():
    assert all("conv_bn_relu_projection" in b.operators for b in resnet_fast.backends().values())
    assert "two fused convolutions" in choose.choose("conv_bn_relu_projection", "cpu", torch.float32).reason
    assert choose.choose("conv_bn_relu_projection", "cpu", torch.float64).backend == "reference"
    assert choose.choose("conv_bn_relu_projection", "xpu", torch.float32).backend == "reference"
    assert choose.kernel_name("conv_bn_relu_projection", "cudnn", torch.float32).startswith("cuDNN")
    assert choose.kernel_name("conv_bn_relu_projection", "cuda", torch.float32) == "CUDA C++"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", (None, *GPU_BACKENDS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_gpu_is_right(case, dtype, backend):
    tensors, how = block(**CASES[case], dtype=dtype)
    tensors = on_gpu(tensors)
    with resnet_fast.use_backend(backend):
        out = conv_bn_relu_projection(**tensors, **how)
    stock = [conv_bn_relu_projection_ref(**t, **how) for t in (tensors, in_channels_last(tensors))]
    if backend in IN_TF32 and dtype == torch.float32:
        stock.append(in_tf32(tensors, how))
    assert_accurate(out, conv_bn_relu_projection_ref(**in_double(tensors), **how), stock)
    assert out.stride() == torch.empty(out.shape, memory_format=torch.channels_last).stride()


def in_tf32(tensors, how):
    """The exact result of float32 operands rounded to TF32. (cuDNN computes small problems in full float32.)"""
    names = ("input", "weight", "shortcut", "shortcut_weight")
    rounded = {n: rounded_to_tf32(tensors[n]) for n in names}
    return conv_bn_relu_projection_ref(**in_double({**tensors, **rounded}), **how).float()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", (None, *GPU_BACKENDS))
def test_gpu_inside_a_cuda_graph(backend):
    tensors, how = block(main=dict(c=64), k=64, dtype=torch.bfloat16)
    tensors = on_gpu(tensors)
    with torch.no_grad(), resnet_fast.use_backend(backend):
        conv_bn_relu_projection(**tensors, **how)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = conv_bn_relu_projection(**tensors, **how)
        tensors["input"].normal_()
        tensors["shortcut"].normal_()
        graph.replay()
        assert torch.equal(out, conv_bn_relu_projection(**tensors, **how))


@pytest.mark.gpu
def test_gpu_gradients_are_those_of_the_two_operators():
    for batch_norm in (True, False):
        tensors, how = block(bias=True, batch_norm=batch_norm)
        tensors, names = on_gpu(tensors), differentiable(tensors)
        grad = torch.randn(2, 16, 9, 7, device="cuda")
        results = []
        for function in (lambda t, how: conv_bn_relu_projection(**t, **how), one_after_the_other):
            leaves = {n: tensors[n].clone().requires_grad_() for n in names}
            function({**tensors, **leaves}, how).backward(grad)
            results.append([leaves[n].grad for n in names])
        assert all(relative_rms(a, b) < 1e-3 for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in BAD if "device" not in case])
def test_gpu_bad_input(case):
    tensors, how, message = bad_block(case, False)
    with pytest.raises(RuntimeError, match=message):
        conv_bn_relu_projection(**on_gpu(tensors), **how)
