"""update_running_stats_: what a batch leaves behind in BatchNorm's buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..choose import choose
from .registration import dispatch, register, under_transform


def _check(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, count: int) -> None:
    for name, t in (("running_mean", running_mean), ("running_var", running_var), ("mean", mean), ("var", var)):
        if t.dim() != 1 or t.shape != running_mean.shape:
            raise RuntimeError(
                f"update_running_stats_: {name} must have shape {tuple(running_mean.shape)}, one value per channel, "
                f"got {tuple(t.shape)}"
            )
        if not t.is_floating_point():
            raise RuntimeError(f"update_running_stats_: {name} must be floating point, got {t.dtype}")
        if t.device != running_mean.device:
            raise RuntimeError(
                f"update_running_stats_: {name} must be on running_mean's device {running_mean.device}, got {t.device}"
            )
    if count < 2:
        raise RuntimeError(f"update_running_stats_: count must be at least 2 values per channel, got {count}")


_op_cuda = torch.ops.resnet_fast._update_running_stats_cuda_.default


def _is_in_one_launch(running_mean: Tensor, running_var: Tensor, mean: Tensor) -> bool:
    running = running_mean, running_var
    if mean.dtype != torch.float32 or not all(t.dtype == torch.float32 and t.is_contiguous() for t in running):
        return False
    try:
        return choose("batch_norm_statistics", mean.device.type, torch.float32).backend == "cuda"
    except RuntimeError:  # a forced backend that has no such operator
        return False


def _update(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, count: int) -> None:
    _check(running_mean, running_var, mean, var, momentum, count)
    if _is_in_one_launch(running_mean, running_var, mean):
        _op_cuda(running_mean, running_var, mean, var, momentum, count)
        return
    for running, new, share in ((running_mean, mean, momentum), (running_var, var, momentum * count / (count - 1))):
        if running.dtype == new.dtype:
            running.mul_(1 - momentum).add_(new, alpha=share)
        else:  # in the wider of both dtypes; what is kept of a 16-bit buffer is rounded once, in the store
            running.copy_(running.to(new.dtype) * (1 - momentum) + new * share)


register("update_running_stats_", kernel=_update, fake=_check)

_op = torch.ops.resnet_fast.update_running_stats_.default


def update_running_stats_(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, count: int
) -> None:
    """Moves BatchNorm's running statistics towards those of a batch, in place, as torch.nn.BatchNorm2d does.

    running = (1 - momentum) * running + momentum * new, with the *unbiased* variance, var * count / (count - 1).

    Args:
        running_mean, running_var: [C], any floating-point dtype; changed.
        mean, var: [C], of the batch, var biased: what `batch_norm_statistics` and `batch_norm_relu` return.
        momentum: share of the batch, 0 to 1; 1 / (number of batches) makes a plain average.
        count: values per channel, N * H * W, at least 2.

    Raises:
        RuntimeError: shapes, dtypes or devices differ, or count is too small.
    """
    args = (running_mean, running_var, mean, var, momentum, count)
    with torch.no_grad():
        _op(*args) if under_transform() else dispatch(_op, args, typed=None)
