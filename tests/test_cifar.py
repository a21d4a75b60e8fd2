"""The small ResNets of the paper and their plain twins: the paper's counts, and the numbers of plain torch."""

import copy
import pickle

import pytest
import torch
import torchvision
from checks import LOOSE, RESNET, NoConvolution, assert_accurate, assert_like_torch
from test_training import assert_trains_like
from torch import nn
from torch.nn import functional as F

import resnet_fast
from resnet_fast.measure import calibrate
from resnet_fast.models import cifar
from resnet_fast.models.cifar import PaddedShortcut
from resnet_fast.nn.blocks import PlainBlock

OPTIONS = ("A", "B", "C", None)


class Padded(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        out = x.new_zeros(len(x), self.channels, -(-x.shape[2] // 2), -(-x.shape[3] // 2))
        front = (self.channels - x.shape[1]) // 2
        out[:, front : front + x.shape[1]] = x[:, :, ::2, ::2]
        return out


class StockPlainBlock(torchvision.models.resnet.BasicBlock):
    def forward(self, x):
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)))


class Stock(nn.Sequential):
    """The same networks from torch's and torchvision's own parts."""

    def __init__(self, depth, shortcut, in_channels=3, width=16):
        block = StockPlainBlock if shortcut is None else torchvision.models.resnet.BasicBlock
        stages, channels = [], width
        for stage in range(3):
            blocks = []
            for i in range((depth - 2) // 6):
                out, stride, down = width << stage, 2 if stage and not i else 1, None
                if shortcut == "C" or (stride == 2 and shortcut == "B"):
                    down = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
                elif stride == 2 and shortcut == "A":
                    down = Padded(out)
                blocks.append(block(channels, out, stride, down))
                channels = out
            stages.append(nn.Sequential(*blocks))
        first = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        parts = (
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *stages,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, 10),
        )
        super().__init__(first, *parts)


def pair(depth, shortcut, images, **kwargs):
    """Ours and stock torch's in eval mode, with the same weights and the statistics of ``images``; weak branches, as in
    trained networks."""
    torch.manual_seed(0)
    stock, ours = Stock(depth, shortcut, **kwargs), cifar.ResNet(depth, shortcut=shortcut, **kwargs)
    for m in ours.modules():
        if isinstance(m, resnet_fast.models.BasicBlock):
            nn.init.constant_(m.bn2.weight, 0.25 if shortcut else 1.0)
    calibrate(ours, images)
    stock.load_state_dict(dict(zip(stock.state_dict(), ours.state_dict().values(), strict=True)))
    return ours, stock.eval()


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("depth", "parameters", "paper"),
    ((20, 269_722, 0.27), (32, 464_154, 0.46), (44, 658_586, 0.66), (56, 853_018, 0.85), (110, 1_727_962, 1.7)),
)
def test_parameters_are_the_papers(depth, parameters, paper):
    with torch.device("meta"):
        residual, plain = getattr(cifar, f"resnet{depth}"), getattr(cifar, f"plain{depth}")
        assert count(residual()) == count(plain()) == parameters
        assert abs(parameters / 1e6 - paper) < (0.005 if paper < 1 else 0.05)
        # Two projections with their BatchNorms: 16 to 32 and 32 to 64 channels.
        assert count(residual(shortcut="B")) == parameters + 16 * 32 + 32 * 64 + 2 * (32 + 64)
        convolutions = [m for m in residual().modules() if isinstance(m, nn.Conv2d)]
        assert len(convolutions) + 1 == depth
        assert [m.stride for m in convolutions].count((2, 2)) == 2


def test_the_papers_network_of_1202_layers():
    with torch.device("meta"):
        assert round(count(cifar.ResNet(1202)) / 1e6, 1) == 19.4


@pytest.mark.parametrize("shortcut", OPTIONS)
@pytest.mark.parametrize(
    ("size", "kwargs"),
    (
        ((2, 3, 32, 32), {}),
        ((3, 1, 8, 8), {"in_channels": 1}),
        ((2, 4, 33, 19), {"in_channels": 4, "width": 9}),
        ((1, 3, 5, 1), {"width": 17}),
    ),
)
def test_same_numbers_as_torch(size, kwargs, shortcut):
    x = torch.randn(size)
    ours, stock = pair(14, shortcut, torch.randn(8, *size[1:]), **kwargs)
    with torch.no_grad():
        assert_like_torch(stock, ours, x, **(RESNET if shortcut else LOOSE))
        last = ours.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(last, stock(x), rtol=1e-4, atol=1e-5)
        assert_like_torch(stock, resnet_fast.optimize_for_inference(ours, x), x, **(RESNET if shortcut else LOOSE))


@pytest.mark.parametrize("shortcut", OPTIONS)
def test_reference_is_torchs_bit_for_bit(shortcut):
    x = torch.randn(2, 3, 16, 16)
    ours, stock = pair(8, shortcut, x)
    with resnet_fast.use_backend("reference"):
        assert torch.equal(ours(x), stock(x))
        assert torch.equal(ours.train()(x), stock.train()(x))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), stock.buffers(), strict=True))


@pytest.mark.parametrize("shortcut", OPTIONS)
def test_trains_like_torch(shortcut):
    x = torch.randn(6, 3, 20, 20)
    ours, stock = pair(14, shortcut, x)
    names = list(ours.state_dict())

    class Named(nn.Module):  # the stock network under our names, so that gradients can be compared by name
        def __init__(self):
            super().__init__()
            for name, part in zip(
                ("conv1", "bn1", "relu", "layer1", "layer2", "layer3", "avgpool"), stock, strict=False
            ):
                setattr(self, name, part)
            self.fc = stock[-1]

        def forward(self, x):
            x = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x))))))
            return self.fc(self.avgpool(x).flatten(1))

    named = Named()
    assert list(named.state_dict()) == names
    with resnet_fast.use_backend("cpu"):  # blocks so small would train on torch's operators
        assert_trains_like(ours.train(), named.train(), x)


@pytest.mark.parametrize("shortcut", OPTIONS)
def test_everything_is_fused(shortcut):
    model = cifar.ResNet(20, shortcut=shortcut)
    for mode in (True, False):
        found = resnet_fast.explain(model.train(mode)).blocks
        assert [b.name for b in found][:2] == ["stem", "layer1.0"] and len(found) == 1 + 9
        assert all(b.fused for b in found)
        assert {b.kind for b in found[1:]} == {"PlainBlock" if shortcut is None else "BasicBlock"}
    with torch.no_grad(), NoConvolution():
        model(torch.randn(1, 3, 32, 32))
    explained = resnet_fast.explain(model, torch.randn(1, 3, 32, 32))
    assert explained.own_share == 1 and len(explained.convolutions) == 19 + {"B": 2, "C": 9}.get(shortcut, 0)


def test_names_are_those_of_published_weights():
    names = set(cifar.resnet20(shortcut="B").state_dict())
    for name in ("conv1.weight", "bn1.running_var", "layer1.2.conv2.weight", "layer2.0.downsample.0.weight",
                 "layer3.0.downsample.1.bias", "fc.bias"):  # fmt: skip
        assert name in names
    assert not [name for name in cifar.resnet20().state_dict() if "downsample" in name]


@pytest.mark.parametrize("channels", (1, 2, 7, 16))
@pytest.mark.parametrize("added", (0, 1, 5, 16))
@pytest.mark.parametrize("size", ((1, 1), (5, 8)))
def test_padded_shortcut(channels, added, size):
    x = torch.randn(2, channels, *size, requires_grad=True)
    out = PaddedShortcut(added, 2)(x)
    assert torch.equal(out, Padded(channels + added)(x))
    out.sum().backward()
    assert x.grad.sum() == x[:, :, ::2, ::2].numel()
    last = PaddedShortcut(added, 1)(x.detach().to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert "added_channels" in repr(PaddedShortcut(added, 2))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_plain_block(dtype):
    block = PlainBlock(24, 40, 2)
    x = torch.randn(3, 24, 11, 9)
    calibrate(block, x)

    def written_out(x, cast):
        b, x = copy.deepcopy(block).to(cast), x.to(cast)
        y = F.relu(b.bn1(F.conv2d(x, b.conv1.weight, None, 2, 1)))
        return F.relu(b.bn2(F.conv2d(y, b.conv2.weight, None, 1, 1)))

    with torch.no_grad():
        exact = written_out(x, torch.float64)
        stock = [
            written_out(x.contiguous(memory_format=f), dtype) for f in (torch.contiguous_format, torch.channels_last)
        ]
        assert_accurate(copy.deepcopy(block).to(dtype)(x.to(dtype)), exact, stock)


@pytest.mark.parametrize("batch", (0, 1))
def test_small_batches(batch):
    model = cifar.resnet20().eval()
    assert model(torch.randn(batch, 3, 32, 32)).shape == (batch, 10)


def test_copies_scripts_and_exports():
    for shortcut in ("A", None):
        model, x = cifar.ResNet(8, shortcut=shortcut).eval(), torch.randn(2, 3, 16, 16)
        expected = model(x)
        for other in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.jit.script(model),
            torch.export.export(model, (x,)).module(),
        ):
            torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"depth must be 6 n \+ 2 .* got 21"):
        cifar.ResNet(21)
    with pytest.raises(ValueError, match="depth"):
        cifar.ResNet(2)
    with pytest.raises(ValueError, match=r"shortcut must be .* got .D."):
        cifar.resnet20(shortcut="D")
    with pytest.raises(TypeError):
        cifar.plain20(shortcut="A")
