"""What small networks in tests are made of."""

from torch import nn


class Module(nn.Module):
    """forward(*inputs) = function(self, *inputs), with these submodules and parameters."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def conv(c=16, k=16, size=3, **how):
    return nn.Conv2d(c, k, size, padding=size // 2, **how)
