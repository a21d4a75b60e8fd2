"""max_pool_with_indices: max_pool for training, which remembers in 8 bits where each largest value was.

torch's own keeps 64 bits an output. The pieces and their order are explained in add_relu.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..choose import choose
from .arguments import as_channels_last, empty_channels_last
from .max_pool import check_max_pool, pool_pairs
from .registration import dispatch, dispatch_gradient, register, under_transform

_NAME = "max_pool_with_indices"
MOST_TAPS = 256  # that 8 bits can tell apart


def max_pool_with_indices_ref(
    input: Tensor,  # [N, C, H, W]
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """max_pool_with_indices in plain torch, any device and dtype; [N, C, P, Q] each."""
    kernel_size, stride, padding, dilation = pool_pairs(
        _NAME, kernel_size, kernel_size if stride is None else stride, padding, dilation
    )
    out, places = F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True)
    width = input.shape[3]
    first = [torch.arange(out.shape[2 + d], device=input.device) * stride[d] - padding[d] for d in (0, 1)]
    row = (places // width - first[0].view(-1, 1)) // dilation[0]
    column = (places % width - first[1]) // dilation[1]
    return out, (row * kernel_size[1] + column).to(torch.uint8)


def _check(input: Tensor, pairs: list, ceil_mode: bool) -> list[int]:
    kernel_size, stride, padding, dilation = pairs
    if kernel_size[0] * kernel_size[1] > MOST_TAPS:
        raise RuntimeError(f"{_NAME}: kernel_size must have at most {MOST_TAPS} places, got {tuple(kernel_size)}")
    size = check_max_pool(input, *pairs, ceil_mode, _NAME)
    for d in (0, 1):
        # A dilated kernel, and no other, may meet nothing but padding; then there is no place to remember.
        for at in range(size[2 + d] if dilation[d] > 1 else 0):
            first = at * stride[d] - padding[d]
            if not any(0 <= first + t * dilation[d] < input.shape[2 + d] for t in range(kernel_size[d])):
                raise RuntimeError(
                    f"{_NAME}: every kernel must meet the map, got kernel_size {tuple(kernel_size)}, stride "
                    f"{tuple(stride)}, padding {tuple(padding)}, dilation {tuple(dilation)} on {tuple(input.shape)}"
                )
    return size


def _empty_indices(input: Tensor, size: list[int]) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=input.device, memory_format=torch.channels_last)


def _fake(input: Tensor, kernel_size, stride, padding, dilation, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    size = _check(input, pool_pairs(_NAME, kernel_size, stride, padding, dilation), ceil_mode)
    return empty_channels_last(input, size), _empty_indices(input, size)


_forward_ops = {
    "cpu": torch.ops.resnet_fast._max_pool_with_indices_cpu.default,
    "cuda": torch.ops.resnet_fast._max_pool_with_indices_cuda.default,
}
_backward_ops = {
    "cpu": torch.ops.resnet_fast._max_pool_backward_cpu.default,
    "cuda": torch.ops.resnet_fast._max_pool_backward_cuda.default,
}


def _kernel(input: Tensor, kernel_size, stride, padding, dilation, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    pairs = pool_pairs(_NAME, kernel_size, stride, padding, dilation)
    size = _check(input, pairs, ceil_mode)
    if 0 in size:
        return empty_channels_last(input, size), _empty_indices(input, size)
    backend = choose(_NAME, input.device.type, input.dtype).backend
    if backend in _forward_ops:
        return _forward_ops[backend](input, *pairs, size[2:])
    if backend == "triton":
        from ..kernels.max_pool import max_pool_with_indices_triton

        return max_pool_with_indices_triton(
            input, *pairs, empty_channels_last(input, size), _empty_indices(input, size)
        )
    out, indices = max_pool_with_indices_ref(input, *pairs, ceil_mode)
    return as_channels_last(out), as_channels_last(indices)


def _setup_context(ctx, inputs, output) -> None:
    input, *pairs, ctx.ceil_mode = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.pairs = pool_pairs(_NAME, *pairs)
    ctx.size = input.shape
    ctx.save_for_backward(output[1])


def _places(indices: Tensor, size: Sequence[int], pairs: list) -> Tensor:
    """What torch calls indices: of each largest value its place in the map, row by row."""
    kernel_size, stride, padding, dilation = pairs
    index = indices.long()
    first = [torch.arange(indices.shape[2 + d], device=index.device) * stride[d] - padding[d] for d in (0, 1)]
    row = first[0].view(-1, 1) + index // kernel_size[1] * dilation[0]
    return row * size[3] + first[1] + index % kernel_size[1] * dilation[1]


def _scattered(grad: Tensor, indices: Tensor, size: Sequence[int], pairs: list) -> Tensor:
    """The gradient of the map of ``size`` [N, C, H, W] in plain torch; differentiable."""
    n, c, h, w = size
    places = _places(indices, size, pairs).flatten(2)
    return grad.new_zeros(n, c, h * w).scatter_add(2, places, grad.flatten(2)).view(n, c, h, w)


def _backward(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    if torch.is_grad_enabled():
        found = _scattered(grad, indices, ctx.size, ctx.pairs)
    else:
        found = dispatch_gradient(_backward_op, grad, indices, *ctx.pairs, ctx.size[2:])
    return (found, *[None] * 5)


def _autocast(device_type: str, *args) -> tuple:
    return args  # torch's max_pool2d keeps its dtype


register(
    _NAME,
    kernel=_kernel,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)


def _backward_fake(grad, indices, kernel_size, stride, padding, dilation, input_size) -> Tensor:
    return empty_channels_last(grad, [*grad.shape[:2], *input_size])


def _backward_kernel(grad, indices, kernel_size, stride, padding, dilation, input_size) -> Tensor:
    pairs, size = [kernel_size, stride, padding, dilation], [*grad.shape[:2], *input_size]
    if 0 in grad.shape:
        return empty_channels_last(grad, size).zero_()
    backend = choose(_NAME, grad.device.type, grad.dtype).backend
    if backend in _backward_ops:
        return _backward_ops[backend](grad, indices, *pairs, input_size)
    if backend == "triton":
        from ..kernels.max_pool import max_pool_backward_triton

        return max_pool_backward_triton(grad, indices, *pairs, empty_channels_last(grad, size))
    wide = grad.to(torch.promote_types(torch.float32, grad.dtype))
    return as_channels_last(_scattered(wide, indices, size, pairs).to(grad.dtype))


_backward_op = torch.ops.resnet_fast._max_pool_backward.default

register("_max_pool_backward", kernel=_backward_kernel, fake=_backward_fake)


_op = torch.ops.resnet_fast.max_pool_with_indices.default


def max_pool_with_indices(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """`max_pool`, and in 8 bits a value which place under the kernel it came from; its gradient keeps nothing else.

    Args:
        input, kernel_size, stride, padding, dilation, ceil_mode: as `max_pool` takes them; kernels have at most 256
            places, each of which meets the map somewhere.

    Returns:
        out: [N, C, P, Q] in channels_last, input's dtype; torch's, bit for bit. Differentiable, twice.
        indices: uint8 [N, C, P, Q] in channels_last, row * kernel width + column under the kernel: of equal values the
            first, of NaNs the last, as in torch.

    Raises:
        RuntimeError: an argument breaks a rule above, or a backend forced by `resnet_fast.use_backend` cannot run it.
    """
    args = (input, kernel_size, kernel_size if stride is None else stride, padding, dilation, ceil_mode)
    return max_pool_with_indices_ref(*args) if under_transform() else dispatch(_op, args, typed=None)
