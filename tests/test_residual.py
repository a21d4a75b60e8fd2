import pytest
import torch
from torch import nn
from torch.nn import functional as F

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
