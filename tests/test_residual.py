import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fast
from resnet_fast.nn import Residual, resnet_block


class PlainResidual(nn.Module):
    """The block as teaching code writes it."""

    def __init__(self, input_channels, num_channels, use_1x1conv=False, strides=1):
        super().__init__()
        self.conv1 = nn.Conv2d(input_channels, num_channels, kernel_size=3, padding=1, stride=strides)
        self.conv2 = nn.Conv2d(num_channels, num_channels, kernel_size=3, padding=1)
        self.conv3 = nn.Conv2d(input_channels, num_channels, kernel_size=1, stride=strides) if use_1x1conv else None
        self.bn1 = nn.BatchNorm2d(num_channels)
        self.bn2 = nn.BatchNorm2d(num_channels)

    def forward(self, X):
        Y = F.relu(self.bn1(self.conv1(X)))
        Y = self.bn2(self.conv2(Y))
        if self.conv3:
            X = self.conv3(X)
        Y += X
        return F.relu(Y)


@pytest.mark.parametrize("args", ((3, 3), (3, 6, True), (3, 6, True, 2), (16, 16, True, 1)))
def test_same_as_the_plain_block(args):
    torch.manual_seed(0)
    ours = Residual(*args)
    torch.manual_seed(0)
    plain = PlainResidual(*args)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    x = torch.randn(4, args[0], 6, 7)
    for _ in range(3):
        with resnet_fast.use_backend("reference"):
            outs = [m(x) for m in (ours, plain)]
            assert torch.equal(*outs)
            for out in outs:
                out.square().mean().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    ours.eval(), plain.eval()
    assert resnet_fast.explain(ours).blocks[0].fused
    assert torch.allclose(ours(x), plain(x), atol=1e-5)
    assert torch.equal(torch.jit.script(ours)(x), plain(x))


def test_textbook_resnet_18():
    b1 = nn.Sequential(
        nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    )
    b2 = nn.Sequential(*resnet_block(64, 64, 2, first_block=True))
    b3 = nn.Sequential(*resnet_block(64, 128, 2))
    b4 = nn.Sequential(*resnet_block(128, 256, 2))
    b5 = nn.Sequential(*resnet_block(256, 512, 2))
    net = nn.Sequential(b1, b2, b3, b4, b5, nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(512, 10))
    x = torch.rand(2, 1, 64, 64)
    assert net(x).shape == (2, 10)
    net.eval()
    report = resnet_fast.explain(net)
    assert len(report.blocks) == 8 and all(b.fused for b in report.blocks)
    out = net(x)
    with resnet_fast.use_backend("reference"):
        assert torch.allclose(out, net(x), atol=1e-4)


def test_first_stage_keeps_its_channels():
    with pytest.raises(ValueError, match="input_channels=64 and num_channels=128"):
        resnet_block(64, 128, 2, first_block=True)


class _Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_what_watches_operators_sees_the_fused_ones():
    """A block calls its kernels past torch's dispatcher, but only where nobody looks."""
    block, x = Residual(4, 4).eval(), torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        block(x)
        with _Names() as names:
            block(x)
        assert names.seen.count("resnet_fast.conv_bn_relu.default") == 2
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            block(x)
        assert sum(e.name == "resnet_fast::conv_bn_relu" for e in profile.events()) == 2
        traced = torch.jit.trace(block, x)
        assert str(traced.inlined_graph).count("resnet_fast::conv_bn_relu") == 2


def test_views_that_only_the_dispatcher_understands():
    block, x = Residual(4, 4).eval(), torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        assert torch.equal(block(torch._neg_view(x)), block(-x))
        assert torch.equal(resnet_fast.ops.add_relu(torch._neg_view(x), x), torch.relu(x - x))
        assert torch.allclose(block(x.to_mkldnn().to_dense()), block(x))


def test_numbers_of_other_types_are_what_the_dispatcher_makes_of_them():
    block, x = Residual(4, 4).eval(), torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        ref = block(x)
        block.conv1.stride, block.conv1.padding, block.conv2.dilation = 1, [1, 1], 1
        block.bn1.eps, block.bn2.eps = np.float64(1e-5), np.float32(1e-5)
        assert torch.allclose(block(x), ref)
