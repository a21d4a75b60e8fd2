"""conv2d_fork: the beginning of a residual block in training, whose two gradients are added up in a kernel's store."""

from functools import partial

import pytest
import torch
from checks import UNIT_ROUNDOFF
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import resnet_fast
from resnet_fast.measure import relative_rms
from resnet_fast.ops.conv2d_fork import Convolution, conv2d_fork

CASES = {
    "bottleneck": dict(c=64, k=32, kernel=1),
    "basic block": dict(c=32, k=32, kernel=3),
    "basic block of few pixels": dict(c=32, k=32, kernel=3, h=2, w=3),
    "projection": dict(c=32, k=24, kernel=1, projection=48, strides=(1, 1)),
    "strided projection": dict(c=32, k=24, kernel=1, projection=48, strides=(1, 2), second_kernel=1, h=8),
    "strided basic block": dict(c=32, k=48, kernel=3, projection=48, strides=(2, 2)),
    "unequal strides": dict(c=16, k=16, kernel=1, projection=32, strides=(1, (2, 1))),
    "strided 1x1 beside the map": dict(c=16, k=16, kernel=1, strides=(2,), h=1, w=1),
    "odd channels": dict(c=17, k=9, kernel=3, projection=33, strides=(2, 2), h=7, w=5),
    "groups": dict(c=32, k=32, kernel=3, groups=4, projection=32, strides=(1, 1)),
}


def problem(c, k, kernel, h=7, w=9, groups=1, projection=None, strides=(1,), second_kernel=1, bias=True, n=2):
    """The input and the convolutions, with weights that need gradients."""

    def convolution(filters, size, stride, groups):
        weight = (torch.randn(filters, c // groups, size, size) / (c * size**2) ** 0.5).requires_grad_()
        own = torch.randn(filters).requires_grad_() if bias else None
        return Convolution(weight, own, stride, size // 2, 1, groups)

    x = torch.randn(n, c, h, w).contiguous(memory_format=torch.channels_last).requires_grad_()
    second = None if projection is None else convolution(projection, second_kernel, strides[1], 1)
    return x, convolution(k, kernel, strides[0], groups), second


def plain(x, first, second):
    conv = [F.conv2d(x, *c) for c in (first, second) if c is not None]
    return (*conv, x)[:2]


def run(function, x, first, second, dtype=None):
    """Both results and every gradient."""
    leaves = [x, *first[:2], *(second[:2] if second else ())]
    copies = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in leaves]
    x, *tensors = copies
    convolutions = [Convolution(*tensors[2 * i : 2 * i + 2], *c[2:]) for i, c in enumerate((first, second)) if c]
    outs = function(x, convolutions[0], convolutions[1] if second else None)
    torch.manual_seed(1)
    loss = sum((out * torch.randn(out.shape).to(out.dtype)).sum() for out in outs)
    return [*(out.detach() for out in outs), *torch.autograd.grad(loss, [t for t in copies if t is not None])]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients(case, dtype):
    args = problem(**CASES[case])
    args = [t if t is None else t.detach().to(dtype) for t in args[:1]] + [
        c if c is None else c._replace(weight=c.weight.to(dtype), bias=c.bias.to(dtype)) for c in args[1:]
    ]
    found, stock, exact = run(conv2d_fork, *args), run(plain, *args), run(plain, *args, dtype=torch.float64)
    for ours, theirs, right in zip(found, stock, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == right.shape
        bound = 2 * relative_rms(theirs, right) + (4e-6 if dtype == torch.float32 else 2 * UNIT_ROUNDOFF[dtype])
        assert relative_rms(ours, right) <= bound


@pytest.mark.parametrize("case", ("bottleneck", "basic block", "strided projection"))
def test_integers_are_exact(case):
    x, *convolutions = problem(**CASES[case])
    with torch.no_grad():
        for t in (x, *(t for c in convolutions if c for t in c[:2])):
            t.copy_(torch.randint(-3, 4, t.shape))
    outs = [f(x, *convolutions) for f in (conv2d_fork, plain)]
    grads = [torch.randint(-2, 3, out.shape).float() for out in outs[0]]
    found = [(*out, *torch.autograd.grad(out, [x, convolutions[0].weight], grads)) for out in outs]
    # Winograd's algorithm divides, so its integers are not exact.
    equal = partial(torch.allclose, atol=1e-3) if case == "basic block" else torch.equal
    assert all(equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_not_asked_for():
    """A gradient of one result alone, of neither weight, of no input."""
    x, first, second = problem(**CASES["strided projection"])
    for index, needed in ((0, first), (1, second)):
        out = conv2d_fork(x, first, second)[index]
        found = torch.autograd.grad(out.sum(), [x, needed.weight])
        expected = torch.autograd.grad(plain(x, first, second)[index].sum(), [x, needed.weight])
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected, strict=True))
    frozen = [c._replace(weight=c.weight.detach(), bias=None) for c in (first, second)]
    (of_x,) = torch.autograd.grad(sum(out.sum() for out in conv2d_fork(x, *frozen)), x)
    (expected,) = torch.autograd.grad(sum(out.sum() for out in plain(x, *frozen)), x)
    assert torch.allclose(of_x, expected, atol=1e-4)
    outs = conv2d_fork(x.detach(), first, second)
    assert torch.autograd.grad(outs[0].sum(), first.weight)[0].shape == first.weight.shape


def test_a_gradient_that_others_hold_stays():
    """The shortcut's gradient is read, never written."""
    x, first, _ = problem(**CASES["strided 1x1 beside the map"])
    for case in ("bottleneck", "basic block", "strided 1x1 beside the map"):
        x, first, _ = problem(**CASES[case])
        out, shortcut = conv2d_fork(x, first, None)
        grads = [torch.randn(out.shape), torch.randn(shortcut.shape)]
        before = grads[1].clone()
        torch.autograd.grad([out, shortcut], x, grads)
        assert torch.equal(grads[1], before)


def test_one_pass_in_a_block(monkeypatch):
    """The blocks go through it, and autograd adds no map to another."""
    from resnet_fast import models
    from resnet_fast.nn import training

    calls, added = [], []
    fork = training.conv2d_fork
    monkeypatch.setattr(training, "conv2d_fork", lambda *args: calls.append(args) or fork(*args))
    block = models.Bottleneck(64, 16).train()
    x = torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    with resnet_fast.use_backend("cpu"):  # so small a block would train on torch's operators
        out = block(x)
    monkeypatch.setattr(torch.Tensor, "add_", lambda *args: added.append(args))
    out.sum().backward()
    assert len(calls) == 1 and not added and out.grad_fn is not None


def test_second_gradients():
    with resnet_fast.use_backend("reference"):
        x, first, second = problem(c=3, k=2, kernel=1, projection=4, strides=(1, 2), h=4, w=3, n=1)
        tensors = [t.detach().double().requires_grad_() for t in (x, *first[:2], *second[:2])]

        def function(x, w, b, other, other_bias):
            return conv2d_fork(x, Convolution(w, b, *first[2:]), Convolution(other, other_bias, *second[2:]))

        assert gradcheck(function, tensors) and gradgradcheck(function, tensors)


def test_autocast():
    x, first, second = problem(**CASES["strided projection"])
    with torch.autocast("cpu", torch.bfloat16):
        half = x.detach().bfloat16().requires_grad_()
        for input in (x, half):
            outs = conv2d_fork(input, first, second)
            assert all(out.dtype == torch.bfloat16 for out in outs)
            grads = torch.autograd.grad(sum(out.float().sum() for out in outs), [input, first.weight, second.weight])
            assert [g.dtype for g in grads] == [input.dtype, torch.float32, torch.float32]
