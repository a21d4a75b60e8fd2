"""Which kernel runs: one function per operator, each threshold with its measured reason.

``RESNET_FAST_LOG=choice`` prints every new choice to stderr; `resnet_fast.explain` shows them block by block.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from .backends import TRAINING, backends, cpu_level, forced, interpreter_has_bfloat16, tf32_allowed

_16_BIT = (torch.bfloat16, torch.float16)
_FUSED_DTYPES = (torch.float32, *_16_BIT)
# Tiles of the CUDA C++ convolution, as in `ConvTile` (csrc/cuda/conv_bn_relu_sm80.h): pixels and filters of a block.
CUDA_TILES = ("m128n128", "m128n64", "m64n64", "m128n32", "halo_m128n128", "halo_m128n64")


@dataclass(frozen=True)
class Choice:
    """The backend an operator runs on, the kernel in words, and the reason."""

    backend: str
    kernel: str
    reason: str


def choose(operator: str, device: str, dtype: torch.dtype) -> Choice:
    """The backend for ``operator`` on tensors of this device type and dtype, obeying `use_backend`.

    Raises RuntimeError if a forced backend has no kernel for it; the message says what it lacks.
    """
    # What torch.backends.mkldnn.enabled and torch.backends.cudnn.enabled read, at a sixth of their price.
    if device == "cuda":
        library_enabled = torch._C._get_cudnn_enabled()
    else:
        # torch.export switches oneDNN off while it traces; what it traces runs with it.
        library_enabled = torch._C._get_mkldnn_enabled() or torch.compiler.is_exporting()
    name = forced()
    tf32 = name != "cuda" or dtype != torch.float32 or tf32_allowed()
    return _choose(operator, device, dtype, name, library_enabled, tf32)


@cache
def _choose(
    operator: str, device: str, dtype: torch.dtype, name: str | None, library_enabled: bool, tf32: bool
) -> Choice:
    if name:
        choice = _forced_choice(operator, device, dtype, name, tf32)
    else:
        choice = _best(operator, device, dtype, library_enabled)
    if "choice" in os.environ.get("RESNET_FAST_LOG", "").split(","):
        print(
            f"[resnet_fast] {operator} {device} {dtype}: {choice.backend} ({choice.kernel}), {choice.reason}",
            file=sys.stderr,
        )
    return choice


def _forced_choice(operator: str, device: str, dtype: torch.dtype, name: str, tf32: bool) -> Choice:
    backend = backends()[name]
    if name != "reference":
        if operator not in backend.operators:
            raise RuntimeError(f"backend {name!r} has no kernel for {operator}; it has {', '.join(backend.operators)}")
        if device not in backend.devices:
            takes = ", ".join(backend.devices) or f"nothing here ({backend.reason})"
            raise RuntimeError(f"backend {name!r} cannot run {operator} on a {device} tensor; it takes {takes}")
        if dtype not in _FUSED_DTYPES:
            raise RuntimeError(
                f"backend {name!r} cannot run {operator} in {dtype}; it takes float32, bfloat16 and float16 "
                "(float64 runs on the reference)"
            )
        if name == "triton" and dtype == torch.bfloat16 and device == "cpu" and not interpreter_has_bfloat16():
            raise RuntimeError(
                "backend 'triton' cannot run bfloat16 in Triton's interpreter, which computes on its raw bits"
            )
        if name == "cuda" and operator.startswith("conv_bn") and not tf32:
            raise RuntimeError(
                f"backend 'cuda' cannot run {operator} in float32, which it multiplies as TF32: "
                "torch.backends.cudnn.allow_tf32 is False"
            )
    return Choice(name, kernel_name(operator, name, dtype), "use_backend")


def _best(operator: str, device: str, dtype: torch.dtype, library_enabled: bool) -> Choice:
    def choice(backend: str, reason: str) -> Choice:
        return Choice(backend, kernel_name(operator, backend, dtype), reason)

    if dtype not in _FUSED_DTYPES:
        return choice("reference", f"no fused kernel for {dtype}")
    if device == "cpu":
        if operator not in backends()["cpu"].operators:
            return choice("reference", "this torch has no oneDNN")
        if operator in ("max_pool", "max_pool_with_indices", "avg_pool_flatten"):
            return choice("cpu", "vectors of channels on maps in channels_last")
        if operator.startswith("batch_norm") and operator != "batch_norm_relu_conv":
            return choice("cpu", "fused: one read for statistics, one pass to apply them")
        if operator != "add_relu" and not library_enabled:
            return choice("reference", "torch.backends.mkldnn.enabled is False")
        if operator == "conv_bn_relu_projection":
            return choice("cpu", "two fused convolutions: one pass over the output of each")
        return choice("cpu", "fused: one pass over the output")
    if device == "cuda":
        works = [name for name, backend in backends().items() if "cuda" in backend.devices]
        if operator == "add_relu" and ("cuda" in works or "triton" in works):
            best = "cuda" if "cuda" in works else "triton"
            return choice(best, "fused: 3 transfers an element instead of 5")
        if operator in ("conv_bn_relu", "conv_bn_relu_projection") and not library_enabled:
            return choice("reference", "torch.backends.cudnn.enabled is False")
        if operator == "conv_bn_relu" and "cudnn" in works:
            return choice("cudnn", "fused: one pass over the output; faster than the CUDA C++ kernel on sm_90")
        if operator == "conv_bn_relu_projection" and "cudnn" in works:
            return choice("cudnn", "two fused convolutions; both in one Triton kernel has not been measured yet")
        if operator in (*TRAINING, "max_pool", "avg_pool_flatten"):
            if "cuda" not in works:
                # A step of ResNet-50, batch 256, on an H200 whose CPU is slow: 75 ms called eagerly, in torch 56.
                return choice("reference", "no CUDA C++ kernels; in Triton launches take longer than is gained")
            if operator in TRAINING:
                return choice(
                    "cuda", "fused: one read for statistics, one pass to apply them; convolutions are cuDNN's"
                )
            return choice("cuda", "vectors of channels on maps in channels_last")
        if operator == "conv_bn_relu_max_pool":
            return choice("reference", "conv_bn_relu, then torch's max-pooling: the kernel of both is not measured yet")
        return choice("reference", backends()["cudnn"].reason)
    return choice("reference", f"no kernels for {device} tensors")


def kernel_name(operator: str, backend: str, dtype: torch.dtype) -> str:
    """The kernel in words, for `explain` and the log."""
    if backend == "reference":
        return "torch"
    if backend == "cpu":
        if operator in ("add_relu", "max_pool", "avg_pool_flatten"):
            return f"C++ {cpu_level()}"
        in_bfloat16 = dtype == torch.bfloat16 and multiplies_bfloat16()
        if dtype != torch.float32 and onednn_runs(dtype) and not in_bfloat16:
            return "oneDNN"
        in_float32 = "" if dtype == torch.float32 or in_bfloat16 else " in float32"
        return f"C++ {cpu_level()}{in_float32} (some groups: oneDNN)"
    return {"cuda": "CUDA C++", "cudnn": "cuDNN (large maps: Triton)", "triton": "Triton"}[backend]


@cache
def _triton_takes_cuda() -> bool:
    return "cuda" in backends()["triton"].devices


@dataclass(frozen=True)
class Measured:
    """A kind of convolution, and the backend that was measured to be the fastest for it: groups 1, ``dtypes``, at least
    ``outputs`` elements of output; where they are given, ``kernel`` the window's height and width, ``channels`` the
    most that there may be, ``strided``, ``residual`` and ``relu`` whether there is one."""

    backend: str
    reason: str
    outputs: int = 0
    dtypes: tuple[torch.dtype, ...] = _16_BIT
    kernel: int | None = None
    channels: int | None = None
    strided: bool | None = None
    residual: bool | None = None
    relu: bool | None = None

    def holds(self, weight: Tensor, strided: bool, residual: bool, relu: bool) -> bool:
        """For enough ``outputs``."""
        _, c, r, s = weight.shape
        return (
            weight.dtype in self.dtypes
            and (self.kernel is None or r == s == self.kernel)
            and (self.channels is None or c <= self.channels)
            and self.strided in (None, strided)
            and self.residual in (None, residual)
            and self.relu in (None, relu)
        )


# By architecture; the first entry that holds. What no entry names, and every architecture that is not here, goes to
# cuDNN: that is safe, not measured. Times in milliseconds, bfloat16, batch 256
# (benchmarks/gpu_campaign.py --steps kernels). Small maps are cuDNN's: there the CPU's time counts, and Triton takes
# more of it to launch; 2^25 elements are those of 42 images in ResNet-50's first stage.
# No entry says "cuda": on sm_90 the CUDA C++ convolutions, made for sm_80, take 1.4 to 2.8 times as long as cuDNN's;
# without a ReLU 0.6 to 1.1, but Triton's less.
_large = partial(Measured, "triton", outputs=2**25)
MEASURED = {
    "sm_90": (  # H200, Triton against cuDNN
        _large("7x7 stem: 0.66 against 1.94", channels=4),
        _large("1x1 on 64 channels, stride 2: 0.08 against 0.39 on an H100", kernel=1, channels=64, strided=True),
        # Without a ReLU cuDNN has no fused bias, and a pass of its own costs more than its convolution gains.
        _large("1x1, 64 to 256 filters, no ReLU: 0.24 against 0.71", relu=False),
    )
}


@cache
def cuda_architecture(device: int) -> str:
    """As in "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def choose_on_cuda(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    groups: int,
    has_residual: bool,
    relu: bool,
    architecture: str | None = None,
) -> str:
    """The backend of a convolution on CUDA where `choose` says "cudnn": that or the one that `MEASURED` names.

    input [N, C, H, W], weight [K, C / groups, R, S]; architecture: input's device's unless given.
    """
    measured = MEASURED.get(architecture or cuda_architecture(input.get_device()))
    if measured is None or groups != 1:
        return "cudnn"
    outputs = input.shape[0] * input.shape[2] * input.shape[3] // (stride[0] * stride[-1]) * weight.shape[0]
    for entry in measured:
        if outputs >= entry.outputs and entry.holds(weight, stride[0] > 1, has_residual, relu):
            return entry.backend if entry.backend != "triton" or _triton_takes_cuda() else "cudnn"
    return "cudnn"


def choose_for_large(elements: int) -> str:
    """The backend of a convolution on CUDA whose larger map has that many elements: cuDNN's fused convolution, as torch
    calls it, takes fewer than 2^31."""
    if elements < 2**31:
        return "cudnn"
    return "triton" if _triton_takes_cuda() else "reference"


@dataclass(frozen=True)
class ConvKernel:
    """Which kernel computes a convolution on the CPU.

    ``name`` is "depthwise", "few channels", "gemm", "grouped", "winograd", "winograd stem" (C++, csrc/cpu/) or
    "onednn"; ``tile`` is the width of Winograd's output tiles. ``bfloat16``: ours multiplies pairs of bfloat16 values;
    else it computes in float32.
    """

    name: str
    tile: int = 0
    bfloat16: bool = False

    @property
    def is_winograd(self) -> bool:
        """Whether results that are not finite must be computed again by another kernel."""
        return self.tile > 0

    @property
    def reads_images(self) -> bool:
        """Whether it takes maps of any strides, without a residual, and may max-pool its result."""
        return self.name in ("few channels", "winograd stem")

    def __str__(self) -> str:
        words = {
            "onednn": "oneDNN",
            "gemm": "GEMM",
            "few channels": "direct, few channels",
            "grouped": "direct, groups",
            "depthwise": "direct, depthwise",
            "winograd": f"Winograd F({self.tile},3)",
            "winograd stem": f"Winograd F({self.tile},4) of 2x2 phases",
        }
        name = words[self.name]
        return f"{name} of bfloat16" if self.bfloat16 else name


# A weight that comes from memory costs as much as this many multiplications with it: 4 bytes at 20-28 GB/s are 15-20
# multiply-adds of 2 Zen 3 cores (98e9 a second), and prefetching hides a part. Whole networks in float32 on 2 Zen 5
# cores: at batch 1 F(2,3) instead of F(5,3) for 256 channels at 14x14 (from 11.1 on) took 0.95 (ResNet-18) and 0.97
# (ResNet-50) of the time, F(2,3) instead of F(4,3) for 512 channels at 7x7 0.80 and 0.94; at batch 2 the latter (from
# 11.6 on) took 1.03 times as long.
_STREAMING = 11.3
# Winograd's transforms, for a value of an input tile and for a product, in multiplications: with 64 channels and
# filters they take a quarter of the time of the products.
_INPUT_TRANSFORM, _OUTPUT_TRANSFORM = 10, 7


# In training the weight is packed in every call: what that costs for a product of a tile, and how many times as long
# the rest takes as the products alone would say. By these, of 512 channels at 7x7 batch 1 to 4 are computed directly
# (6.0 ms at batch 4, F(4,3) 6.1 with its packing), batch 16 by F(4,3) (10.2 and 12.4 ms); of 256 at 14x14 all by
# Winograd's algorithm (1.2 and 1.4 ms at batch 1; 2 Emerald Rapids cores).
_PACKING, _PACKING_FACTOR = 25.0, 1.3


def _winograd_cost(
    kernel: ConvKernel, outputs: Sequence[int], channels: int, filters: int, packs: bool = False
) -> float:
    """Time of Winograd's algorithm per channel and filter, in multiplications of float32; outputs [N, P, Q]. ``packs``:
    with that of packing the weight.

    Products of bfloat16 take half the time. So F(2,3) of bfloat16 and F(4,3) are level for 64 channels at 56x56 (1540
    and 1560 GFLOP/s at batch 8 on 2 Zen 5 cores), for more channels the former wins (256 at 14x14: 2000 and 1230), for
    fewer the latter (32 at 16x16: 950 and 1040).
    """
    n, p, q = outputs
    tiles = n * -(-p // kernel.tile) * -(-q // kernel.tile)
    product = 0.5 if kernel.bfloat16 else 1.0
    transforms = _INPUT_TRANSFORM / filters + _OUTPUT_TRANSFORM / channels
    positions = (kernel.tile + 2) ** 2
    if packs:
        return _PACKING_FACTOR * positions * (tiles * (product + transforms) + product * _STREAMING + _PACKING)
    return positions * (tiles * (product + transforms) + product * _STREAMING)


# Multiplications of a block below which torch's operators train it in less time: a call of ours takes 0.2 to 0.5 ms
# longer for each convolution, forward and backward. torch's time over ours with 16 to 128 channels, weights in
# channels_last (contiguous): 0.52-0.79 (0.65-1.19) at 20 million, 0.70-0.88 (0.79-1.26) at 40, 0.72-1.03 (0.82-1.63) at
# 75, 0.80-1.15 (0.99-1.66) at 150, 1.18-1.74 (1.17-2.04) from 300 on. With 512 channels at 2x2 1.06-1.47 (0.71-1.05)
# from 40 to 150, where channels_last loses by it (BasicBlock and Bottleneck; 2 Emerald Rapids cores).
_LEAST_TO_TRAIN = {True: 100_000_000, False: 50_000_000}


def is_small_to_train(multiplications: int, channels_last: bool) -> bool:
    """Whether a block of so many multiplications trains faster on torch's operators on a CPU; never where a backend is
    forced. channels_last: the layout of its weights."""
    return forced() is None and multiplications < _LEAST_TO_TRAIN[channels_last]


@cache
def multiplies_bfloat16() -> bool:
    """Whether our kernels multiply bfloat16 and nothing here does it faster: oneDNN has the tiles of AMX."""
    return torch.ops.resnet_fast._multiplies_bf16() and not torch.cpu._is_amx_tile_supported()


def choose_conv_on_cpu(
    input_size: Sequence[int],
    weight_size: Sequence[int],
    output_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    has_residual: bool,
    dtype: torch.dtype,
    packs: bool = False,
) -> ConvKernel:
    """The kernel for a convolution that `choose` has sent to the backend "cpu".

    input_size [N, C, H, W], weight_size [K, C / groups, R, S], output_size [N, K, P, Q]. ``dtype`` is the activations'.
    ``packs``: the weight is packed for this call alone, as in training.
    """
    k, c = weight_size[:2]
    if _onednn_errs(weight_size, padding, dilation, groups, dtype):
        onednn, in_16_bit = ConvKernel("gemm"), False
    else:
        onednn, in_16_bit = ConvKernel("onednn"), dtype != torch.float32 and onednn_runs(dtype)
    in_bfloat16 = dtype == torch.bfloat16 and multiplies_bfloat16()
    if in_16_bit and not in_bfloat16:
        return onednn  # ours compute in float32
    if not has_residual and has_few_channels(weight_size, groups):
        return _cheapest(conv_costs(weight_size, output_size, stride, dilation, in_bfloat16))
    if c == 1 < groups == k:
        fast = _is_fast_depthwise(weight_size, output_size, stride, dilation, in_16_bit)
        return ConvKernel("depthwise") if fast else onednn
    if groups > 1:
        pairs = in_bfloat16 and c % 2 == 0
        fast = _is_fast_grouped(weight_size, stride, dilation, groups, in_16_bit, pairs)
        return ConvKernel("grouped", bfloat16=pairs) if fast else onednn
    if min(c, k) < _vector_width():
        return onednn
    kernel = _cheapest(conv_costs(weight_size, output_size, stride, dilation, in_bfloat16, packs))
    # Of so few pixels packing takes as long as all the rest: 3x3, 512 channels at 7x7, batch 1, 3.8 ms, oneDNN 2.3.
    few = output_size[0] * output_size[2] * output_size[3] <= 64 and weight_size[2] * weight_size[3] > 1
    return onednn if packs and few and kernel.name == "gemm" else kernel


def choose_weight_gradient_on_cpu(
    weight_size: Sequence[int],
    output_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    normalises: bool,
    dtype: torch.dtype,
) -> str:
    """What computes the gradient of a weight: "winograd", "products" (both csrc/cpu/kernels/conv_weight_grad.cpp, in
    float32) or "onednn".

    weight_size [K, C / groups, R, S], output_size [N, K, P, Q]; ``normalises``: the convolution's input is a normalised
    map that ours need not write.
    """
    k, c, r, s = weight_size
    if groups > 1 or min(c, k) < _vector_width() or (dtype != torch.float32 and onednn_runs(dtype)):
        return "onednn"
    n, _, p, q = output_size
    if r == s == 3 and max(*stride, *dilation) == 1:
        # Of few tiles the transform of the sums would be most of it: of 512 channels at 7x7, 4 tiles an image, 2.5 ms
        # and directly 1.5 at batch 1, 3.5 and 5.9 at batch 2 (2 Emerald Rapids cores). Nor where most of a tile lies
        # beside the map: 512 channels at 1x1, batch 16, 4.2 ms and 1.3, of 256 at 2x2 0.9 and 0.5.
        tiles = n * -(-p // 4) * -(-q // 4)
        return "winograd" if tiles >= 8 and n * p * q >= 6 * tiles else "products"
    # 1x1 take 0.96-1.2 of oneDNN's time, without the map in front that oneDNN needs written; 3x3 with stride 2
    # 0.84-0.97. Not so
    # where the sums do not fit into a core's L2 cache: then maps must be small.
    fits = k * c * r * s <= 2**18
    small = 7**2 if r * s == 1 and not normalises else math.inf if fits else 14**2
    return "products" if p * q <= small and max(r, s) <= 3 else "onednn"


def _cheapest(costs: dict[ConvKernel, float]) -> ConvKernel:
    return min(costs, key=costs.__getitem__)


def conv_costs(
    weight_size: Sequence[int],
    output_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    in_bfloat16: bool,
    packs: bool = False,
) -> dict[ConvKernel, float]:
    """The kernels of ours for a convolution without groups, and the time of each in multiplications of float32 per
    channel and filter.

    weight_size [K, C, R, S], output_size [N, K, P, Q]; ``in_bfloat16``: they multiply pairs of bfloat16; ``packs``: see
    `choose_conv_on_cpu`.
    """
    k, c, r, s = weight_size
    n, _, p, q = output_size
    if has_few_channels(weight_size, 1):
        direct = r * s * n * p * q
        costs = {ConvKernel("few channels", bfloat16=in_bfloat16): direct * (0.6 if in_bfloat16 else 1.0)}
        if _is_fast_stem(weight_size, output_size, stride, dilation):
            costs[ConvKernel("winograd stem", tile=3)] = direct * 0.8
        return costs
    gemm = ConvKernel("gemm", bfloat16=in_bfloat16)
    costs = {gemm: r * s * (n * p * q + _STREAMING) * (0.5 if in_bfloat16 else 1.0)}
    if r == s == 3 and max(*stride, *dilation) == 1:
        winograd = [ConvKernel("winograd", tile) for tile in (4, 5, 2)]
        if in_bfloat16:
            winograd.append(ConvKernel("winograd", 2, bfloat16=True))
        costs |= {kernel: _winograd_cost(kernel, (n, p, q), c, k, packs) for kernel in winograd}
    return costs


def _onednn_errs(
    weight_size: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, dtype: torch.dtype
) -> bool:
    """Whether torch 2.14's oneDNN must not compute this, found on a CPU with AVX-512 BF16.

    weight_size [K, C / groups, R, S]. It may crash, in torch's own conv2d too, where outputs see padding alone
    (bfloat16: [1, 51, 9, 1], weight [35, 51, 3, 1], stride (3, 2), padding (2, 3); float32: [3, 10, 3, 1], weight
    [68, 5, 3, 1], stride (3, 2), padding (3, 1), dilation (3, 2), 2 groups). From one channel and a reordered weight it
    makes garbage in 16 bits ([1, 1, 6, 1], weight [33, 1, 3, 3], stride (1, 3), padding (2, 1)).
    """
    _, channels, *size = weight_size
    sees_padding_alone = any(p > d * (n - 1) for p, d, n in zip(padding, dilation, size, strict=True))
    return sees_padding_alone or (channels == 1 and groups == 1 and dtype != torch.float32)


@cache
def _vector_width() -> int:
    """Floats of a vector. Ours waste the lanes that have no channel or filter: with 8 of them at 32x32, batch 8, they
    run at 0.7 of oneDNN's speed, with 16 at 1.5 (AVX-512)."""
    return {"portable": 4, "avx2": 8}.get(cpu_level(), 16)


def has_few_channels(weight_size: Sequence[int], groups: int) -> bool:
    """Whether csrc/cpu/kernels/conv_few_channels.cpp is the fastest kernel.

    weight_size [K, C / groups, R, S]. Times as fast as oneDNN on 2 Zen 5 cores at batch 1 (32), with AVX-512 in
    float32, in bfloat16 and with AVX2: the 7x7 stem from 3 channels 1.04 (2.5), 1.33 (3.0), 1.23 (2.0); 3x3 on 32x32
    images to 64 filters 2.2 (1.4), 2.5 (1.2), 1.8 (1.1), to 8 filters 2.2 (1.03), 2.4 (1.05), 2.4 (1.2), but to 4
    filters 2.2 (1.03), 2.5 (1.03), 2.1 (0.98); 11x11 with stride 4 to 96 filters 1.1 (1.7), 1.4 (1.3), 1.3 (1.6); 16x16
    patches 1.0 (1.0), 1.5 (1.5), 1.0 (1.0). 1x1, with which no known network begins, 1.7-2.5 (0.5-1.0).
    """
    k, c, r, s = weight_size
    return c <= 4 and k >= 8 and max(r, s) <= 16 and groups == 1


def _is_fast_stem(
    weight_size: Sequence[int], output_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> bool:
    """Whether Winograd's algorithm takes a first layer and is faster than the direct kernel.

    weight_size [K, C, R, S], output_size [N, K, P, Q]. Time in that of the direct kernel, with max-pooling, from 3
    channels to 64 filters on 224x224 images, 2 Cascade Lake cores, at batch 1 (8): AVX-512 0.82-0.90 (0.77-0.82), AVX2
    0.78 (0.73), portable 0.55 (0.59). One channel leaves vectors empty. Of the time with pairs of bfloat16 F(4,4) took
    0.84-0.88 (2 Zen 5 cores); F(3,4), with 1.3 times as many products, was not measured against them, and they have the
    stem. The logits of small images are means of too few pixels for the rounding to average out: on 64x64 a random
    ResNet-50's err by 3.1e-6 without it, on 112x112 by 2.4e-6 and on 224x224 by 1.5e-6 with it (torch's by 2.3e-6,
    1.4e-6 and 0.9e-6).
    """
    _, c, *size = weight_size
    p, q = output_size[2:]
    return size == [7, 7] and c > 1 and set(stride) == {2} and max(dilation) == 1 and p * q >= 56**2


def _is_fast_depthwise(
    weight_size: Sequence[int],
    output_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    onednn_in_16_bit: bool,
) -> bool:
    """Whether csrc/cpu/kernels/conv_depthwise.cpp, which takes every kernel size, is faster than oneDNN on this one.

    weight_size [K, 1, R, S], output_size [N, K, P, Q]. Measured on 2 Zen 5 cores, times as fast as oneDNN's fused
    convolution at batch 1 (8), 3x3, by the side of the output: float32 with AVX-512 112 1.1 (0.94), 56 1.2-1.5
    (0.9-1.2), 28 1.7 (1.04), 14 1.9 (1.08), 7 1.8-2.6 (1.1-1.4); with AVX2 112 1.4 (0.9), 56 1.2-1.7 (0.6-1.3), 28 1.9
    (1.4), 7 1.8-2.4 (1.1-1.7); portable 0.9-1.8 (0.7-1.2). Against bfloat16 112 0.9 (0.6), 56 1.0-1.2 (0.5-0.7), 28
    1.4 (0.7), 14 1.7 (0.8), 7 2.0-2.4 (1.1). 5x5 1.0 (0.8), 7x7 0.7-1.1 (0.6-0.8) with AVX-512.
    """
    n, _, p, q = output_size
    if tuple(weight_size[2:]) != (3, 3) or max(stride) > 2 or max(dilation) > 1 or weight_size[0] < _vector_width():
        return False
    return n * p * q <= (28**2 if onednn_in_16_bit else 112**2)


# Channels of a group with which our kernel is the faster one; levels that are not here were not measured.
_GROUPED_CHANNELS = {"avx2": {*range(2, 9)}, "avx512": {*range(2, 33), 64}}


# The most of them where ours multiplies pairs of bfloat16; with stride 1 where only oneDNN computes in 16 bits.
_MOST_GROUPED_CHANNELS_IN_PAIRS, _MOST_GROUPED_CHANNELS_IN_16_BIT = 64, 6


def _is_fast_grouped(
    weight_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    onednn_in_16_bit: bool,
    pairs: bool,
) -> bool:
    """Whether csrc/cpu/kernels/conv_grouped.cpp, which takes every convolution, is faster than oneDNN on this one.

    weight_size [K, C / groups, R, S]; ``pairs``: it multiplies pairs of bfloat16. Measured on 2 Zen 5 cores in float32,
    times as fast as oneDNN's fused convolution at batch 8 (batch 1), 3x3 with that many channels in a group:
    AVX-512, stride 1: 2 4.6, 3 2.2, 4 1.9 (2.5), 5 1.6 (1.6), 8 1.6 (1.6), 12 2.2 (2.4), 16 1.02-1.5 (1.2-1.4),
    24 1.06 (1.2), 32 1.04-1.1 (1.02-1.2), 64 0.97, but 48 0.87; stride 2: 6 1.1 (1.4), 8 1.1-2.1 (1.6-1.9),
    16 1.5 (1.3), 24 1.0 (1.2), 32 0.99 (1.14). Rows that fit no tile lose (13 pixels, 16 channels: 0.93 (1.2)).
    The same on 2 Cascade Lake cores: 32 and 64 with stride 1 1.1-1.3 (1.2-1.4), 64 with stride 2 1.2 (1.1-1.2), 48 at
    28x28 pixels 0.82-0.92 (0.95-0.99).
    AVX2: 2 4.9, 3 2.0, 4 1.9 (2.1), 5 1.1, 8 1.1-1.4 (1.1-1.6), but 12 0.94, 16 0.82-0.93, 32 0.83.
    AVX-512 against bfloat16, stride 1: 2 3.9 (3.7), 3 3.0 (2.5), 4 1.5 (1.6), 6 1.2 (1.2), but 8 0.8-0.9 (1.0), 16 0.6;
    stride 2: 8 0.6-1.4 (0.85), 16 0.7 (0.9).
    Pairs against bfloat16, stride 1: 2 5.0 (5.0), 4 1.9-2.3 (2.3), 6 2.1 (1.9), 8 1.4-1.5 (1.6), 16 1.1-1.2 (1.1-1.2),
    32 1.2-1.5 (1.1-1.6), 64 1.2 (1.2); stride 2: 8 1.1 (1.3-1.4), 16 1.3-1.8 (1.4-1.6), 32 1.2-1.5 (1.2-1.6),
    64 1.1 (1.2).
    """
    k, c, r, s = weight_size
    if r != 3 or s != 3 or k != c * groups or max(stride) > 2 or max(dilation) > 1:
        return False
    if pairs:
        return 2 <= c <= _MOST_GROUPED_CHANNELS_IN_PAIRS
    if onednn_in_16_bit and (max(stride) > 1 or c > _MOST_GROUPED_CHANNELS_IN_16_BIT):
        return False
    return c in _GROUPED_CHANNELS.get(cpu_level().partition("_")[0], ())  # avx512_bf16 is avx512 here


@cache
def onednn_runs(dtype: torch.dtype) -> bool:
    """Whether oneDNN's fused convolution multiplies this dtype on this CPU.

    It takes bfloat16 wherever there is AVX-512, but without instructions for it only emulates them: on 2 Cascade Lake
    cores ResNet-18 ran at 40 GFLOP/s so, and with our kernels, which compute in float32, at 220 to 300.
    """
    if dtype == torch.bfloat16:
        emulates = torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported()
        return torch.ops.mkldnn._is_mkldnn_bf16_supported() and not emulates
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32
