"""Batch normalisation in training in CUDA C++, through the public operators."""

import copy
import math
from collections import Counter

import batch_norm
import pytest
import torch
import torchvision
from batch_norm import DTYPES, MODES, integer_case, random_case, random_map
from checks import LAYOUTS, assert_same_special_values

import resnet_fast
from resnet_fast import ops
from resnet_fast.measure import relative_rms
from resnet_fast.nn import blocks
from resnet_fast.ops.arguments import pack_bits

from . import emulated

pytestmark = pytest.mark.usefixtures("cuda_backend")

# Around words of 16 bytes and of one value, a byte of the mask, and the 32 words of a block.
CHANNELS = (1, 7, 8, 9, 33, 136, 264)
SIZES = {
    "two values": (2, 5, 1, 1),
    "two values of a word": (1, 16, 1, 2),
    "one pixel a map": (9, 24, 1, 1),
    "one more than a chunk of narrow maps": (1, 8, 19, 27),
    "one more than a chunk": (3, 64, 1, 43),
    "one less than a chunk": (1, 64, 3, 21),
    "many chunks of single values": (3, 3, 37, 41),
    "more chunks than rows that add them up": (2, 256, 23, 23),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", CHANNELS)
def test_channels(c, dtype, mode):
    batch_norm.assert_right(random_case(mode, (2, c, 3, 7), dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact(dtype, mode):
    for size in ((2, 17, 4, 4), (1, 32, 8, 16), (4, 3, 1, 2)):
        batch_norm.assert_exact(integer_case(mode, size, dtype))


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    for mode, dtype in zip(MODES, 2 * DTYPES, strict=False):
        if math.prod(SIZES[size]) > 10 * SIZES[size][1]:  # of fewer values the error is a matter of luck
            batch_norm.assert_right(random_case(mode, SIZES[size], dtype))
    batch_norm.assert_exact(integer_case("projection", (1, SIZES[size][1], 2, 2)))


@pytest.mark.parametrize("mean", (0.0, 100.0))
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(dtype, mean):
    for size in SIZES.values():
        batch_norm.assert_statistics_are_right(random_map(*size, dtype=dtype, mean=mean))


def test_statistics_of_more_than_fills_a_gpu():
    """More than 1024 blocks' worth of pixels: a thread then takes several runs of them."""
    batch_norm.assert_statistics_are_right(random_map(1, 256, 130, 128, mean=100.0))


@pytest.mark.parametrize("mode", MODES)
def test_large_mean(mode):
    batch_norm.assert_right(random_case(mode, (2, 64, 9, 9), mean=100.0))


def test_constant_channels():
    x = torch.full((2, 9, 3, 5), 1000.1)
    mean, var = ops.batch_norm_statistics(x)
    assert torch.equal(mean, x[0, :, 0, 0]) and torch.equal(var, torch.zeros(9))
    out = ops.batch_norm_relu(x, None, torch.arange(9.0) - 4, eps=1e-5)[0]
    assert torch.equal(out, (torch.arange(9.0) - 4).relu().view(1, -1, 1, 1).expand_as(x))


@pytest.mark.parametrize("mode", MODES)
def test_no_affine(mode):
    batch_norm.assert_right(random_case(mode, affine=False))


def test_vectors_of_any_dtype_and_stride():
    case = random_case("projection", (2, 19, 3, 5))
    case.vectors = {name: v.bfloat16().float() for name, v in case.vectors.items()}
    ours = case.run(reference=False)
    for change in (torch.Tensor.double, torch.Tensor.bfloat16, lambda v: v.repeat_interleave(3)[::3]):
        case.vectors = {name: change(v) for name, v in case.vectors.items()}
        found = case.run(reference=False)
        assert all(torch.equal(found[name].float(), t.to(found[name].dtype).float()) for name, t in ours.items())


def results(mode, input, grad, residual=None, backend="cuda"):
    """Everything that a forward and a backward pass return, of tensors as they lie in memory."""
    torch.manual_seed(0)
    vectors = torch.randn(4, input.shape[1]).unbind()
    leaves = [t.detach().requires_grad_() for t in (input, *vectors, *([] if residual is None else [residual]))]
    x, weight, bias, other_weight, other_bias, *other = leaves
    with resnet_fast.use_backend(backend):
        if mode == "projection":
            found = ops.batch_norm_relu_projection(x, weight, bias, *other, other_weight, other_bias, 1e-3, 1e-2)
        else:
            relu = mode in ("norm and relu", "residual")
            found = ops.batch_norm_relu(x, weight, bias, *(other or [None]), 1e-3, relu)
        used = leaves if mode == "projection" else [x, weight, bias, *other]
        return [t.detach() for t in found], torch.autograd.grad(found[0], used, grad)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, mode):
    maps = [LAYOUTS[layout](torch.randn(2, 12, 4, 5)) for _ in range(2 if mode.startswith("norm") else 3)]
    found = results(mode, *maps)
    dense = results(mode, *(LAYOUTS["channels_last"](t) for t in maps))
    assert all(torch.equal(a, b) for pair in zip(found, dense, strict=True) for a, b in zip(*pair, strict=True))
    last = torch.empty(maps[0].shape, memory_format=torch.channels_last).stride()
    assert all(t.stride() == last for t in (found[0][0], found[1][0], dense[0][0], dense[1][0]))


def test_strides_of_a_single_pixel():
    case = random_case("projection", (2, 3, 1, 1))
    out = case.call(case.tensors(), reference=False)
    assert out[0].stride() == (3, 1, 3, 3) and out[1].shape == (2, 1, 1, 1)


@pytest.mark.parametrize("momentum", (0.1, 1.0, 0.0))
@pytest.mark.parametrize("c", (1, 128, 129))
def test_update_running_stats(c, momentum):
    """In one launch, whatever the strides of the new ones; other buffers than float32 are torch's."""
    running, new = (torch.randn(2, c).abs() for _ in range(2))
    exact = [(1 - momentum) * running[i].double() + momentum * new[i].double() * (1, 75 / 74)[i] for i in (0, 1)]
    for of_new in (new, new.repeat_interleave(2, 1)[:, ::2]):
        found = [t.clone() for t in running]
        with emulated.launches() as launched:
            ops.update_running_stats_(*found, *of_new, momentum, 75)
        assert launched == Counter(update_running_stats_kernel=1)
        assert all(relative_rms(t, right) <= 2e-7 for t, right in zip(found, exact, strict=True))
    for make in (torch.Tensor.double, lambda t: t.repeat_interleave(2, 1)[:, ::2]):
        found = list(make(running))
        with emulated.launches() as launched:
            ops.update_running_stats_(*found, *new, momentum, 75)
        assert all(relative_rms(t, right) <= 2e-7 for t, right in zip(found, exact, strict=True))
        assert not launched or c == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_mask(dtype):
    for c in (1, 3, 7, 8, 9, 16, 33, 130):
        case = random_case("residual", (2, c, 3, 5), dtype)
        for mode in ("residual", "projection"):
            (out, mask, *_), _ = results(mode, case.input, case.grad, case.residual)
            assert torch.equal(mask, pack_bits(~(out <= 0)))
        assert results("residual without relu", case.input, case.grad, case.residual)[0][1].numel() == 0
        assert results("norm and relu", case.input, case.grad)[0][1].numel() == 0


def test_what_rounds_to_zero_lets_nothing_through():
    """As in torch, whose ReLU's gradient asks the result."""
    x = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float16).view(4, 1, 1, 1)
    for value in (2.0**-26, -(2.0**-26), 2.0**-24):
        bias = torch.full((1,), value)
        weight = torch.zeros(1)
        for residual in (None, torch.zeros_like(x)):
            leaf = bias.clone().requires_grad_()
            out, mask, *_ = ops.batch_norm_relu(x, weight, leaf, residual)
            out.backward(torch.ones_like(out))
            passes = value > 2.0**-25
            assert (out > 0).all() == passes and leaf.grad.item() == 4 * passes
            assert mask.numel() == 0 or mask.bool().all() == passes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_special_values(mode, dtype):
    """NaN and infinities reach what they reach on the reference and nothing else."""
    case = random_case(mode, (2, 17, 4, 5), dtype)
    input, grad, residual = case.input.clone(), case.grad.clone(), case.residual
    input[0, 3, 1, 2], input[1, 8, 0, 0], input[0, 16, 3, 4] = math.nan, math.inf, -math.inf
    grad[0, 1, 2, 2], grad[1, 5, 0, 0] = math.nan, math.inf
    maps = (input, grad)
    if residual is not None:
        residual = residual.clone()
        residual[0, 9, 1, 1], residual[1, 10, 0, 0], residual[1, 11, 2, 3] = math.nan, math.inf, -math.inf
        maps = (*maps, residual)
    found, reference = results(mode, *maps), results(mode, *maps, backend="reference")
    finite = results(mode, *(t.nan_to_num(0, 0, 0) for t in maps))
    for a, b in zip([found[0][0], *found[1]], [reference[0][0], *reference[1]], strict=True):
        assert_same_special_values(a, b)
    assert torch.equal(*(unaffected(f[0][0]) for f in (found, finite)))
    assert torch.equal(*(unaffected(f[1][0]) for f in (found, finite)))


def unaffected(t):
    return t[:, [c for c in range(17) if c not in (1, 3, 5, 8, 9, 10, 11, 16)]]


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("mode", ("norm and relu", "projection"))
def test_any_order(mode):
    case = random_case(mode, (3, 68, 5, 7))
    maps = [case.input, case.grad] + ([] if case.residual is None else [case.residual])
    found = results(mode, *maps)
    emulated.configure()
    again = results(mode, *maps)
    assert all(torch.equal(a, b) for pair in zip(found, again, strict=True) for a, b in zip(*pair, strict=True))


KERNELS = {
    "statistics": Counter(batch_norm_moments_kernel=1, batch_norm_mean_var_kernel=1),
    "forward": Counter(batch_norm_relu_kernel=1),
    "backward": Counter(
        batch_norm_relu_sums_kernel=1, batch_norm_relu_add_sums_kernel=1, batch_norm_relu_backward_kernel=1
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_launches_and_nothing_else(mode):
    """One read for statistics, one pass forward, two back, and of torch nothing but memory."""
    case = random_case(mode, (2, 24, 5, 7))
    leaves = {name: t.requires_grad_() for name, t in case.tensors().items()}
    with emulated.launches() as found, torch.profiler.profile() as profile:
        out = case.call(leaves, reference=False)[0]
    statistics = Counter({name: times * (1 + (mode == "projection")) for name, times in KERNELS["statistics"].items()})
    assert found == statistics + KERNELS["forward"]
    with emulated.launches() as found, torch.profiler.profile() as profile_back:
        torch.autograd.grad(out, leaves.values(), case.grad)
    assert found == KERNELS["backward"]
    called = {event.name for p in (profile, profile_back) for event in p.events() if event.name.startswith("aten::")}
    assert called <= {"aten::empty_strided", "aten::detach", "aten::to"}, called


def test_batch_norm_relu_conv_runs_the_same_kernels():
    x = random_map(2, 16, 5, 5).requires_grad_()
    weight = torch.randn(8, 16, 3, 3)
    with emulated.launches() as found:
        mean, var = ops.batch_norm_statistics(x.detach())
        out = ops.batch_norm_relu_conv(x, mean, var, torch.ones(16), torch.zeros(16), weight, None, 1, 1)
    assert found == KERNELS["statistics"] + KERNELS["forward"]
    with emulated.launches() as found:
        out.backward(torch.randn_like(out))
    assert found == KERNELS["backward"]
    leaf = x.detach().double().requires_grad_()
    exact = ops.batch_norm_relu_conv_ref(
        leaf, torch.ones(16).double(), torch.zeros(16).double(), weight.double(), None, 1, 1
    )
    assert relative_rms(out, exact) < 1e-6


def trained(block, x, grad):
    """What one training step returns, its gradients and the running statistics that it leaves."""
    leaf = x.detach().to(next(block.parameters()).dtype).requires_grad_()
    out = block.train()(leaf)
    out.backward(grad.to(out.dtype))
    gradients = {name: p.grad for name, p in block.named_parameters()}
    return {"out": out.detach(), "x": leaf.grad, **gradients, **dict(block.named_buffers())}


@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("name", ("BasicBlock", "Bottleneck"))
def test_training_step_of_a_block(name, stride):
    """Against float64, with torch's own error as the measure; the convolutions are torch's here."""
    expansion = getattr(blocks, name).expansion
    shape = (8, 8 // expansion, stride)

    def projection():
        return torch.nn.Sequential(torch.nn.Conv2d(8, 8, 1, stride, bias=False), torch.nn.BatchNorm2d(8))

    stock = getattr(torchvision.models.resnet, name)(*shape, projection() if stride == 2 else None)
    ours = getattr(blocks, name)(*shape, projection() if stride == 2 else None)
    ours.load_state_dict(stock.state_dict())
    exact = copy.deepcopy(stock).double()
    x, grad = random_map(4, 8, 6, 6), random_map(4, 8, 6 // stride, 6 // stride)
    with emulated.launches() as found:
        mine = trained(ours, x, grad)
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in ours.modules())
    assert found["batch_norm_moments_kernel"] == found["batch_norm_mean_var_kernel"] == norms
    assert found["batch_norm_relu_kernel"] >= norms - (stride == 2)  # and again for the gradients of weights
    assert found["batch_norm_relu_backward_kernel"] == norms - (stride == 2)
    theirs, exact = trained(stock, x, grad), trained(exact, x, grad)
    for key, value in mine.items():
        assert relative_rms(value, exact[key]) <= 4 * relative_rms(theirs[key], exact[key]) + 1e-6, key


X = random_map(2, 9, 3, 5)
V = torch.ones(9)
NO_NORM = (None, None, None, None, 0.0)
BAD = {
    "no map": lambda o: o._batch_norm_statistics_cuda(V),
    "empty": lambda o: o._batch_norm_statistics_cuda(X[:0]),
    "integers": lambda o: o._batch_norm_statistics_cuda(X.int()),
    "short vector": lambda o: o._batch_norm_relu_cuda(X, V[:8], V, None, None, 0.0, None, *NO_NORM, True, False),
    "integer vector": lambda o: o._batch_norm_relu_cuda(X, V.int(), V, None, None, 0.0, None, *NO_NORM, True, False),
    "residual": lambda o: o._batch_norm_relu_cuda(X, V, V, None, None, 0.0, X[:1], *NO_NORM, True, False),
    "no variance": lambda o: o._batch_norm_relu_cuda(X, V, V, None, None, 0.0, X, V, *NO_NORM[1:], True, False),
    "mask": lambda o: o._batch_norm_relu_backward_cuda(
        X, X, V, V, None, None, 0.0, torch.zeros(2, 3, 5, 1, dtype=torch.uint8), None, *NO_NORM[:3], 0.0, True, False
    ),
    "grad": lambda o: o._batch_norm_relu_backward_cuda(
        X.half(), X, V, V, None, None, 0.0, None, None, *NO_NORM[:3], 0.0, True, False
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    with pytest.raises(RuntimeError, match=r"batch_norm_\w+: |the CUDA kernels take"):
        BAD[case](torch.ops.resnet_fast)
