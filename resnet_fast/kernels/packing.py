"""What conv_bn_relu on the CPU prepares once for its kernels (csrc/cpu/), and the call of the one that is chosen.

BatchNorm is folded into weight and bias in float32. Our own kernels take the weight in panels of filters, one layout
for all input shapes; Winograd's algorithm takes it transformed. For oneDNN's fused convolution the weight is reordered
once per input shape into the blocked layout that oneDNN asks for (without that, oneDNN reorders it in every call:
ResNet-18 at batch 1 takes 330 ms instead of 33 ms on 2 Zen 3 cores).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..choose import ConvKernel, choose_conv_on_cpu, onednn_runs

_onednn = torch.ops.resnet_fast._conv_onednn.default
_depthwise = torch.ops.resnet_fast._conv_depthwise.default
_few_channels = torch.ops.resnet_fast._conv_few_channels.default
_few_channels_max_pool = torch.ops.resnet_fast._conv_few_channels_max_pool.default
_gemm = torch.ops.resnet_fast._conv_gemm.default
_grouped = torch.ops.resnet_fast._conv_grouped.default
_pack_gemm = torch.ops.resnet_fast._pack_gemm.default
_winograd = torch.ops.resnet_fast._conv_winograd.default
_winograd_stem = torch.ops.resnet_fast._conv_winograd_stem.default
_winograd_stem_max_pool = torch.ops.resnet_fast._conv_winograd_stem_max_pool.default

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

    kernel: ConvKernel
    weight: Tensor  # as the kernel wants it
    bias: Tensor  # [K], in the dtype that the kernel wants
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


def compute_dtype(folded: Tensor, dtype: torch.dtype) -> torch.dtype:
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


def pack_few_channels(weight: Tensor, dilation: list[int], bfloat16: bool) -> Tensor:
    """weight [K, C, R, S] for `_conv_few_channels`: what a row of the kernel meets lies side by side in its copy of the
    input, [S][C], unless the row has dilation."""
    if dilation[1] == 1:
        weight = weight.permute(0, 3, 1, 2).flatten(1, 2).unsqueeze(3)  # [K, S * C, R, 1]
    return _pack_gemm(weight, 1, bfloat16)


def pack_weight(folded: Tensor, kernel: ConvKernel, geometry: Geometry) -> Tensor:
    """The weight [K, C / groups, R, S], float32 and contiguous, as one of our kernels wants it for every shape."""
    if kernel.name == "winograd":
        return torch.ops.resnet_fast._pack_winograd(folded, kernel.tile, kernel.bfloat16)
    if kernel.name == "winograd stem":
        return torch.ops.resnet_fast._pack_winograd_stem(folded)
    if kernel.name == "depthwise":
        return folded.squeeze(1).permute(1, 2, 0).contiguous()  # [R, S, C]
    if kernel.name == "grouped":
        return torch.ops.resnet_fast._pack_grouped(folded, geometry.groups, kernel.bfloat16)
    if kernel.name == "gemm":
        return _pack_gemm(folded, geometry.groups, kernel.bfloat16)
    return pack_few_channels(folded, geometry.dilation, kernel.bfloat16)


def without_winograd(kernel: ConvKernel, bfloat16: bool = False) -> ConvKernel:
    """The kernel for values that are not finite, or where Winograd's algorithm may not be used."""
    return ConvKernel("few channels" if kernel.reads_images else "gemm", bfloat16=bfloat16)


def pack_for_onednn(folded: Tensor, geometry: Geometry, input_shape: Sequence[int]) -> Tensor:
    """The weight [K, C / groups, R, S], in the dtype to compute in, in oneDNN's layout for inputs of this shape."""
    stride, padding, dilation, groups = geometry
    return torch.ops.mkldnn._reorder_convolution_weight(folded, padding, stride, dilation, groups, input_shape)


@dataclass
class FoldedConv:
    """A convolution with BatchNorm folded in, packed for the input shapes it has met.

    ``usable`` is False where folding would change which results are finite (a scale that is not, an overflow): then
    the unfused path must run.
    """

    bias: Tensor  # [K], float32
    dtype: torch.dtype  # what oneDNN would compute in
    geometry: Geometry
    has_residual: bool
    usable: bool
    packed: OrderedDict[torch.Size, Packed] = field(default_factory=OrderedDict)  # by input shape
    direct: Tensor | None = None  # once Winograd's algorithm has met values that are not finite

    @classmethod
    def make(cls, dtype: torch.dtype, geometry: Geometry, has_residual: bool, *parameters) -> FoldedConv:
        """``parameters`` as `fold` takes them; ``dtype`` is that of the activations."""
        weight, bias = fold(*parameters)
        usable = torch.ops.resnet_fast._all_finite(weight) and torch.ops.resnet_fast._all_finite(bias)
        dtype = compute_dtype(weight, dtype)
        return cls(bias, dtype, geometry, has_residual, usable)

    def tensors(self) -> list[Tensor]:
        """Everything kept; what several input shapes share is listed for each."""
        direct = [] if self.direct is None else [self.direct]
        return [self.bias, *direct, *(p.weight for p in list(self.packed.values()))]

    def pack(self, input_shape: torch.Size, output_size: list[int], *parameters) -> Packed:
        """The weight for inputs of this shape, packed now if it is not yet; ``parameters`` as `fold` takes them."""
        packed = self.packed.get(input_shape)
        if packed is not None:
            return packed
        kernel = choose_conv_on_cpu(
            input_shape, parameters[0].shape, output_size, *self.geometry, self.has_residual, self.dtype
        )
        bias = self.bias.to(self.dtype) if kernel.name == "onednn" else self.bias
        weight = self._weight(kernel, input_shape, parameters)
        packed = self.packed[input_shape] = Packed(kernel, weight, bias, torch.Size(output_size))
        if len(self.packed) > _SHAPES_PER_WEIGHT:
            self.packed.popitem(last=False)
        return packed

    def pack_direct(self, kernel: ConvKernel, *parameters) -> None:
        """Packs the weight for the kernel that computes again what Winograd's ``kernel`` has not."""
        self.direct = pack_weight(fold(*parameters)[0].contiguous(), without_winograd(kernel), self.geometry)

    def _weight(self, kernel: ConvKernel, input_shape: torch.Size, parameters: tuple) -> Tensor:
        if kernel.name == "onednn":
            return self._in_onednn_layout(fold(*parameters)[0].to(self.dtype), input_shape)
        for other in list(self.packed.values()):  # ours have one layout for all shapes
            if other.kernel == kernel:
                return other.weight
        return pack_weight(fold(*parameters)[0].contiguous(), kernel, self.geometry)

    def _in_onednn_layout(self, folded: Tensor, input_shape: torch.Size) -> Tensor:
        weight = pack_for_onednn(folded, self.geometry, input_shape)
        layout = torch.ops.mkldnn._get_mkldnn_serialized_md(weight)
        for other in list(self.packed.values()):
            if other.kernel.name == "onednn" and torch.equal(
                torch.ops.mkldnn._get_mkldnn_serialized_md(other.weight), layout
            ):
                return other.weight
        return weight

    def run_max_pool(
        self, packed: Packed, input: Tensor, kernel_size: list[int], stride: list[int], padding: list[int]
    ) -> Tensor | None:
        """The convolution with a ReLU and max-pooling behind it, where the kernel reads images; None as `run`."""
        pool, weight = (kernel_size, stride, padding), packed.weight
        if packed.kernel.is_winograd:
            out, finite = _winograd_stem_max_pool(input, weight, packed.bias, self.geometry.padding, *pool)
            if finite:
                return out
            if self.direct is None:
                return None
            weight = self.direct
        return _few_channels_max_pool(input, weight, packed.bias, *self.geometry[:3], *pool)

    def run(self, input: Tensor, residual: Tensor | None, relu: bool, packed: Packed | None = None) -> Tensor | None:
        """The convolution, or None if something must be packed first or the residual does not fit.

        input [N, C, H, W], residual [N, K, P, Q]. ``packed`` is what `pack` has returned: other threads may have
        pushed it out of this object since.
        """
        if packed is None:
            packed = self.packed.get(input.shape)
            if packed is None:
                return None
        kernel, weight, bias, size = packed
        if residual is not None and not (residual.shape == size and residual.dtype == input.dtype and residual.is_cpu):
            return None
        if kernel.is_winograd:
            out, finite = self._run_winograd(packed, input, residual, relu)
            if finite:
                return out
            if self.direct is None:
                return None
            kernel, weight = without_winograd(kernel), self.direct
        if kernel.name == "onednn":
            return _onednn(input, weight, bias, residual, *self.geometry, relu)
        if kernel.name == "depthwise":
            return _depthwise(input, weight, bias, residual, *self.geometry[:3], relu)
        if kernel.name == "grouped":
            return _grouped(input, weight, bias, residual, *self.geometry, relu)
        if kernel.name == "few channels":
            return _few_channels(input, weight, bias, *self.geometry[:3], relu)
        return _gemm(input, weight, bias, residual, *self.geometry, relu)

    def _run_winograd(self, packed: Packed, input: Tensor, residual: Tensor | None, relu: bool) -> tuple[Tensor, bool]:
        padding = self.geometry.padding
        if packed.kernel.name == "winograd stem":
            return _winograd_stem(input, packed.weight, packed.bias, padding, relu)
        return _winograd(input, packed.weight, packed.bias, residual, padding, relu)
