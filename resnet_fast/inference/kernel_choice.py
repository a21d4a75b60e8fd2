"""Which kernel computes each convolution of a plan, within the bytes that Winograd's weights may take."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch

from ..choose import ConvKernel, choose_conv_on_cpu, conv_costs, multiplies_bfloat16
from ..kernels.packing import compute_dtype, without_winograd
from .capture import Captured
from .fuse import Conv, value_of
from .items import four
from .weights import Weights, fold


class Options(NamedTuple):
    """winograd: may be used; weight_memory: bytes that its weights may take, or None."""

    winograd: bool = True
    weight_memory: int | None = None


def choose_kernels(convs: list[Conv], captured: Captured, weights: Weights, options: Options) -> dict[int, ConvKernel]:
    """The kernel of each, by id: the fastest, but of Winograd's weights as many bytes as ``options`` allow beside those
    that ``weights`` has already."""
    chosen = {id(conv): _fastest(conv, captured, options) for conv in convs}
    if options.weight_memory is None:
        return chosen

    def new_bytes(conv: Conv, kernel: ConvKernel) -> int:
        is_new = kernel.is_winograd and not weights.has(conv, captured, kernel)
        return _winograd_bytes(conv, kernel) if is_new else 0

    while True:
        winograd = [conv for conv in convs if chosen[id(conv)].is_winograd]
        new = sum(new_bytes(conv, chosen[id(conv)]) for conv in winograd)
        if new == 0 or new + weights.winograd_bytes() <= options.weight_memory:
            return chosen
        changes = [change for conv in winograd for change in _smaller(conv, chosen[id(conv)], new_bytes)]
        _, conv, kernel = min(changes, key=lambda change: change[0])
        chosen[id(conv)] = kernel


def sizes_of(conv: Conv) -> tuple[list[int], list[int]]:
    """[N, C, H, W] and [N, K, P, Q] of its input and of the convolution's result, without the pooling behind it."""
    return list(four(value_of(conv.inputs[0]).shape)), list(four(value_of(conv.parts[-1]).shape))


def _fastest(conv: Conv, captured: Captured, options: Options) -> ConvKernel:
    input_size, output_size = sizes_of(conv)
    weight_size = _weight_size(conv)
    dtype = value_of(conv.output).dtype
    if dtype == torch.float16:  # whether oneDNN may take it depends on the values
        folded, _ = fold(captured.constants[conv.weight], conv.affine)
        dtype = compute_dtype(folded.reshape(weight_size), dtype)
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    kernel = choose_conv_on_cpu(input_size, weight_size, output_size, *geometry, len(conv.inputs) > 1, dtype)
    if kernel.is_winograd and not options.winograd:
        return without_winograd(kernel, _pairs_of_bfloat16(conv))
    return kernel


def _smaller(
    conv: Conv, kernel: ConvKernel, bytes_of: Callable[[Conv, ConvKernel], int]
) -> list[tuple[float, Conv, ConvKernel]]:
    """Kernels with a smaller weight than ``kernel``'s, with the time lost for every byte won."""
    k, c, *_ = weight_size = _weight_size(conv)
    costs = conv_costs(weight_size, sizes_of(conv)[1], conv.stride, conv.dilation, _pairs_of_bfloat16(conv))
    found = []
    for other, cost in costs.items():
        won = bytes_of(conv, kernel) - bytes_of(conv, other)
        if won > 0:
            found.append(((cost - costs[kernel]) * k * c / won, conv, other))
    return found


def _winograd_bytes(conv: Conv, kernel: ConvKernel) -> int:
    k, c, *_ = _weight_size(conv)
    k = -(-k // 16) * 16  # whole vectors at every level
    if kernel.name == "winograd stem":
        return (kernel.tile + 3) ** 2 * k * 4 * c * 4
    c += c % 2  # whole pairs
    return (kernel.tile + 2) ** 2 * k * c * (2 if kernel.bfloat16 else 4)


def _weight_size(conv: Conv) -> list[int]:
    """[K, C / groups, R, S], of linear layers too."""
    weight = value_of(conv.weight)
    return [weight.shape[0], weight[0].numel() // prod(conv.kernel), *conv.kernel]


def _pairs_of_bfloat16(conv: Conv) -> bool:
    return value_of(conv.output).dtype == torch.bfloat16 and multiplies_bfloat16()
