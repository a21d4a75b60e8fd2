"""torchvision's residual blocks with a fused forward: subclasses, so that names and initialisation are its own."""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.models import resnet as tv

from .fused import (
    conv_bn,
    conv_bn_shortcut,
    fused_block,
    is_channels_last,
    uses_batch_statistics,
    why_plain_conv_bn,
    why_plain_projection,
    why_plain_relu,
)
from .training import conv, fork, norm, norm_conv, norm_shortcut


def _as_plain(forward: Callable) -> Callable:
    # torchvision's own forward under another name: TorchScript compiles methods by the function's name.
    plain = types.FunctionType(forward.__code__, forward.__globals__, "_plain", forward.__defaults__)
    plain.__annotations__ = forward.__annotations__
    return plain


class BasicBlock(tv.BasicBlock):
    """torchvision's BasicBlock: 3x3, 3x3, shortcut; two fused operators in eval mode, the second with a projection.

    With batch statistics: a convolution, a normalisation in front of the next one, a normalisation with the shortcut.
    """

    # The last block of a model whose weights are not channels_last hands out a contiguous map, as torchvision's does,
    # so that `.view(n, -1)` behind it works.
    hands_out_contiguous = False
    activation_memory = "default"  # see set_activation_memory
    _plain = _as_plain(tv.BasicBlock.forward)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            out = fused_block(self, x)
            if out is not None:
                return out.contiguous() if self.hands_out_contiguous and not is_channels_last(self.conv2) else out
        return self._plain(x)

    @torch.jit.unused
    def why_plain(self) -> str | None:
        """Why this block runs torch's operators, judged by its modules, or None if it is fused."""
        training = uses_batch_statistics(self.bn1)
        return (
            why_plain_conv_bn("conv1", self.conv1, "bn1", self.bn1, training)
            or why_plain_conv_bn("conv2", self.conv2, "bn2", self.bn2, training)
            or why_plain_relu("relu", self.relu)
            or why_plain_projection(self.downsample, training)
        )

    def _fused(self, x: Tensor) -> Tensor:
        out = conv_bn(x, self.conv1, self.bn1)
        return conv_bn_shortcut(out, self.conv2, self.bn2, x, self.downsample)

    def _fused_training(self, x: Tensor) -> Tensor:
        out, shortcut = fork(x, self.conv1, self.downsample)
        out = norm_conv(out, self.bn1, self.conv2)
        return norm_shortcut(out, self.bn2, shortcut, self.downsample, self.activation_memory, widens=False)


class PlainBlock(BasicBlock):
    """A BasicBlock with nothing going past it: relu(bn2(conv2(relu(bn1(conv1(x)))))). Its ``downsample`` is None.

    The block of the plain networks that He et al. (2015) compare residual ones with.
    """

    def _plain(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))

    def _fused(self, x: Tensor) -> Tensor:
        return conv_bn(conv_bn(x, self.conv1, self.bn1), self.conv2, self.bn2)

    def _fused_training(self, x: Tensor) -> Tensor:
        return norm(norm_conv(conv(x, self.conv1), self.bn1, self.conv2), self.bn2)


class Bottleneck(tv.Bottleneck):
    """torchvision's Bottleneck (V1.5, stride in the 3x3): three fused operators in eval, the last with a projection.

    With batch statistics as `BasicBlock`.
    """

    hands_out_contiguous = False  # see BasicBlock
    activation_memory = "default"  # see set_activation_memory
    _plain = _as_plain(tv.Bottleneck.forward)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            out = fused_block(self, x)
            if out is not None:
                return out.contiguous() if self.hands_out_contiguous and not is_channels_last(self.conv2) else out
        return self._plain(x)

    @torch.jit.unused
    def why_plain(self) -> str | None:
        """Why this block runs torch's operators, judged by its modules, or None if it is fused."""
        training = uses_batch_statistics(self.bn1)
        return (
            why_plain_conv_bn("conv1", self.conv1, "bn1", self.bn1, training)
            or why_plain_conv_bn("conv2", self.conv2, "bn2", self.bn2, training)
            or why_plain_conv_bn("conv3", self.conv3, "bn3", self.bn3, training)
            or why_plain_relu("relu", self.relu)
            or why_plain_projection(self.downsample, training)
        )

    def _fused(self, x: Tensor) -> Tensor:
        out = conv_bn(x, self.conv1, self.bn1)
        out = conv_bn(out, self.conv2, self.bn2)
        return conv_bn_shortcut(out, self.conv3, self.bn3, x, self.downsample)

    def _fused_training(self, x: Tensor) -> Tensor:
        out, shortcut = fork(x, self.conv1, self.downsample)
        out = norm_conv(out, self.bn1, self.conv2)
        out = norm_conv(out, self.bn2, self.conv3)
        return norm_shortcut(out, self.bn3, shortcut, self.downsample, self.activation_memory, widens=True)
