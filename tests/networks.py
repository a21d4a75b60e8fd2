"""Networks that tests run, and what they are made of."""

import copy
from functools import cache

import torch
import torchvision
from checks import stock_results
from torch import nn
from torchvision.models import feature_extraction

from resnet_fast import models
from resnet_fast.measure import calibrate, random_model

SMALL, OTHER = (1, 3, 64, 64), (3, 3, 96, 80)  # the example's size, and one with another batch and image


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


def images(*size):
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


@cache
def resnet18():
    return random_model(torchvision.models.resnet18, images(4, 3, 64, 64))


def resnet(build=None):
    return random_model(build, images(4, 3, 64, 64)) if build else copy.deepcopy(resnet18())


def conv_bn_relu(c=16, k=16, size=3, **how):
    return nn.Sequential(conv(c, k, size, bias=False, **how), nn.BatchNorm2d(k), nn.ReLU(inplace=True))


def tiny():
    """Every kind of kernel but grouped and depthwise ones, in 5 layers."""
    stem = nn.Sequential(conv(3, 16, 7, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    net = nn.Sequential(stem, conv_bn_relu(16, 32), conv_bn_relu(32, 32), conv(32, 32, 1), head)
    return calibrate(net, images(4, 3, 64, 64))


def feature_extractor():
    nodes = {"layer2": "a", "layer4.1.relu_1": "b", "fc": "c"}
    return feature_extraction.create_feature_extractor(resnet(), nodes).eval()


def ours_and_stock(name, x, dtype):
    """This package's model and what `stock_results` has of torchvision's, with the same weights."""
    stock = resnet(getattr(torchvision.models, name))
    model = getattr(models, name)()
    model.load_state_dict(stock.state_dict())
    return model.eval().to(dtype), stock_results(stock, [x], dtype)
