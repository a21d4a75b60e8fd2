"""What begins a residual block in training: conv2d of a map that its shortcut takes too.

Autograd would add up the map's two gradients in a pass over memory, and fill that of a strided 1x1 convolution with
zeros first. Here the convolution's store adds the shortcut's gradient: a step of ResNet-50 takes 0.96 to 0.99 of the
time on 2 Emerald Rapids cores. Not an operator: where something watches operators, `conv2d` runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import forced, forcing
from ..choose import choose
from .conv2d import add_input_gradient, backward_kernel, check_conv2d, conv2d, conv2d_ref, forward_kernel
from .conv_bn_relu import Names, conv_pairs
from .registration import below_autograd, cast_for_autocast, double_backward, is_direct, under_transform

_NAMES = Names("conv2d")
_op = torch.ops.resnet_fast.conv2d.default


class Convolution(NamedTuple):
    """What is convolved with, and how: weight [K, C / groups, R, S], bias [K] or None."""

    weight: Tensor
    bias: Tensor | None
    stride: int | Sequence[int]
    padding: int | Sequence[int]
    dilation: int | Sequence[int]
    groups: int

    @property
    def pairs(self) -> list[list[int]]:
        return conv_pairs(*self[2:5], _NAMES)


def conv2d_fork(input: Tensor, first: Convolution, second: Convolution | None) -> tuple[Tensor, Tensor]:
    """conv2d(input, first), and conv2d(input, second) or, without a second convolution, the input itself.

    input [N, C, H, W]; both results [N, K, P, Q] in channels_last, but for the input, which is as it is.

    Raises:
        RuntimeError: as conv2d.
    """
    args = (input, *first, *(second or ()))
    if input.is_cpu and input.requires_grad and torch.is_grad_enabled() and not under_transform() and is_direct(args):
        cast = [cast_for_autocast(_op, (input, *c))[:3] for c in (first, second) if c is not None]
        if cast[0][0] is input:  # or its two gradients would be of two dtypes
            convolutions = [c._replace(weight=t[1], bias=t[2]) for c, t in zip((first, second), cast, strict=False)]
            tensors = [t for c in convolutions for t in c[:2]]
            return _Fork.apply(input, [c[2:] for c in convolutions], *tensors)
    return conv2d(input, *first), input if second is None else conv2d(input, *second)


class _Fork(torch.autograd.Function):
    """(input, how, weight, bias, weight, bias) -> (map, map or input). how: stride, padding, dilation and groups of
    each convolution."""

    @staticmethod
    def forward(ctx, input: Tensor, how: list[tuple], *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.convolutions = [Convolution(None, None, *numbers) for numbers in how]
        ctx.forced = forced()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, *tensors[::2])
        backend = choose("conv2d", "cpu", input.dtype).backend
        outs = []
        with below_autograd():
            for weight, bias, c in zip(tensors[::2], tensors[1::2], ctx.convolutions, strict=True):
                size = check_conv2d(input, weight, bias, c.pairs, c.groups)
                outs.append(forward_kernel(backend, input, weight, bias, size, c.pairs, c.groups))
        return (*outs, input.view_as(input))[:2]

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple:
        input, *weights = ctx.saved_tensors
        convolutions = [c._replace(weight=w) for c, w in zip(ctx.convolutions, weights, strict=True)]
        tensor_needs = ctx.needs_input_grad[2:]
        needs = [(ctx.needs_input_grad[0], *tensor_needs[2 * i : 2 * i + 2]) for i in range(len(convolutions))]
        if torch.is_grad_enabled():
            found, of_input = _differentiable(input, convolutions, grads, needs)
        else:
            with forcing(ctx.forced), below_autograd():
                found, of_input = _gradients(input, convolutions, grads, needs)
        return (of_input, None, *(t for pair in found for t in pair))


Gradients = tuple[list[tuple[Tensor | None, Tensor | None]], Tensor | None]  # of weight and bias; of the input


def _gradients(input: Tensor, convolutions: list[Convolution], grads: Sequence, needs: Sequence[tuple]) -> Gradients:
    backend = choose("conv2d", "cpu", input.dtype).backend
    rest, found = grads[len(convolutions) :], []  # of the input itself
    of_input = rest[0] if rest else None
    for c, grad, (_, *of_tensors) in zip(convolutions, grads, needs, strict=False):
        pair = (None, None)
        if grad is not None and any(of_tensors):
            pair = backward_kernel(backend, grad, input, c.weight, c.pairs, c.groups, (False, *of_tensors))[1:]
        found.append(tuple(g if need else None for g, need in zip(pair, of_tensors, strict=True)))
    if needs[0][0]:
        # Those that are strided last: they are added to some pixels alone.
        through = [pair for pair in zip(convolutions, grads, strict=False) if pair[1] is not None]
        for c, grad in sorted(through, key=lambda pair: max(pair[0].pairs[0])):
            ours = of_input is not None and not rest
            of_input = add_input_gradient(backend, of_input, grad, input, c.weight, c.pairs, c.groups, ours)
    return found, of_input


def _differentiable(input: Tensor, convolutions: list[Convolution], grads: Sequence, needs: Sequence) -> Gradients:
    found, parts = [], [g for g in grads[len(convolutions) :] if g is not None]
    for c, grad, of in zip(convolutions, grads, needs, strict=False):
        if grad is None:
            found.append((None, None))
            continue
        of_input, of_weight = double_backward(
            lambda x, w, c=c: conv2d_ref(x, w, None, *c[2:]), (input, c.weight), of[:2], grad
        )
        found.append((of_weight, grad.sum((0, 2, 3)) if of[2] else None))
        parts += [] if of_input is None else [of_input]
    return found, sum(parts) if parts and needs[0][0] else None
