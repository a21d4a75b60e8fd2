"""What conv_bn_relu on the CPU prepares once for the kernels that csrc/cpu/conv_bn_relu.cpp calls.

BatchNorm is folded into weight and bias in float32. For oneDNN's fused convolution the weight is reordered once per
input shape into the blocked layout that oneDNN asks for (without that, oneDNN reorders it in every call: ResNet-18 at
batch 1 takes 330 ms instead of 33 ms on 2 Zen 3 cores); for our own kernel of the first layer into blocks of filters.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..choose import has_few_channels, onednn_runs

# Input shapes whose packed weights are kept. Most share one layout and then one copy.
_SHAPES_PER_WEIGHT = 8


class Geometry(NamedTuple):
    """Stride, padding, dilation ([2] each, height first) and groups of a convolution."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


class Packed(NamedTuple):
    """What one input shape [N, C, H, W] needs."""

    weight: Tensor  # as the kernel wants it
    output_size: torch.Size  # [N, K, P, Q]


def fold(
    weight: Tensor,  # [K, C / groups, R, S]
    bias: Tensor | None,  # [K]
    bn_weight: Tensor | None,  # [K]
    bn_bias: Tensor | None,  # [K]
    running_mean: Tensor,  # [K]
    running_var: Tensor,  # [K]
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float32, of the one convolution that equals convolution + inference BatchNorm."""
    scale = torch.rsqrt(running_var.float() + eps)
    if bn_weight is not None:
        scale = scale * bn_weight.float()
    shift = -running_mean.float() if bias is None else bias.float() - running_mean.float()
    shift = shift * scale
    if bn_bias is not None:
        shift = shift + bn_bias.float()
    return weight.float() * scale.view(-1, 1, 1, 1), shift


def _compute_dtype(folded: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype oneDNN computes in: the model's own where this CPU has it and the folded filters keep their precision.

    A float16 filter whose largest element is below 2^-10 loses bits to subnormals, above 2^15 it may overflow.
    """
    if dtype == torch.float32 or not onednn_runs(dtype):
        return torch.float32
    if dtype == torch.float16:
        peak = folded.abs().amax((1, 2, 3))
        if not bool(((peak == 0) | ((peak >= 2.0**-10) & (peak <= 2.0**15))).all()):
            return torch.float32
    return dtype


@dataclass
class FoldedConv:
    """A convolution with BatchNorm folded in, packed for the input shapes it has met.

    ``usable`` is False where folding would change which results are finite (a scale that is not, an overflow): then
    the unfused path must run.
    """

    bias: Tensor  # [K], in dtype
    dtype: torch.dtype  # what is computed in
    geometry: Geometry
    few_channels: bool  # whether our own kernel runs instead of oneDNN
    usable: bool
    packed: OrderedDict[torch.Size, Packed] = field(default_factory=OrderedDict)  # by input shape

    @classmethod
    def make(cls, dtype: torch.dtype, geometry: Geometry, has_residual: bool, *parameters) -> FoldedConv:
        """``parameters`` as `fold` takes them; ``dtype`` is that of the activations."""
        weight, bias = fold(*parameters)
        few_channels = not has_residual and has_few_channels(weight, geometry.groups, dtype)
        usable = torch.ops.resnet_fast._all_finite(weight) and torch.ops.resnet_fast._all_finite(bias)
        dtype = _compute_dtype(weight, dtype)
        return cls(bias.to(dtype), dtype, geometry, few_channels, usable)

    def pack(self, input_shape: torch.Size, output_size: list[int], *parameters) -> None:
        """Packs the weight for inputs of this shape, if it is not yet; ``parameters`` as `fold` takes them."""
        if input_shape in self.packed:
            return
        if self.few_channels and self.packed:  # one layout for all shapes
            weight = next(iter(self.packed.values())).weight
        elif self.few_channels:
            weight = torch.ops.resnet_fast._pack_few_channels(fold(*parameters)[0].contiguous())
        else:
            weight = self._in_onednn_layout(fold(*parameters)[0].to(self.dtype), input_shape)
        self.packed[input_shape] = Packed(weight, torch.Size(output_size))
        if len(self.packed) > _SHAPES_PER_WEIGHT:
            self.packed.pop(next(iter(self.packed)), None)

    def _in_onednn_layout(self, folded: Tensor, input_shape: torch.Size) -> Tensor:
        stride, padding, dilation, groups = self.geometry
        weight = torch.ops.mkldnn._reorder_convolution_weight(folded, padding, stride, dilation, groups, input_shape)
        layout = torch.ops.mkldnn._get_mkldnn_serialized_md(weight)
        for other in list(self.packed.values()):
            if torch.equal(torch.ops.mkldnn._get_mkldnn_serialized_md(other.weight), layout):
                return other.weight
        return weight
