"""avg_pool_flatten: the mean over height and width, the way from a network's last map to its classifier.

The pieces and their order are explained in add_relu.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..choose import choose
from .registration import dispatch, register, under_transform


def avg_pool_flatten_ref(input: Tensor) -> Tensor:  # [N, C, H, W]
    """flatten(adaptive_avg_pool2d(input, 1), 1) in plain torch; [N, C]."""
    return torch.flatten(F.adaptive_avg_pool2d(input, 1), 1)


def check_avg_pool_flatten(input: Tensor) -> None:
    if input.dim() != 4:
        raise RuntimeError(
            f"avg_pool_flatten: input must have 4 dimensions [N, C, H, W], got shape {tuple(input.shape)}"
        )
    if not input.is_floating_point():
        raise RuntimeError(f"avg_pool_flatten: input must be floating point, got {input.dtype}")


def _fake(input: Tensor) -> Tensor:
    check_avg_pool_flatten(input)
    return input.new_empty(input.shape[:2])


_op_cpu = torch.ops.resnet_fast._avg_pool_flatten_cpu.default
_op_cuda = torch.ops.resnet_fast._avg_pool_flatten_cuda.default


def _kernel(input: Tensor) -> Tensor:
    check_avg_pool_flatten(input)
    backend = choose("avg_pool_flatten", "cpu" if input.is_cpu else "cuda", input.dtype).backend
    if backend == "cpu":
        return _op_cpu(input)
    if backend == "cuda":
        return _op_cuda(input)
    if backend == "triton":
        from ..kernels.avg_pool_flatten import avg_pool_flatten_triton

        return avg_pool_flatten_triton(input, input.new_empty(input.shape[:2]))
    return avg_pool_flatten_ref(input).contiguous()


def _setup_context(ctx, inputs, output: Tensor) -> None:
    ctx.size = inputs[0].shape


def _backward(ctx, grad: Tensor) -> Tensor:
    _, _, h, w = ctx.size
    return grad[:, :, None, None].expand(ctx.size) / (h * w)


def _autocast(device_type: str, input: Tensor) -> tuple[Tensor]:
    return (input,)  # torch's adaptive_avg_pool2d keeps its dtype


register(
    "avg_pool_flatten",
    kernel=_kernel,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)


_op = torch.ops.resnet_fast.avg_pool_flatten.default


def avg_pool_flatten(input: Tensor) -> Tensor:
    """flatten(adaptive_avg_pool2d(input, 1), 1): the mean of every channel over height and width.

    Args:
        input: [N, C, H, W], float32, float16, bfloat16 (other floating-point dtypes run on torch's operators), any
            strides. N and C may be 0; means of empty maps are NaN, as in torch.

    Returns:
        [N, C], contiguous, input's dtype. 16-bit values are summed in float32 and rounded once. Differentiable, twice.

    Raises:
        RuntimeError: input has not 4 dimensions or is not floating point, or a backend forced by
            `resnet_fast.use_backend` cannot run it.
    """
    if under_transform():
        return avg_pool_flatten_ref(input)
    return dispatch(_op, (input,), typed=isinstance(input, Tensor))
