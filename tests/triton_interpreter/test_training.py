"""Training steps through the Triton kernels; the convolutions are torch's, as they are on a GPU."""

import copy
from collections import Counter

import pytest
import torch
from checks import assert_accurate
from torch import nn

from resnet_fast.models import BasicBlock, Bottleneck, ResNet

from .kernels import launches

pytestmark = pytest.mark.usefixtures("triton_backend")


def projection(c: int, k: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))


class Stem(ResNet):
    """The part of a ResNet in front of its blocks."""

    def __init__(self):
        super().__init__(BasicBlock, [1] * 4)
        del self.layer1, self.layer2, self.layer3, self.layer4, self.fc
        self.forward, self._plain = self._stem, self._plain_stem


# By name: the module, its input's channels, and how many normalisations are launched: with a shortcut or in front of a
# max-pooling once, in front of a convolution twice, since that one's gradient needs the normalised map again.
MODULES = {
    "BasicBlock": (lambda: BasicBlock(24, 24), 24, 1 + 2),
    "BasicBlock with projection": (lambda: BasicBlock(16, 24, 2, projection(16, 24, 2)), 16, 1 + 2),
    "Bottleneck": (lambda: Bottleneck(64, 16), 64, 1 + 4),
    "Bottleneck with projection": (lambda: Bottleneck(16, 8, 2, projection(16, 32, 2)), 16, 1 + 4),
    "stem": (Stem, 3, 1),
}


def step(module: nn.Module, x: torch.Tensor, forward) -> dict[str, torch.Tensor]:
    """The result of a training step, every gradient and every buffer."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = forward(x)
    (out.square().sum() / 2).backward()
    found = {"out": out.detach(), "x": x.grad}
    return found | {n: p.grad for n, p in module.named_parameters()} | dict(module.named_buffers())


@pytest.mark.parametrize("name", MODULES)
def test_step(name):
    """As near to float64 as twice torch's own error; every normalisation on these kernels."""
    build, channels, normalisations = MODULES[name]
    module = build().train()
    for p in module.parameters():
        if p.dim() == 1:
            nn.init.uniform_(p, 0.5, 1.5)
    x = torch.randn(3, channels, 9, 8).contiguous(memory_format=torch.channels_last)
    double, plain = copy.deepcopy(module).double(), copy.deepcopy(module)
    exact, stock = step(double, x.double(), double._plain), step(plain, x, plain._plain)
    with launches() as found:
        ours = step(module, x, module)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    gradients = norms - ("projection" in name)  # those of a projection and of the branch beside it are one
    expected = Counter(
        batch_norm_moments_kernel=norms, batch_norm_statistics_kernel=norms, batch_norm_relu_kernel=normalisations,
        batch_norm_grad_sums_kernel=gradients, batch_norm_grad_vectors_kernel=gradients,
        batch_norm_grad_kernel=gradients,
    )  # fmt: skip
    assert found == (expected | Counter(max_pool_kernel=1, max_pool_backward_kernel=1) if name == "stem" else expected)
    for name, t in ours.items():
        if t.is_floating_point():
            assert_accurate(t, exact[name], [stock[name]])
        else:
            assert torch.equal(t, exact[name])
