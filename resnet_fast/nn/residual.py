"""The residual block of the textbooks, fused."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fused import (
    conv_bn,
    conv_bn_projection,
    fused_block,
    uses_batch_statistics,
    why_plain_conv,
    why_plain_conv_bn,
)
from .training import conv, fork, norm, norm_conv


class Residual(nn.Module):
    """The residual block as teaching code writes it: two 3x3 convolutions with bias, each with BatchNorm.

    relu(bn2(conv2(relu(bn1(conv1(X))))) + shortcut(X)), where the shortcut is X itself or a 1x1 convolution without
    BatchNorm. Where BatchNorm is in eval mode each 3x3 convolution runs as one fused operator, the second together with
    the shortcut's; in training each BatchNorm with its ReLU and what follows it. Where something stands in the way
    (`resnet_fast.explain` says what), exactly torch's operators run.

    Args:
        input_channels: channels of the input.
        num_channels: channels of the output.
        use_1x1conv: whether the shortcut is a 1x1 convolution (needed where channels or size change).
        strides: stride of the first convolution and of the shortcut.

    Shape: [N, input_channels, H, W] -> [N, num_channels, ceil(H / strides), ceil(W / strides)].

    References:
        He et al., Deep Residual Learning for Image Recognition (2015); the block of Zhang et al., Dive into Deep
        Learning.
    """

    def __init__(self, input_channels: int, num_channels: int, use_1x1conv: bool = False, strides: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(input_channels, num_channels, kernel_size=3, padding=1, stride=strides)
        self.conv2 = nn.Conv2d(num_channels, num_channels, kernel_size=3, padding=1)
        if use_1x1conv:
            self.conv3 = nn.Conv2d(input_channels, num_channels, kernel_size=1, stride=strides)
        else:
            self.conv3 = None
        self.bn1 = nn.BatchNorm2d(num_channels)
        self.bn2 = nn.BatchNorm2d(num_channels)

    def forward(self, X: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            fused = fused_block(self, X)
            if fused is not None:
                return fused
        Y = F.relu(self.bn1(self.conv1(X)))
        Y = self.bn2(self.conv2(Y))
        if self.conv3 is not None:
            X = self.conv3(X)
        Y += X
        return F.relu(Y)

    @torch.jit.unused
    def why_plain(self) -> str | None:
        """Why this block runs torch's operators, judged by its modules, or None if it is fused."""
        training = uses_batch_statistics(self.bn1)
        return why_plain_conv_bn("conv1", self.conv1, "bn1", self.bn1, training) or why_plain_conv_bn(
            "conv2", self.conv2, "bn2", self.bn2, training
        )

    def _fused(self, X: Tensor) -> Tensor:
        Y, conv3 = conv_bn(X, self.conv1, self.bn1), self.conv3
        if conv3 is not None and why_plain_conv("conv3", conv3) is None:
            return conv_bn_projection(Y, self.conv2, self.bn2, X, conv3, None)
        return conv_bn(Y, self.conv2, self.bn2, residual=X if conv3 is None else conv3(X))

    def _fused_training(self, X: Tensor) -> Tensor:
        Y, X = fork(X, self.conv1, None)
        Y, conv3 = norm_conv(Y, self.bn1, self.conv2), self.conv3
        if conv3 is not None:
            X = conv(X, conv3).map if why_plain_conv("conv3", conv3) is None else conv3(X)
        return norm(Y, self.bn2, X)


def resnet_block(
    input_channels: int, num_channels: int, num_residuals: int, first_block: bool = False
) -> list[Residual]:
    """One stage of a textbook ResNet: ``num_residuals`` blocks; use as ``nn.Sequential(*resnet_block(64, 128, 2))``.

    The first block halves height and width and changes the channels by a 1x1 shortcut, unless ``first_block`` says that
    this is the first stage (then input_channels must equal num_channels).
    """
    if first_block and input_channels != num_channels:
        raise ValueError(
            f"resnet_block: the first stage keeps its channels, got input_channels={input_channels} and "
            f"num_channels={num_channels}"
        )
    blocks = []
    for i in range(num_residuals):
        if i == 0 and not first_block:
            blocks.append(Residual(input_channels, num_channels, use_1x1conv=True, strides=2))
        else:
            blocks.append(Residual(num_channels, num_channels))
    return blocks
