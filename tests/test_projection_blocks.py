"""The blocks that end in conv_bn_relu_projection: torchvision's with a projection shortcut, and the textbook's."""

import copy
import sys

import pytest
import torch
from test_models import operators
from torch import nn
from torch.nn.utils import prune

import resnet_fast
from resnet_fast import models
from resnet_fast.measure import relative_rms
from resnet_fast.nn import Residual, fused

op = torch.ops.resnet_fast.conv_bn_relu_projection


def two_calls(x, conv, bn, shortcut, projection, projection_bn):
    """What `conv_bn_projection` must be equal to."""
    if projection_bn is None:
        residual = projection(shortcut)
    else:
        residual = fused.conv_bn(shortcut, projection, projection_bn, relu=False)
    return fused.conv_bn(x, conv, bn, residual=residual)


def randomized(model):
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.2, 0.2)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            nn.init.uniform_(m.weight, 0.2, 0.6)
            nn.init.normal_(m.bias, std=0.1)
    return model.eval()


NETWORKS = {
    "resnet18": (models.resnet18, (2, 3, 64, 48), 3),
    "resnet50": (models.resnet50, (1, 3, 48, 64), 4),
    "textbook": (lambda: nn.Sequential(Residual(8, 16, True, 2), Residual(16, 16), Residual(16, 24, True)), (2, 8, 15, 9), 2),
}  # fmt: skip


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_have_the_bits_of_two_calls(network, monkeypatch):
    make, size, projections = NETWORKS[network]
    model, x = randomized(make()), torch.randn(size)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    cases = [model, copy.deepcopy(model).bfloat16(), copy.deepcopy(model).to(memory_format=torch.channels_last)]
    inputs = [x.to(next(m.parameters()).dtype) for m in cases]
    with torch.no_grad():
        found = operators(model, x)
        outs = [m(x) for m, x in zip(cases, inputs, strict=True)]
    leaf = x.clone().requires_grad_()
    model(leaf).square().mean().backward()
    grads = [leaf.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    assert found.count("resnet_fast::conv_bn_relu_projection") == projections
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())

    for name in ("resnet_fast.nn.fused", "resnet_fast.nn.residual"):
        monkeypatch.setattr(sys.modules[name], "conv_bn_projection", two_calls)
    leaf = x.clone().requires_grad_()
    model(leaf).square().mean().backward()
    with torch.no_grad():
        assert "resnet_fast::conv_bn_relu_projection" not in operators(model, x)
        for m, x, out in zip(cases, inputs, outs, strict=True):
            assert out.isfinite().all() and out.std() > 0 and torch.equal(out, m(x))
    # The shortcut's part reaches the block's input before the main branch's or after it: sums in another order.
    for a, b in zip(grads, [leaf.grad, *(p.grad for p in model.parameters())], strict=True):
        assert relative_rms(a, b) < 1e-5


def test_autocast_block_has_the_bits_of_two_calls(monkeypatch):
    block, x = randomized(Residual(8, 16, True, 2)), torch.randn(2, 8, 15, 9).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert "resnet_fast::conv_bn_relu_projection" in operators(block, x)
        out = block(x)
        monkeypatch.setattr(sys.modules["resnet_fast.nn.residual"], "conv_bn_projection", two_calls)
        assert out.dtype == torch.bfloat16 and torch.equal(out, block(x))


class _OtherConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


OTHER_PROJECTIONS = {
    "hooked": lambda conv: conv.register_forward_hook(lambda m, args, out: 2 * out) and conv,
    "of a subclass": lambda conv: _OtherConv(8, 16, 1, stride=2),
    "reflecting": lambda conv: nn.Conv2d(8, 16, 3, stride=2, padding=1, padding_mode="reflect"),
    "padded in words": lambda conv: nn.Sequential(nn.Conv2d(8, 16, 1, padding="same"), nn.AvgPool2d(2, ceil_mode=True)),
    "pruned": lambda conv: prune.l1_unstructured(conv, "weight", amount=0.5),
}


@pytest.mark.parametrize("case", OTHER_PROJECTIONS)
def test_other_projections_of_the_textbook_block_run_as_they_are(case):
    block, x = Residual(8, 16, True, 2), torch.randn(2, 8, 15, 9)
    block.conv3 = OTHER_PROJECTIONS[case](block.conv3)
    randomized(block)
    with torch.no_grad():
        found = operators(block, x)
        assert found.count("resnet_fast::conv_bn_relu") == 2 and "resnet_fast::conv_bn_relu_projection" not in found
        out = block(x)
        with resnet_fast.use_backend("reference"):
            assert torch.allclose(out, block(x), atol=1e-5)


def test_other_shortcuts_of_torchvisions_blocks_run_as_they_are():
    def downsample():
        return nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16))

    block = randomized(models.BasicBlock(8, 16, stride=2, downsample=downsample()))
    x = torch.randn(2, 8, 16, 10)
    with torch.no_grad():
        found = operators(block, x)
        assert found.count("resnet_fast::conv_bn_relu") == 2 and "resnet_fast::conv_bn_relu_projection" not in found
        out = block(x)
        with resnet_fast.use_backend("reference"):
            assert torch.allclose(out, block(x), atol=1e-5)


def test_projections_are_explained():
    block = randomized(Residual(16, 32, True, 2))
    found = resnet_fast.explain(block, torch.randn(2, 16, 15, 9)).convolutions
    assert [c.name for c in found] == ["conv1", "conv3", "conv2"]
    assert [c.weight for c in found] == [(32, 16, 3, 3), (32, 16, 1, 1), (32, 32, 3, 3)]
    assert [c.flops for c in found] == [2 * 2 * 8 * 5 * 32 * n for n in (144, 16, 288)]
    assert [c.ours for c in found] == [True, False, True] and found[1].kernel == "torch"


def test_export_keeps_the_operator():
    block, x = randomized(Residual(8, 16, True, 2)), torch.randn(2, 8, 15, 9)
    with torch.no_grad():
        program = torch.export.export(block, (x,))
        assert sum(n.target is op.default for n in program.graph.nodes) == 1
        assert torch.equal(program.module()(x), block(x))


def test_whoever_watches_a_block_sees_the_operator():
    block, x = randomized(Residual(4, 8, True)), torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        ref = block(x)
        assert operators(block, x).count("resnet_fast::conv_bn_relu_projection") == 1
        traced = torch.jit.trace(block, x)
        assert str(traced.inlined_graph).count("resnet_fast::conv_bn_relu_projection") == 1
        assert torch.equal(traced(x), ref)
        block.conv3.stride, block.conv3.padding = 1, [0, 0]
        assert torch.equal(block(x), ref)
