"""What a fused ResNet has besides its blocks: a stem in front of them, an average pooling behind."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import avg_pool_flatten
from .fused import (
    conv_bn,
    is_plain_tensor,
    may_fuse_input,
    may_pool,
    uses_batch_statistics,
    why_plain_avg_pool,
    why_plain_conv_bn,
    why_plain_relu,
)
from .training import conv, norm


class FusedEnds:
    """Goes in front of nn.Module for a model with conv1, bn1 and relu first and avgpool last, in front of fc."""

    def _stem(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if is_plain_tensor(x) and self.why_plain() is None:
                training = uses_batch_statistics(self.bn1)
                if may_fuse_input(x, self.conv1, training, has_residual=False):
                    return norm(conv(x, self.conv1), self.bn1) if training else conv_bn(x, self.conv1, self.bn1)
        return self.relu(self.bn1(self.conv1(x)))

    def _average(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if is_plain_tensor(x) and not self.training:
                if why_plain_avg_pool("avgpool", self.avgpool) is None and may_pool("avg_pool_flatten", x):
                    return avg_pool_flatten(x)
        return torch.flatten(self.avgpool(x), 1)

    @torch.jit.unused
    def why_plain(self) -> str | None:
        """Why the stem (conv1, bn1, relu) runs torch's operators, judged by its modules, or None if it is fused."""
        training = uses_batch_statistics(self.bn1)
        return why_plain_conv_bn("conv1", self.conv1, "bn1", self.bn1, training) or why_plain_relu("relu", self.relu)
