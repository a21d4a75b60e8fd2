"""max_pool: torch.nn.functional.max_pool2d without indices.

The pieces and their order are explained in add_relu.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..choose import choose
from .arguments import as_channels_last, empty_channels_last, pair
from .registration import dispatch, register, under_transform

_PAIRS = ("kernel_size", "stride", "padding", "dilation")


def max_pool_ref(
    input: Tensor,  # [N, C, H, W]
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """max_pool in plain torch, any device and dtype; [N, C, P, Q]."""
    return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)


def pooled_size(
    operator: str,
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
    prefix: str = "",
) -> list[int]:
    """[N, C, P, Q] for a map of ``size`` [N, C, H, W].

    Raises RuntimeError, in the name of ``operator`` and its arguments ``prefix``kernel_size and so on, wherever torch
    does. The pairs must have 2 elements.
    """

    def refuse(text: str) -> None:
        raise RuntimeError(f"{operator}: {prefix}{text}")

    for name, values, least in zip(_PAIRS, (kernel_size, stride, padding, dilation), (1, 1, 0, 1), strict=True):
        if min(values) < least:
            refuse(f"{name} must be at least {least}, got {tuple(values)}")
    out = [size[0], size[1]]
    for d in (0, 1):
        if 2 * padding[d] > kernel_size[d]:
            refuse(f"padding must be at most half of {prefix}kernel_size {tuple(kernel_size)}, got {tuple(padding)}")
        extent = dilation[d] * (kernel_size[d] - 1) + 1
        room = size[2 + d] + 2 * padding[d] - extent
        if room < 0 and not (ceil_mode and room + stride[d] > 0):
            padded = size[2 + d] + 2 * padding[d]
            refuse(f"kernel_size, dilated ({extent}), must not be larger than the padded map ({padded}) in {'HW'[d]}")
        outputs = (room + (stride[d] - 1 if ceil_mode else 0)) // stride[d] + 1
        if ceil_mode and (outputs - 1) * stride[d] >= size[2 + d] + padding[d]:
            outputs -= 1  # the last kernel must start inside the map or in the padding before it
        out.append(outputs)
    return out


def check_max_pool(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    operator: str = "max_pool",
) -> list[int]:
    """Checks everything that the kernel relies on; returns the output's size [N, C, P, Q]. The pairs must have 2
    elements."""
    if input.dim() != 4:
        raise RuntimeError(f"{operator}: input must have 4 dimensions [N, C, H, W], got shape {tuple(input.shape)}")
    if not input.is_floating_point():
        raise RuntimeError(f"{operator}: input must be floating point, got {input.dtype}")
    if 0 in input.shape[1:]:
        raise RuntimeError(f"{operator}: input must not be empty but for its batch, got shape {tuple(input.shape)}")
    return pooled_size(operator, input.shape, kernel_size, stride, padding, dilation, ceil_mode)


def pool_pairs(operator: str, kernel_size, stride, padding, dilation) -> list[list[int]]:
    values = (kernel_size, stride, padding, dilation)
    return [pair(operator, name, value) for name, value in zip(_PAIRS, values, strict=True)]


def _fake(input: Tensor, kernel_size, stride, padding, dilation, ceil_mode: bool) -> Tensor:
    pairs = pool_pairs("max_pool", kernel_size, stride, padding, dilation)
    return empty_channels_last(input, check_max_pool(input, *pairs, ceil_mode))


_op_cpu = torch.ops.resnet_fast._max_pool_cpu.default
_op_cuda = torch.ops.resnet_fast._max_pool_cuda.default


def max_pool_kernel(input: Tensor, kernel_size, stride, padding, dilation, ceil_mode: bool) -> Tensor:
    pairs = pool_pairs("max_pool", kernel_size, stride, padding, dilation)
    size = check_max_pool(input, *pairs, ceil_mode)
    backend = choose("max_pool", "cpu" if input.is_cpu else "cuda", input.dtype).backend
    if backend == "cpu":
        return _op_cpu(input, *pairs, size[2:])
    if backend == "cuda":
        return _op_cuda(input, *pairs, size[2:])
    if backend == "triton":
        from ..kernels.max_pool import max_pool_triton

        out = empty_channels_last(input, size)
        return max_pool_triton(input, *pairs, out) if out.numel() else out
    return as_channels_last(max_pool_ref(input, *pairs, ceil_mode))


def _setup_context(ctx, inputs, output: Tensor) -> None:
    input, *pairs, ceil_mode = inputs
    ctx.geometry = (*pool_pairs("max_pool", *pairs), ceil_mode)
    ctx.save_for_backward(input)


def pool_gradient(grad: Tensor, input: Tensor, geometry: tuple) -> Tensor:
    """The gradient of the map; differentiable in ``grad``. geometry: kernel_size, stride, padding, dilation,
    ceil_mode.

    Where the largest value was is found again: 8 bytes an output for torch's indices are not kept.
    """
    indices = torch.ops.aten.max_pool2d_with_indices(input.detach(), *geometry)[1]
    if max(geometry[3]) > 1:
        # A dilated kernel may meet nothing but padding. For that output torch's index lies wherever the kernel's first
        # position behind the padding would be, maybe outside the map, and its backward pass would write there.
        outside = indices >= input.shape[2] * input.shape[3]
        grad, indices = grad.masked_fill(outside, 0), indices.masked_fill(outside, 0)
    return torch.ops.aten.max_pool2d_with_indices_backward(grad, input, *geometry, indices)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    (input,) = ctx.saved_tensors
    return (pool_gradient(grad, input, ctx.geometry), *[None] * 5)


def _autocast(device_type: str, *args) -> tuple:
    return args  # torch's max_pool2d keeps its dtype


register(
    "max_pool",
    kernel=max_pool_kernel,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)


_op = torch.ops.resnet_fast.max_pool.default


def max_pool(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """The largest value under a moving kernel: torch.nn.functional.max_pool2d, bit for bit.

    Args:
        input: [N, C, H, W], float32, float16, bfloat16 (other floating-point dtypes run on torch's operator); any
            strides, channels_last is the fast one. N may be 0.
        kernel_size, stride, padding, dilation: a number, or a sequence of 1 or 2 (height, width). No stride means
            kernel_size; padding, which counts for nothing, is at most half of kernel_size.
        ceil_mode: whether a last kernel that only partly fits is counted, if it starts inside the map or in the padding
            before it.

    Returns:
        [N, C, P, Q] in channels_last, input's dtype. NaN wins over every number. A dilated kernel that meets no value
        gives -inf. Differentiable, twice; of equal values the first one gets the gradient.

    Raises:
        RuntimeError: an argument breaks a rule above, the kernel does not fit into the padded map, or a backend forced
            by `resnet_fast.use_backend` cannot run it.
    """
    args = (input, kernel_size, kernel_size if stride is None else stride, padding, dilation, ceil_mode)
    return max_pool_ref(*args) if under_transform() else dispatch(_op, args)
