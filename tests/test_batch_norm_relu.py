"""batch_norm_statistics, batch_norm_relu, batch_norm_relu_projection and update_running_stats_, on the CPU."""

import copy
import math
import os

import pytest
import torch
from batch_norm import (
    CHANNELS,
    DTYPES,
    MODES,
    assert_exact,
    assert_right,
    assert_statistics_are_right,
    integer_case,
    random_case,
    random_map,
)
from checks import LAYOUTS, OTHER_LEVELS, assert_passes_at_level
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import resnet_fast
from resnet_fast import ops
from resnet_fast.ops.arguments import pack_bits, unpack_bits

# More pixels than are summed at a time, and than a chunk has; blocks of channels.
LARGE = {"many pixels": (2, 24, 70, 67), "many channels": (3, 520, 7, 7), "two chunks": (1, 17, 5, 13)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_kernels_right_for_all_channels(mode, dtype):
    for c in CHANNELS:
        assert_right(random_case(mode, (2, c, 5, 7), dtype))


@pytest.mark.parametrize("mode", MODES)
def test_kernels_right_without_affine(mode):
    for c in (1, 16, 33):
        assert_right(random_case(mode, (2, c, 5, 7), affine=False))


@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize("mode", MODES)
def test_kernels_right_for_large_maps(mode, size):
    assert_right(random_case(mode, LARGE[size]))
    assert_right(random_case(mode, LARGE[size], torch.bfloat16))


@pytest.mark.parametrize("size", ((1, 17, 1, 2), (2, 17, 1, 1), (1, 33, 3, 1)))
@pytest.mark.parametrize("mode", ("norm and relu", "residual", "projection"))
def test_kernels_few_values_per_channel(mode, size):
    """Of 2 values only signs are left, and gradients cancel: what matters is that they are as small as torch's."""
    case = random_case(mode, size)
    exact, ours = case.run(torch.float64), case.run(reference=False)
    for name, out in ours.items():
        assert torch.allclose(out.double(), exact[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_kernels_exact_on_integers(mode, dtype):
    for c in (1, 8, 17, 70):
        assert_exact(integer_case(mode, (2, c, 4, 4), dtype))
    assert_exact(integer_case(mode, (2, 40, 16, 16), dtype))


@pytest.mark.parametrize("mean", (0.0, 100.0))
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_statistics(dtype, mean):
    if dtype == torch.bfloat16:
        mean /= 4  # with 8 bits of mantissa a map of 100 +- 1 has hardly two values
    for size in ((2, 17, 5, 7), (1, 3, 1, 2), (4, 64, 56, 56), (16, 512, 7, 7), (3, 70, 33, 31)):
        assert_statistics_are_right(random_map(*size, dtype=dtype, mean=mean))


@pytest.mark.parametrize("mode", ("norm and relu", "residual", "projection"))
def test_kernels_large_mean(mode):
    assert_right(random_case(mode, (4, 32, 9, 9), mean=100.0))


def test_kernels_statistics_of_maps_in_pieces():
    """The first pixels, from which distances are taken, are far from all others."""
    x = random_map(2, 32, 40, 40)
    x[:, :, :20] += 50
    assert_statistics_are_right(x)
    assert_statistics_are_right(torch.full((2, 8, 5, 5), 3.0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_layouts(mode, layout):
    case = random_case(mode, (2, 6, 5, 7))
    maps = {
        n: t if t is None else LAYOUTS[layout](t) for n, t in vars(case).items() if n in ("input", "residual", "grad")
    }
    for name, t in maps.items():
        setattr(case, name, t)
    exact, ours = case.run(torch.float64), case.run(reference=False)
    assert ours["out"].is_contiguous(memory_format=torch.channels_last)
    for name, out in ours.items():
        assert torch.allclose(out.double(), exact[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", (1, 7, 8, 13, 16, 24, 33))
def test_kernels_mask(c, dtype):
    """A bit for every value: set where the result is not <= 0, zero behind the last channel."""
    case = random_case("residual", (2, c, 3, 5), dtype)
    out, mask, _, _ = case.call(case.tensors(), reference=False)
    assert mask.dtype == torch.uint8 and mask.shape == (2, 3, 5, (c + 7) // 8)
    assert torch.equal(mask, pack_bits(out > 0)) and torch.equal(unpack_bits(mask, c), out > 0)


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("mode", MODES)
def test_kernels_special_values(mode, value):
    """NaN and infinities land where torch puts them: in the whole channel, whose statistics are NaN."""
    for where in ("input", "residual", "grad"):
        case = random_case(mode, (2, 19, 4, 4))
        t = getattr(case, where)
        if t is None:
            continue
        t[1, 3, 2, 1] = value
        reference, ours = case.run(), case.run(reference=False)
        for name, out in ours.items():
            assert torch.equal(out.isfinite(), reference[name].isfinite()), (where, name)


def test_kernels_relu_keeps_nan():
    x, residual = random_map(2, 5, 3, 3), random_map(2, 5, 3, 3)
    residual[0, 2, 1, 1] = math.nan
    out, mask, _, _ = ops.batch_norm_relu(x, None, None, residual)
    assert out[0, 2, 1, 1].isnan() and out.isnan().sum() == 1
    assert unpack_bits(mask, 5)[0, 2, 1, 1]


def test_kernels_same_bits_for_any_number_of_threads():
    case = random_case("projection", (4, 72, 29, 31))
    threads = torch.get_num_threads()
    try:
        runs = []
        for n in (1, 2, 3, 5):
            torch.set_num_threads(n)
            runs.append(case.run(reference=False))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(t, other[name]) for other in runs[1:] for name, t in runs[0].items())


@pytest.mark.parametrize("mode", MODES)
def test_what_is_kept(mode):
    """The map, the shortcut's and a bit a value; neither the normalised map nor the result."""
    case, kept = random_case(mode, (2, 32, 8, 8)), []
    leaves = {n: t.clone().requires_grad_() for n, t in case.tensors().items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        case.call(leaves, reference=False)
    maps = [t for t in kept if t.dim() == 4 and t.is_floating_point()]
    assert len(maps) == (2 if mode == "projection" else 1)
    assert sum(t.numel() for t in kept if t.dtype == torch.uint8) in (0, case.input.numel() // 8)
    assert (mode in ("residual", "projection")) == any(t.numel() for t in kept if t.dtype == torch.uint8)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_can_be_differentiated(mode):
    case = random_case(mode, (2, 3, 3, 3), torch.float32)
    for t in (case.input, case.grad, case.residual):
        if t is not None:
            t.data = t.double()
    case.vectors = {n: v.double() for n, v in case.vectors.items()}
    names, tensors = zip(*case.tensors().items(), strict=True)
    tensors = [t.clone().requires_grad_() for t in tensors]

    def function(*args):
        return case.call(dict(zip(names, args, strict=True)), reference=False)[0]

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives_of_float32(mode):
    case, found = random_case(mode, (2, 5, 4, 4)), []
    for reference in (True, False):
        leaves = {n: t.clone().requires_grad_() for n, t in case.tensors().items()}
        out = case.call(leaves, reference)
        out = out if reference else out[0]
        first = torch.autograd.grad((out * case.grad).sum(), [leaves["input"], leaves["weight"]], create_graph=True)
        found.append(
            torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values()), allow_unused=True)
        )
    for a, b in zip(*found, strict=True):
        a, b = (torch.zeros(1) if g is None else g for g in (a, b))
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_statistics_gradient():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.batch_norm_statistics, x)
    assert torch.autograd.gradgradcheck(ops.batch_norm_statistics, x)


def test_only_what_is_asked_for_has_a_gradient():
    case = random_case("residual")
    weight = case.vectors["weight"].clone().requires_grad_()
    ops.batch_norm_relu(case.input, weight, case.vectors["bias"], case.residual)[0].sum().backward()
    assert weight.grad is not None
    out = ops.batch_norm_relu(case.input, case.vectors["weight"], None, case.residual.requires_grad_())
    assert not any(t.requires_grad for t in out[1:])
    out[0].sum().backward()
    assert torch.equal(case.residual.grad, (out[0] > 0).float())


@pytest.mark.parametrize("mode", MODES)
def test_transforms_give_torchs_result(mode):
    case = random_case(mode, (2, 4, 3, 3))
    names, tensors = zip(*case.tensors().items(), strict=True)

    def ours(*args):
        return case.call(dict(zip(names, args, strict=True)), reference=False)[0]

    def reference(*args):
        return case.call(dict(zip(names, args, strict=True)), reference=True)

    tangents = tuple(torch.randn_like(t) for t in tensors)
    for a, b in zip(torch.func.jvp(ours, tensors, tangents), torch.func.jvp(reference, tensors, tangents), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    grads = [torch.func.grad(lambda *t, f=f: f(*t).square().sum())(*tensors) for f in (ours, reference)]
    assert torch.allclose(*grads, atol=1e-4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[0], tangents[0])
        assert torch.autograd.forward_ad.unpack_dual(ours(dual, *tensors[1:])).tangent is not None
        with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
            torch.ops.resnet_fast.batch_norm_relu(dual, None, None, None, 1e-5, True)


@pytest.mark.parametrize("channels", (16, 5))
def test_opcheck(channels):
    size = (2, channels, 4, 3)
    for dtype in (torch.float32, torch.bfloat16):
        x, residual = (random_map(*size, dtype=dtype).requires_grad_() for _ in range(2))
        weight, bias = (torch.randn(channels).requires_grad_() for _ in range(2))
        torch.library.opcheck(torch.ops.resnet_fast.batch_norm_statistics, (x,))
        for arguments in ((weight, bias, None), (weight, bias, residual), (None, None, residual)):
            torch.library.opcheck(torch.ops.resnet_fast.batch_norm_relu, (x, *arguments, 1e-5, True))
        torch.library.opcheck(
            torch.ops.resnet_fast.batch_norm_relu_projection, (x, weight, bias, residual, weight, bias, 1e-5, 1e-3)
        )
    mean, var = (torch.rand(channels) for _ in range(2))
    running = torch.rand(channels), torch.rand(channels)
    torch.library.opcheck(torch.ops.resnet_fast.update_running_stats_, (*running, mean, var, 0.1, 24))


def test_compiled():
    case = random_case("projection", (2, 16, 6, 6))
    leaves = {n: t.clone().requires_grad_() for n, t in case.tensors().items()}
    function = torch.compile(lambda t: case.call(t, reference=False)[0], backend="aot_eager", fullgraph=True)
    function(leaves).backward(case.grad)
    eager = case.run(reference=False)
    assert all(torch.equal(t.grad, eager[n]) for n, t in leaves.items())


def test_autocast_leaves_maps_alone():
    case = random_case("residual")
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.batch_norm_relu(case.input, *case.vectors.values(), case.residual)[0].dtype == torch.float32
        mean, _ = ops.batch_norm_statistics(case.input.bfloat16())
        assert mean.dtype == torch.float32


X = torch.randn(2, 6, 4, 4)
WRONG = {
    "dimensions": (dict(input=torch.randn(2, 6)), RuntimeError, "input must have 4 dimensions"),
    "integers": (dict(input=X.long()), RuntimeError, "input must be floating point, got torch.int64"),
    "empty": (dict(input=X[:0]), RuntimeError, r"input must not be empty, got shape \(0, 6, 4, 4\)"),
    "one value": (dict(input=X[:1, :, :1, :1]), ValueError, "Expected more than 1 value per channel when training"),
    "weight": (dict(weight=torch.ones(5)), RuntimeError, r"weight must have shape \(6,\), one value per channel"),
    "bias dtype": (dict(bias=torch.ones(6).long()), RuntimeError, "bias must be floating point"),
    "residual": (dict(residual=X[:, :, :2]), RuntimeError, "must have input's shape"),
    "residual dtype": (dict(residual=X.double()), RuntimeError, "must have input's dtype torch.float32"),
    "device": (
        dict(weight=torch.ones(6, device="meta")),
        RuntimeError,
        "weight must be on input's device cpu, got meta",
    ),
}


@pytest.mark.parametrize("projection", (False, True))
@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_argument(case, projection):
    change, kind, words = WRONG[case]
    args = {"input": X, "weight": None, "bias": None, "residual": X} | change
    if case in ("dimensions", "integers", "empty", "one value"):
        args["residual"] = args["input"]
    function = ops.batch_norm_relu_projection if projection else ops.batch_norm_relu
    args = [*args.values(), None, None] if projection else list(args.values())
    with pytest.raises(kind, match=words):
        function(*args)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(kind, match=words):
        function(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in args))


def test_errors_of_statistics():
    with pytest.raises(RuntimeError, match="batch_norm_statistics: input must not be empty"):
        ops.batch_norm_statistics(X[:0])
    with pytest.raises(RuntimeError, match="does not work here"):
        with resnet_fast.use_backend("cudnn"):
            ops.batch_norm_statistics(X)


@pytest.mark.parametrize("momentum", (0.1, 0.0, 1.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_update_running_stats(dtype, momentum):
    x, bn = torch.randn(3, 7, 5, 5) * 2 + 1, nn.BatchNorm2d(7, momentum=momentum).double()
    running = [t.clone().to(dtype) for t in (bn.running_mean + 1, bn.running_var * 3)]
    bn.running_mean.copy_(running[0])
    bn.running_var.copy_(running[1])
    bn.train()(x.double())
    mean, var = ops.batch_norm_statistics(x)
    ops.update_running_stats_(*running, mean, var, momentum, 75)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-6, torch.bfloat16: 4e-3}[dtype]
    assert torch.allclose(running[0].double(), bn.running_mean, rtol=tolerance)
    assert torch.allclose(running[1].double(), bn.running_var, rtol=tolerance)


def test_update_running_stats_of_tiny_variance():
    """What 1 / sqrt(var + eps) could not say: a variance far below eps."""
    x = random_map(4, 8, 6, 6) * 1e-5
    running = torch.zeros(8), torch.zeros(8)
    ops.update_running_stats_(*running, *ops.batch_norm_statistics(x), 1.0, 144)
    assert torch.allclose(running[1].double(), x.double().var((0, 2, 3)), rtol=1e-5)


def test_update_running_stats_errors():
    v = torch.zeros(3)
    for args, words in (
        ((v, v[:2], v, v, 0.1, 4), r"running_var must have shape \(3,\), one value per channel, got \(2,\)"),
        ((v, v, v.long(), v, 0.1, 4), "mean must be floating point"),
        ((v, v, v, v, 0.1, 1), "count must be at least 2 values per channel, got 1"),
        ((v, v, v, v.to("meta"), 0.1, 4), "var must be on running_mean's device cpu, got meta"),
    ):
        with pytest.raises(RuntimeError, match=words):
            ops.update_running_stats_(*args)


def test_reference_backend_is_the_same_operator():
    case = random_case("projection", (2, 20, 6, 6))
    ours = case.run(reference=False)
    with resnet_fast.use_backend("reference"):
        plain = case.run(reference=False)
    assert all(torch.allclose(t, plain[n], rtol=1e-4, atol=1e-5) for n, t in ours.items())
    assert copy.copy(ours).keys() == plain.keys()


@pytest.mark.parametrize("level", OTHER_LEVELS)
def test_every_other_level(level):
    assert_passes_at_level(os.path.abspath(__file__), level, "kernels")
