"""conv_bn_relu on the CPU through oneDNN's fused convolution, as torch exposes it.

One oneDNN call computes the convolution with bias, residual and ReLU. BatchNorm is folded into weight and bias in
float32, and the weight is reordered once per input shape into the blocked layout that oneDNN asks for (without that,
oneDNN reorders it in every call: ResNet-18 at batch 1 takes 330 ms instead of 33 ms on 2 Zen 3 cores).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..choose import onednn_runs

# Input shapes whose packed weights are kept. Most share one layout and then one copy.
_SHAPES_PER_WEIGHT = 8


@dataclass(frozen=True)
class Geometry:
    """Stride, padding, dilation ([2] each, height first) and groups of a convolution."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


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
    dtype: torch.dtype  # what oneDNN computes in
    usable: bool
    packed: OrderedDict[tuple, Tensor] = field(default_factory=OrderedDict)  # input shape -> weight in oneDNN's layout

    @classmethod
    def make(cls, dtype: torch.dtype, *parameters) -> FoldedConv:
        """``parameters`` as `fold` takes them; ``dtype`` is that of the activations."""
        weight, bias = fold(*parameters)
        usable = torch.ops.resnet_fast._all_finite(weight) and torch.ops.resnet_fast._all_finite(bias)
        dtype = _compute_dtype(weight, dtype)
        return cls(bias.to(dtype), dtype, usable)

    def weight_for(self, input: Tensor, geometry: Geometry, *parameters) -> Tensor:
        """The packed weight for this input's shape; packed at the first meeting."""
        shape = tuple(input.shape)
        weight = self.packed.get(shape)
        if weight is None:
            weight = self._pack(shape, geometry, fold(*parameters)[0].to(self.dtype))
            self.packed[shape] = weight
            if len(self.packed) > _SHAPES_PER_WEIGHT:
                self.packed.pop(next(iter(self.packed)), None)
        return weight

    def _pack(self, shape: tuple, geometry: Geometry, folded: Tensor) -> Tensor:
        g = geometry
        weight = torch.ops.mkldnn._reorder_convolution_weight(folded, g.padding, g.stride, g.dilation, g.groups, shape)
        layout = torch.ops.mkldnn._get_mkldnn_serialized_md(weight)
        for other in list(self.packed.values()):
            if torch.equal(torch.ops.mkldnn._get_mkldnn_serialized_md(other), layout):
                return other
        return weight


def conv_relu_onednn(
    input: Tensor,  # [N, C, H, W], any strides
    weight: Tensor,  # from FoldedConv.weight_for
    bias: Tensor,  # [K]
    residual: Tensor | None,  # [N, K, P, Q], any strides
    geometry: Geometry,
    relu: bool,
) -> Tensor:
    """relu(conv2d(input, weight, bias) + residual) in one oneDNN call; [N, K, P, Q], channels_last, input's dtype."""
    dtype = input.dtype
    x = input.contiguous(memory_format=torch.channels_last)
    r = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    # oneDNN's fused ReLU turns NaN into 0. A NaN in the result comes from a NaN or an infinity in what is read (weights
    # were checked when folded), so those are looked for first: one read at 25 GB/s, by estimate 2-3 % of ResNet-50.
    finite = not relu or (_all_finite(x) and (r is None or _all_finite(r)))
    x = x.to(bias.dtype)
    r = None if r is None else r.to(bias.dtype)

    geometry_args = (geometry.padding, geometry.stride, geometry.dilation, geometry.groups)
    activation = "relu" if relu and finite else None
    if r is None:
        out = _convolution(x, weight, bias, *geometry_args, activation or "none", [], "")
    else:
        out = _convolution_binary(x, r, weight, bias, *geometry_args, "add", 1.0, activation, [], "")
    if relu and not finite:
        out = out.relu_()
    return out.to(dtype)


_all_finite = torch.ops.resnet_fast._all_finite.default
_convolution = torch.ops.mkldnn._convolution_pointwise.default
_convolution_binary = torch.ops.mkldnn._convolution_pointwise.binary
