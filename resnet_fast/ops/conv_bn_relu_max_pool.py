"""conv_bn_relu_max_pool: max_pool(relu(batch_norm(conv2d(input, weight, bias)))), the first layers of a network.

The pieces and their order are explained in add_relu.py. Checks, folding and the cache of packed weights are those of
conv_bn_relu.py. On the CPU the kernel for few input channels hands its rows to the pooling while they are in the cache;
everything else runs as conv_bn_relu and then max_pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..choose import choose
from .arguments import empty_channels_last, pair
from .conv_bn_relu import (
    cast_conv,
    check_conv_args,
    conv_bn_relu_ref,
    conv_gradients,
    conv_kernel,
    conv_pairs,
    cpu_kernel,
    find_folded,
    folded_and_packed,
)
from .conv_bn_relu import kernel_for as conv_kernel_for
from .max_pool import max_pool_kernel, max_pool_ref, pool_gradient, pooled_size
from .registration import dispatch, register, under_transform
from .weight_cache import packed_weights

_NAME = "conv_bn_relu_max_pool"
_POOL = ("pool_kernel_size", "pool_stride", "pool_padding")


def conv_bn_relu_max_pool_ref(
    input: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C / groups, R, S]
    bias: Tensor | None,  # [K]
    bn_weight: Tensor | None,  # [K]
    bn_bias: Tensor | None,  # [K]
    running_mean: Tensor,  # [K]
    running_var: Tensor,  # [K]
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    eps: float = 1e-5,
    pool_kernel_size: int | Sequence[int] = 3,
    pool_stride: int | Sequence[int] | None = 2,
    pool_padding: int | Sequence[int] = 1,
) -> Tensor:
    """conv_bn_relu_max_pool in plain torch, any device and dtype; [N, K, P, Q]."""
    parameters = (weight, bias, bn_weight, bn_bias, running_mean, running_var)
    out = conv_bn_relu_ref(input, *parameters, None, stride, padding, dilation, groups, eps)
    return max_pool_ref(out, pool_kernel_size, pool_stride, pool_padding)


def _pool_pairs(kernel_size, stride, padding) -> list[list[int]]:
    return [pair(_NAME, name, value) for name, value in zip(_POOL, (kernel_size, stride, padding), strict=True)]


def _pooled_size(size: Sequence[int], pool: list[list[int]]) -> list[int]:
    return pooled_size(_NAME, size, *pool, prefix="pool_")


def _fake(
    input, weight, bias, bn_weight, bn_bias, running_mean, running_var,
    stride, padding, dilation, groups, eps, *pool,
) -> Tensor:  # fmt: skip
    parameters = (weight, bias, bn_weight, bn_bias, running_mean, running_var)
    size = check_conv_args(input, *parameters, None, *conv_pairs(stride, padding, dilation), groups)
    return empty_channels_last(input, _pooled_size(size, _pool_pairs(*pool)))


def _kernel(
    input, weight, bias, bn_weight, bn_bias, running_mean, running_var,
    stride, padding, dilation, groups, eps, *pool,
) -> Tensor:  # fmt: skip
    parameters = (weight, bias, bn_weight, bn_bias, running_mean, running_var)
    folded = packed = None
    backend = choose(_NAME, "cpu" if input.is_cpu else "cuda", input.dtype).backend
    on_cpu = backend == "cpu"
    if on_cpu:  # what is packed has passed the checks
        folded = find_folded(input, parameters, stride, padding, dilation, groups, eps, has_residual=False)
        packed = None if folded is None else folded.packed.get(input.shape)

    pool = _pool_pairs(*pool)
    if packed is None:
        pairs = conv_pairs(stride, padding, dilation)
        size = check_conv_args(input, *parameters, None, *pairs, groups)
        if on_cpu and 0 not in size:
            folded, packed = folded_and_packed(input, size, parameters, pairs, groups, eps, has_residual=False)
    else:
        size = packed.output_size
    pooled = _pooled_size(size, pool)
    if backend == "triton" and 0 not in (*size, *pooled):
        from ..kernels.conv_bn_relu import conv_bn_relu_max_pool_triton

        out = empty_channels_last(input, pooled)
        out = conv_bn_relu_max_pool_triton(input, *parameters, *pairs, groups, eps, pool, size, out)
        if out is not None:
            return out
    if packed is not None and packed.kernel.reads_images:
        out = folded.run_max_pool(packed, input, *pool)
        if out is None:
            folded.pack_direct(packed.kernel, *parameters, eps)
            packed_weights.bound(weight)
            out = folded.run_max_pool(packed, input, *pool)
        return out
    out = None if packed is None else folded.run(input, None, True, packed)
    if out is None:
        out = conv_kernel(input, *parameters, None, stride, padding, dilation, groups, eps, True)
    return max_pool_kernel(out, *pool, (1, 1), False)


def kernel_for(
    input, weight, bias, bn_weight, bn_bias, running_mean, running_var,
    stride, padding, dilation, groups, eps, *pool,
) -> tuple[str, bool]:  # fmt: skip
    """The kernel, in words, that computes the convolution for these arguments, and whether it is this package's."""
    parameters = (weight, bias, bn_weight, bn_bias, running_mean, running_var)
    words, ours = conv_kernel_for(input, *parameters, None, stride, padding, dilation, groups, eps, True)
    on_cpu = choose(_NAME, "cpu" if input.is_cpu else "cuda", input.dtype).backend == "cpu"
    if on_cpu and cpu_kernel(input, weight, stride, padding, dilation, groups, False).reads_images:
        words += ", max-pooling in the same pass"
    return words, ours


def _setup_context(ctx, inputs, output: Tensor) -> None:
    (input, weight, bias, bn_weight, bn_bias, running_mean, running_var,
     stride, padding, dilation, ctx.groups, ctx.eps, *pool) = inputs  # fmt: skip
    ctx.pairs, ctx.pool = conv_pairs(stride, padding, dilation), _pool_pairs(*pool)
    ctx.save_for_backward(input, weight, bias, bn_weight, bn_bias, running_mean, running_var)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The map before the pooling is computed again. It only says where gradients pass, so it has none itself."""
    input, weight, bias, bn_weight, bn_bias, running_mean, running_var = ctx.saved_tensors
    with torch.no_grad():
        out = torch.ops.resnet_fast.conv_bn_relu(*ctx.saved_tensors, None, *ctx.pairs, ctx.groups, ctx.eps, True)
    grad = pool_gradient(grad, out, (*ctx.pool, [1, 1], False))
    grad = torch.ops.aten.threshold_backward(grad, out, 0)  # passes where the map is positive or NaN
    saved = (input, weight, bias, bn_weight, running_mean, running_var)
    dtypes = [None if t is None else t.dtype for t in (bias, bn_bias)]
    grads = conv_gradients(grad, saved, ctx.needs_input_grad, ctx.pairs, ctx.groups, ctx.eps, dtypes)
    return (*grads, *[None] * 10)


def _autocast(device_type: str, input, weight, bias, *rest) -> tuple:
    return (*cast_conv(device_type, input, weight, bias), *rest)


register(
    _NAME,
    kernel=_kernel,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)


_op = torch.ops.resnet_fast.conv_bn_relu_max_pool.default


def conv_bn_relu_max_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    eps: float = 1e-5,
    pool_kernel_size: int | Sequence[int] = 3,
    pool_stride: int | Sequence[int] | None = 2,
    pool_padding: int | Sequence[int] = 1,
) -> Tensor:
    """max_pool(relu(batch_norm(conv2d(input, weight, bias)))) with inference statistics: the first layers of a network.

    On the CPU, for up to 4 input channels, the map between convolution and pooling is never written. The result has
    the bits of `conv_bn_relu` followed by `max_pool`.

    Args:
        input, weight, bias, bn_weight, bn_bias, running_mean, running_var, stride, padding, dilation, groups, eps: as
            `conv_bn_relu` takes them.
        pool_kernel_size, pool_stride, pool_padding: as `max_pool` takes them; the defaults are ResNet's.

    Returns:
        [N, K, P, Q] in channels_last, input's dtype; NaN wins over every number. Differentiable in every argument but
        the running statistics, twice: the backward pass computes the map between the two again.

    Raises:
        RuntimeError: an argument breaks a rule of `conv_bn_relu` or `max_pool`, or a backend forced by
            `resnet_fast.use_backend` cannot run it.
    """
    args = (input, weight, bias, bn_weight, bn_bias, running_mean, running_var, stride, padding, dilation, groups, eps)
    pool = (pool_kernel_size, pool_kernel_size if pool_stride is None else pool_stride, pool_padding)
    return conv_bn_relu_max_pool_ref(*args, *pool) if under_transform() else dispatch(_op, (*args, *pool))
