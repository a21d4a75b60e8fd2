"""Training through fused blocks: numbers, buffers, gradients, what is kept, and every way people train a ResNet."""

import copy
import math
import pickle

import pytest
import torch
import torchvision
from checks import UNIT_ROUNDOFF
from test_models import NAMES
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops.misc import FrozenBatchNorm2d

import resnet_fast
from resnet_fast import models
from resnet_fast.bench import training
from resnet_fast.bench.training import OURS
from resnet_fast.measure import relative_rms
from resnet_fast.nn import Residual, resnet_block, set_activation_memory
from resnet_fast.nn.blocks import PlainBlock

# What Winograd's algorithm may lose, as it adds up in the losses and statistics of random networks.
WINOGRAD = 1e-5


@pytest.fixture(autouse=True)
def fused_however_small():
    """A block that is small trains on torch's operators, unless a backend is forced: see test_small_blocks."""
    with resnet_fast.use_backend("cpu"):
        yield


def pair(name="resnet18", seed=0, **kwargs):
    """Ours and torchvision's with equal weights, to be trained; weak branches, as in trained networks."""
    torch.manual_seed(seed)
    ours = getattr(models, name)(**kwargs)
    for m in ours.modules():
        if isinstance(m, models.BasicBlock | models.Bottleneck):
            nn.init.constant_((m.bn3 if hasattr(m, "bn3") else m.bn2).weight, 0.25)
    stock = getattr(torchvision.models, name)(**kwargs)
    stock.load_state_dict(ours.state_dict())
    return ours.train(), stock.train()


def step(model, x, y=None):
    """Loss, gradients and buffers of one step."""
    model.zero_grad()
    loss = F.cross_entropy(model(x), torch.arange(len(x)) if y is None else y)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())


def fused(model):
    return [b.fused for b in resnet_fast.explain(model).blocks]


def cosine(a, b):
    return F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


def assert_trains_like(ours, stock, x, seeds=1):
    """Loss and buffers by the rule; gradients point where float64's do, as nearly as stock torch's: a ReLU flips
    single values either way, so the median over seeds counts."""
    assert all(fused(ours))
    lags = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        x = torch.randn_like(x)
        exact = step(copy.deepcopy(stock).double(), x.double())
        plain = [step(copy.deepcopy(stock).to(memory_format=f), x.contiguous(memory_format=f))
                 for f in (torch.contiguous_format, torch.channels_last)[seeds == 1 :]]  # fmt: skip
        found = step(copy.deepcopy(ours), x)
        unit = UNIT_ROUNDOFF[torch.float32]
        bound = 2 * max(abs(p[0] - exact[0]) for p in plain) + unit * exact[0].abs()
        assert abs(found[0] - exact[0]) <= max(bound, WINOGRAD * exact[0].abs())
        for name, b in exact[2].items():
            if not b.is_floating_point():
                assert torch.equal(found[2][name], b)
            else:
                most = 2 * max(relative_rms(p[2][name], b) for p in plain) + unit
                assert relative_rms(found[2][name], b) <= max(most, 4 * WINOGRAD), name
        for name, g in exact[1].items():
            assert found[1][name].shape == g.shape and found[1][name].isfinite().all()
            lag = min(cosine(p[1][name], g) for p in plain) - cosine(found[1][name], g)
            lags.setdefault(name, []).append(lag)
    for name, values in lags.items():
        assert sorted(values)[len(values) // 2] <= 1e-3, (name, values)


@pytest.mark.parametrize("name", NAMES)
def test_every_model_trains_like_torchvisions(name):
    small = name in ("resnet18", "resnet50", "resnext50_32x4d")
    assert_trains_like(*pair(name), torch.randn(3, 3, 48, 48), seeds=3 if small else 1)


def block_pair(kind, **kwargs):
    torch.manual_seed(0)
    if kind is Residual:
        block = Residual(32, 48, use_1x1conv=True, strides=2)
    elif kwargs.get("projection"):
        stride, inputs, planes = 2, 32, 24
        outputs = planes * kind.expansion
        down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        block = kind(inputs, planes, stride, down)
    else:
        block = kind(24 * kind.expansion, 24)
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
    return block.train(), copy.deepcopy(block).train()


BLOCKS = {
    "basic": (models.BasicBlock, {}),
    "basic, projection": (models.BasicBlock, {"projection": True}),
    "bottleneck": (models.Bottleneck, {}),
    "bottleneck, projection": (models.Bottleneck, {"projection": True}),
    "plain": (PlainBlock, {}),
    "textbook": (Residual, {}),
}


def plain_forward(block, x):
    with resnet_fast.use_backend("reference"):
        return block(x)


def run_block(block, forward, x, grad):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = forward(block, x)
    grads = torch.autograd.grad(out, [x, *block.parameters()], grad.to(out.dtype))
    return {"out": out.detach(), "x": grads[0], **dict(zip(dict(block.named_parameters()), grads[1:], strict=True)),
            **{n: b.clone() for n, b in block.named_buffers()}}  # fmt: skip


@pytest.mark.parametrize(
    ("size", "dtype"),
    (
        ((4, 12, 10), torch.float32),
        ((4, 12, 10), torch.bfloat16),
        ((1, 9, 7), torch.float32),
        ((3, 2, 2), torch.float32),
    ),
)
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_against_float64(kind, size, dtype):
    """From the same input and output gradient. Biases in front of a BatchNorm have none but rounding."""
    block, other = block_pair(BLOCKS[kind][0], **BLOCKS[kind][1])
    n, h, w = size
    x = torch.randn(n, block.conv1.in_channels, h, w).to(dtype)
    block, other = block.to(dtype), other.to(dtype)
    grad = torch.randn_like(plain_forward(copy.deepcopy(other), x))
    exact = run_block(copy.deepcopy(other).double(), plain_forward, x.double(), grad)
    stock = [run_block(copy.deepcopy(other).to(memory_format=f), plain_forward, x.contiguous(memory_format=f), grad)
             for f in (torch.contiguous_format, torch.channels_last)]  # fmt: skip
    assert block.why_plain() is None
    found = run_block(block, lambda b, t: b(t), x, grad)
    unit = UNIT_ROUNDOFF[dtype]
    for name, e in exact.items():
        if not e.is_floating_point():
            assert torch.equal(found[name], e)
            continue
        # In 16 bits a ReLU here and there lets through what it should not, in torch as in ours: errors of percents.
        flips = dtype != torch.float32 and name != "out" and "running" not in name
        times, least = (3, 0.05) if flips else (2, 2 * WINOGRAD)
        if name in ("conv1.bias", "conv2.bias"):
            size_of_terms = grad.double().square().mean().sqrt().item() * (n * h * w)
            assert found[name].abs().max() <= 64 * unit * size_of_terms
            continue
        bound = max(times * max(relative_rms(s[name], e) for s in stock) + unit, least)
        assert relative_rms(found[name], e) <= bound, name


def test_textbook_stage_trains():
    torch.manual_seed(0)
    net = nn.Sequential(*resnet_block(16, 16, 2, first_block=True), *resnet_block(16, 32, 2))
    x = torch.randn(2, 16, 12, 12)
    assert all(fused(net.train()))
    ours = run_block(copy.deepcopy(net), lambda b, t: b(t), x, torch.ones(2, 32, 6, 6))
    exact = run_block(copy.deepcopy(net).double(), plain_forward, x.double(), torch.ones(2, 32, 6, 6))
    assert all(relative_rms(ours[n], exact[n]) < 1e-4 for n in ours if n.endswith("weight") or n in ("x", "out"))


CHANGES = {
    "momentum None": lambda bn: setattr(bn, "momentum", None),
    "momentum 0": lambda bn: setattr(bn, "momentum", 0.0),
    "eps": lambda bn: setattr(bn, "eps", 0.1),
}
KINDS = {
    "no running statistics": dict(track_running_stats=False),
    "momentum None": dict(momentum=None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_batch_norm_options(change):
    ours, stock = pair(num_classes=10)
    for model in (ours, stock):
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                CHANGES[change](m)
    for _ in range(2):
        x = torch.randn(3, 3, 64, 64)
        found, plain = step(ours, x), step(stock, x)
        assert all(torch.allclose(b, plain[2][n], rtol=1e-3, atol=1e-4) for n, b in found[2].items())
        assert abs(found[0] - plain[0]) < 1e-3
    assert all(fused(ours))


@pytest.mark.parametrize("kind", KINDS)
def test_batch_norm_kinds(kind):
    ours, stock = pair(num_classes=10, norm_layer=lambda c: nn.BatchNorm2d(c, **KINDS[kind]))
    x = torch.randn(3, 3, 64, 64)
    assert all(fused(ours))
    found, plain = step(ours, x), step(stock, x)
    assert abs(found[0] - plain[0]) < 1e-4
    assert all(torch.allclose(b, plain[2][n], rtol=1e-3, atol=1e-4) for n, b in found[2].items())
    if kind == "no running statistics":  # also uses the batch's in eval mode
        assert all(fused(ours.eval()))
        assert relative_rms(ours(x), stock.eval()(x)) < 1e-4


def test_buffers_change_as_torchs_do():
    ours, stock = pair(num_classes=10)
    for model in (ours, stock):
        with torch.no_grad():
            for _ in range(3):
                model(torch.ones(2, 3, 64, 64) * torch.arange(64))
    assert ours.bn1.num_batches_tracked == 3
    for name, b in stock.named_buffers():
        assert torch.allclose(ours.get_buffer(name), b, rtol=1e-3, atol=1e-4), name


def test_frozen_batch_norm_in_training():
    """A BatchNorm's own mode decides: all frozen takes the inference form, one frozen in a block torch's path."""
    ours, stock = pair(num_classes=10)
    for model in (ours, stock):
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
    assert all(fused(ours))
    x = torch.randn(2, 3, 64, 64)
    before = copy.deepcopy(dict(ours.named_buffers()))
    found, plain = step(ours, x), step(stock, x)
    assert abs(found[0] - plain[0]) < 1e-4
    assert all(torch.equal(b, before[n]) for n, b in found[2].items())
    for model in (ours, stock):
        model.train()
        model.layer1[0].bn2.eval()
        model.layer2[0].downsample[1].eval()
    assert [b.name for b in resnet_fast.explain(ours).blocks if not b.fused] == ["layer1.0", "layer2.0"]
    assert "bn2 uses running statistics, unlike the first" in str(resnet_fast.explain(ours))
    found, plain = step(ours, x), step(stock, x)
    assert abs(found[0] - plain[0]) < 1e-4
    ours.layer1[1].bn2 = FrozenBatchNorm2d(64)
    assert "bn2 is frozen" in str(resnet_fast.explain(ours))


def without_affine(model):
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight = m.bias = None
    return model


def test_batch_norm_without_affine():
    ours, stock = (without_affine(m) for m in pair("resnet50", num_classes=10))
    x = torch.randn(3, 3, 64, 64)
    found, plain = step(ours, x), step(stock, x)
    assert all(fused(ours)) and found[1].keys() == plain[1].keys() and abs(found[0] - plain[0]) < 1e-3


@pytest.mark.parametrize("what", ("hook", "group norm", "forward"))
def test_altered_blocks_take_torchs_path(what):
    ours, stock = pair(num_classes=10)
    seen = []
    for model in (ours, stock):
        if what == "hook":
            model.layer1[0].bn1.register_forward_hook(lambda *a: seen.append(a[2].shape))
        elif what == "group norm":
            model.layer1[0].bn1 = nn.GroupNorm(8, 64)
        else:
            model.layer1[0].conv2.forward = model.layer1[0].conv2.forward
    assert fused(ours) == [True, False] + [True] * 7
    x = torch.randn(2, 3, 64, 64)
    assert abs(step(ours, x)[0] - step(stock, x)[0]) < 1e-4
    assert len(seen) == (2 if what == "hook" else 0)


def test_one_value_per_channel_is_torchs_error():
    ours, stock = pair()
    x = torch.randn(1, 3, 32, 32)  # 1x1 maps in the last stage
    for model in (ours, stock):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            model(x)
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


def test_batch_of_one_and_maps_of_one_pixel():
    assert_trains_like(*pair(num_classes=10), torch.randn(1, 3, 64, 64))
    assert_trains_like(*pair(num_classes=10), torch.randn(6, 3, 32, 32))


def test_nan_goes_everywhere():
    ours, stock = pair(num_classes=10)
    x = torch.randn(2, 3, 64, 64)
    x[0, 0, 0, 0] = math.nan
    found, plain = step(ours, x, torch.tensor([0, 1])), step(stock, x, torch.tensor([0, 1]))
    assert found[0].isnan() and plain[0].isnan()
    assert all(g.isnan().all() == plain[1][n].isnan().all() for n, g in found[1].items())


@pytest.mark.parametrize("name", ("resnet18", "resnet50"))
def test_a_few_steps_of_sgd(name):
    """The loss falls as torch's does."""
    losses = []
    x, y = torch.randn(4, 3, 64, 64), torch.arange(4)
    for model in pair(name, num_classes=10):
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
        trace = []
        for _ in range(3):
            trace.append(step(model, x, y)[0].item())
            optimizer.step()
        losses.append(trace)
    assert losses[0][-1] < losses[0][0] and torch.allclose(*map(torch.tensor, losses), rtol=0.05)


def test_layouts_and_contiguous_results():
    for memory_format in (torch.contiguous_format, torch.channels_last):
        ours, stock = (m.to(memory_format=memory_format) for m in pair(num_classes=10))
        features = [nn.Sequential(*list(m.children())[:-2])(torch.randn(2, 3, 64, 64)) for m in (ours, stock)]
        assert features[0].is_contiguous() == features[1].is_contiguous()
        grads = [step(m, torch.randn(2, 3, 64, 64))[1] for m in (ours, stock)]
        assert all(g.stride() == grads[1][n].stride() for n, g in grads[0].items())


def test_autocast():
    ours, stock = pair("resnet50", num_classes=10)
    x, y = torch.randn(4, 3, 64, 64), torch.arange(4)
    found = []
    for model in (ours, stock):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        found.append((loss.detach().float(), {n: p.grad for n, p in model.named_parameters()}))
    assert abs(found[0][0] - found[1][0]) < 0.05
    assert all(g.dtype == torch.float32 for g in found[0][1].values())
    assert cosine(found[0][1]["fc.weight"], found[1][1]["fc.weight"]) > 0.98


def test_copies_pickles_and_checkpoints():
    ours, _ = pair(num_classes=10)
    set_activation_memory(ours, "lean")
    x = torch.randn(2, 3, 64, 64)
    first = step(copy.deepcopy(ours), x)
    again = step(pickle.loads(pickle.dumps(ours)), x)
    assert torch.equal(first[0], again[0]) and all(torch.equal(g, again[1][n]) for n, g in first[1].items())
    block = ours.layer1[0]
    x = torch.randn(2, 64, 8, 8, requires_grad=True)
    (direct,) = torch.autograd.grad(copy.deepcopy(block)(x).square().sum(), x)
    (recomputed,) = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(direct, recomputed)


def test_gradients_of_gradients():
    """As a gradient penalty needs them."""
    ours, stock = pair(num_classes=10)
    found = []
    for model in (ours.layer2[0], stock.layer2[0]):
        torch.manual_seed(1)
        x = torch.randn(2, 64, 8, 8, requires_grad=True)
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), list(model.parameters())))
    assert all(cosine(a, b) > 0.9999 for a, b in zip(*found, strict=True))


def test_transforms_take_torchs_path():
    ours, stock = pair(num_classes=10, norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False))
    x = torch.randn(2, 64, 8, 8)
    tangent = torch.randn_like(x)
    found = [torch.func.jvp(copy.deepcopy(m.layer1[0]), (x,), (tangent,)) for m in (ours, stock)]
    assert all(relative_rms(a, b) < 1e-5 for a, b in zip(*found, strict=True))


def test_compiled_block():
    ours, _ = pair(num_classes=10)
    block, x = ours.layer2[0], torch.randn(2, 64, 8, 8)
    grads = []
    for function in (copy.deepcopy(block), torch.compile(copy.deepcopy(block), backend="aot_eager", fullgraph=True)):
        t = x.clone().requires_grad_()
        out = function(t)
        grads.append(torch.autograd.grad(out.square().sum(), [t, *function.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", ("resnet18", "resnet50"))
def test_lean_has_the_same_bits(name):
    ours, _ = pair(name, num_classes=10)
    x = torch.randn(2, 3, 64, 64)
    lean = set_activation_memory(copy.deepcopy(ours), "lean")
    for _ in range(2):
        found, other = step(ours, x), step(lean, x)
        assert torch.equal(found[0], other[0])
        assert all(torch.equal(t, b[n]) for a, b in zip(found[1:], other[1:], strict=True) for n, t in a.items())
    with torch.autocast("cpu", torch.bfloat16):
        losses = [F.cross_entropy(m(x), torch.arange(2)) for m in (ours, lean)]
    grads = [torch.autograd.grad(loss, list(m.parameters())) for loss, m in zip(losses, (ours, lean), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_lean_refuses_a_weight_that_changed():
    ours, _ = pair("resnet50", num_classes=10)
    set_activation_memory(ours, "lean")
    loss = ours(torch.randn(2, 3, 64, 64)).sum()
    with torch.no_grad():
        ours.layer4[2].conv3.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified (in place|by an inplace)"):
        loss.backward()


def test_set_activation_memory_errors():
    with pytest.raises(ValueError, match="mode must be one of default, lean, got 'tiny'"):
        set_activation_memory(pair()[0], "tiny")
    with pytest.raises(ValueError, match="model must have blocks of resnet_fast, got Linear without any"):
        set_activation_memory(nn.Linear(2, 2), "lean")


def test_what_is_allocated_is_seen():
    """By what the next test goes: large and small blocks, and maps of this package, idle or not."""
    before = training.allocated("cpu")
    kept = [torch.empty(2**22), torch.empty(1000), resnet_fast.ops.max_pool(torch.zeros(1, 64, 224, 224), 1)]
    bytes = sum(t.numel() * 4 for t in kept)
    assert abs(training.allocated("cpu") - before - bytes) < 1e5
    kept.clear()
    assert abs(training.allocated("cpu") - before) < 1e5


def test_bytes_kept_of_resnet50():
    """What is allocated between forward and backward, an image: under autocast to bfloat16 at most 0.80 of torch's and
    in lean mode 0.50."""
    stock, cell = training.stock_model("resnet50"), training.Cell("resnet50", 8, "bfloat16", "cpu")
    ways = training.ways("cpu")
    kept = {
        n: training.kept_per_image(cell, ways[n], stock, 2, 4) for n in ("torch channels_last", OURS, f"{OURS} lean")
    }
    torchs, ours, lean = kept.values()
    assert 40e6 < torchs < 47e6
    assert ours <= 0.80 * torchs
    assert lean <= 0.50 * torchs


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("kind", BLOCKS)
def test_small_blocks(kind, layout):
    """They train on torch's operators, bit for bit, below a number of multiplications; all others are fused."""
    block, stock = (m.to(memory_format=layout) for m in block_pair(BLOCKS[kind][0], **BLOCKS[kind][1]))
    channels, stride = block.conv1.weight.shape[1], block.conv1.stride[0] * block.conv2.stride[0]
    weights = sum(m.weight.numel() for name, m in block.named_children() if name.startswith("conv"))
    least = 100e6 if layout == torch.channels_last else 50e6

    def outputs(pixels):  # of the result
        x = torch.randn(1, channels, 16 * stride, stride * math.ceil(pixels / 16)).contiguous(memory_format=layout)
        with resnet_fast.use_backend("reference"):
            expected = stock(x)
        with resnet_fast.use_backend(None):
            out = block(x)
        return out, expected

    out, expected = outputs(least / weights - 16)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(block.buffers(), stock.buffers(), strict=True))
    out, expected = outputs(least / weights + 16)
    assert type(out.grad_fn).__name__ != type(expected.grad_fn).__name__


def test_small_blocks_are_fused_where_memory_is_to_be_lean():
    block, x = models.Bottleneck(64, 16).train(), torch.randn(2, 64, 8, 8)
    with resnet_fast.use_backend(None):
        plain = type(block(x).grad_fn).__name__
        fused_function = type(set_activation_memory(block, "lean")(x).grad_fn).__name__
    assert plain != fused_function == type(block(x).grad_fn).__name__
