"""The operators of training on a GPU, in Triton and in CUDA C++, and steps through them. What can be judged without one:
tests/triton_interpreter, tests/triton_aot and tests/cuda_emulator."""

import copy

import batch_norm
import pytest
import torch
from batch_norm import DTYPES, MODES, integer_case, random_case, random_map
from checks import assert_accurate
from test_max_pool import GEOMETRIES
from torch import nn
from torch.nn import functional as F

import resnet_fast
from resnet_fast import models, ops
from resnet_fast.bench.peers import graphed
from resnet_fast.models import BasicBlock, Bottleneck
from resnet_fast.nn import set_activation_memory

pytestmark = pytest.mark.gpu

# Around words of 16 bytes, bytes of the mask, and as many channels as a block takes.
CHANNELS = (1, 7, 8, 17, 64, 130, 264)
SIZES = (
    (2, 5, 1, 1),
    (9, 24, 1, 1),
    (1, 8, 19, 27),
    (3, 64, 1, 43),
    (3, 3, 37, 41),
    (16, 256, 56, 56),
    (8, 64, 112, 112),
)
POOLS = {name: how for name, how in GEOMETRIES.items() if name not in ("batch 0", "nothing but padding")}


@pytest.fixture(autouse=True, params=("triton", "cuda"))
def backend(request):
    with resnet_fast.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """Not TF32: the blocks' convolutions are torch's here."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_gpu(case):
    case.device = "cuda"
    return case


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", CHANNELS)
def test_channels(c, dtype, mode):
    batch_norm.assert_right(on_gpu(random_case(mode, (3, c, 5, 7), dtype)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact(dtype, mode):
    for size in ((2, 17, 4, 4), (1, 32, 8, 16), (4, 3, 1, 2), (16, 64, 32, 32)):
        batch_norm.assert_exact(on_gpu(integer_case(mode, size, dtype)))


@pytest.mark.parametrize("mean", (0.0, 100.0))
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(dtype, mean):
    for size in SIZES:
        batch_norm.assert_statistics_are_right(random_map(*size, dtype=dtype, mean=mean).cuda())


def test_large_maps():
    """More than a block on each multiprocessor, and twice the same bits."""
    for mode, dtype in zip(MODES, 2 * DTYPES, strict=False):
        case = on_gpu(random_case(mode, (8, 64, 56, 56), dtype))
        batch_norm.assert_right(case)
        first, second = case.run(reference=False), case.run(reference=False)
        assert all(torch.equal(t, second[name]) for name, t in first.items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", POOLS)
def test_max_pool_with_indices(geometry, dtype):
    """torch's result; its gradient in float32, rounded once."""
    how = dict(POOLS[geometry])
    x = torch.randint(-2, 3, how.pop("shape"), device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    leaf, wide = x.clone().requires_grad_(), x.cpu().float().requires_grad_()
    exact = F.max_pool2d(wide, **how)
    out, _ = ops.max_pool_with_indices(leaf, **how)
    grad = torch.randn(exact.shape).to(dtype)
    assert torch.equal(out.detach().cpu().float(), exact.detach())
    (found,) = torch.autograd.grad(out, leaf, grad.cuda())
    assert torch.equal(found.cpu(), torch.autograd.grad(exact, wide, grad.float())[0].to(dtype))


def projection(c: int, k: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))


BLOCKS = {
    "basic": (lambda: BasicBlock(24, 24), 24),
    "basic, projection": (lambda: BasicBlock(16, 24, 2, projection(16, 24, 2)), 16),
    "bottleneck": (lambda: Bottleneck(64, 16), 64),
    "bottleneck, projection": (lambda: Bottleneck(16, 8, 2, projection(16, 32, 2)), 16),
}


def step(module, x, forward):
    module.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = forward(x)
    (out.square().sum() / 2).backward()
    found = {"out": out.detach(), "x": x.grad} | {n: p.grad.clone() for n, p in module.named_parameters()}
    return {n: t.cpu() for n, t in (found | dict(module.named_buffers())).items()}


@pytest.mark.parametrize("memory", ("default", "lean"))
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, memory):
    build, channels = BLOCKS[name]
    torch.manual_seed(0)
    module = build().train()
    for p in module.parameters():
        if p.dim() == 1:
            nn.init.uniform_(p, 0.5, 1.5)
    x = torch.randn(3, channels, 9, 8).contiguous(memory_format=torch.channels_last)
    double, plain, ours = copy.deepcopy(module).double(), copy.deepcopy(module), copy.deepcopy(module).cuda()
    set_activation_memory(ours, memory)
    assert resnet_fast.explain(ours).blocks[0].fused
    exact, stock = step(double, x.double(), double._plain), [step(plain, x, plain._plain)]
    plain.load_state_dict(module.state_dict())
    plain.cuda()
    stock.append(step(plain, x.cuda(), plain._plain))  # whose convolutions add up in another order
    for name, t in step(ours, x.cuda(), ours).items():
        if t.is_floating_point():
            assert_accurate(t, exact[name], [s[name] for s in stock])
        else:
            assert torch.equal(t, exact[name])


@pytest.mark.parametrize("memory", ("default", "lean"))
def test_a_whole_step_in_a_cuda_graph(memory):
    """The step replayed on other images gives the bits of the step called, in bfloat16 under autocast."""
    torch.manual_seed(0)
    model = models.resnet50().cuda().to(memory_format=torch.channels_last).train()
    set_activation_memory(model, memory)
    x = torch.randn(4, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.arange(4, device="cuda")
    parameters = list(model.parameters())

    def gradients():
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = F.cross_entropy(model(x), labels)
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    replay = graphed(gradients)
    for _ in range(2):
        x.normal_()
        captured = replay()
        assert captured[0].isfinite()
        called = gradients()
        # cuDNN's weight gradients may be added up by atomics; the loss is not.
        assert torch.equal(captured[0], called[0])
        for a, b in zip(captured, called, strict=True):
            assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm() + 1e-6
