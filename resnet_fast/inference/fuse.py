"""From a graph of torch's operators to a list of steps: BatchNorm folded into convolutions, residual, ReLU and pooling
taken into their store. What no kernel of ours computes stays torch's operator.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..ops.arguments import pair
from .capture import Captured

_aten = torch.ops.aten
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Step:
    """Makes ``output`` from ``inputs``, all of them nodes of the graph. ``name``: the layer, for people."""

    name: str
    output: fx.Node
    inputs: list[fx.Node]


@dataclass
class Affine:
    """y * scale + shift, one value a filter; computed in float64 from what the model keeps."""

    scale: Tensor  # [K]
    shift: Tensor  # [K]

    def then(self, scale: Tensor, shift: Tensor) -> Affine:
        return Affine(self.scale * scale, self.shift * scale + shift)


@dataclass
class Conv(Step):
    """relu(conv2d(x, weight) * scale + shift + residual), then max-pooling; x = inputs[0], residual = inputs[1].

    A linear layer is one whose kernel is as large as its input.
    """

    weight: fx.Node
    affine: Affine
    kernel: tuple[int, int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    relu: bool = False
    pool: tuple[list[int], list[int], list[int]] | None = None  # kernel_size, stride, padding
    parts: list[fx.Node] = field(default_factory=list)  # the graph's nodes that it computes, the convolution first


@dataclass
class MaxPool(Step):
    kernel_size: list[int]
    stride: list[int]
    padding: list[int]


@dataclass
class AvgPool(Step):
    """Means over height and width."""


@dataclass
class AddRelu(Step):
    """relu(a + b)"""


@dataclass
class View(Step):
    """The same values in the same order of memory under another shape."""


@dataclass
class Torch(Step):
    """torch's own operator; ``node`` says which and with what arguments."""

    node: fx.Node
    reason: str


def value_of(node: fx.Node) -> Any:
    return node.meta["val"]


def layer_name(node: fx.Node) -> str:
    """The path of the module that a node comes from, or the operator's name."""
    stack = node.meta.get("nn_module_stack")
    path = list(stack.values())[-1][0] if stack else ""
    return str(path).removeprefix("L['self'].").removeprefix("graph_module.") or node.name


def fuse(captured: Captured, is_usable: Callable[[Tensor, Affine], bool]) -> list[Step]:
    """The steps, in an order in which they can run. ``is_usable``: whether a folded convolution, given its weight and
    what follows, still has the bits' worth of the unfolded one."""
    return _Fuser(captured, is_usable).steps()


class _Fuser:
    def __init__(self, captured: Captured, is_usable: Callable[[Tensor, Affine], bool]) -> None:
        self.graph, self.constants = captured.graph, captured.constants
        self.is_usable = is_usable
        self.outputs = {o for o in captured.outputs if isinstance(o, fx.Node)}
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.needed = self._needed()
        self.done: set[fx.Node] = set()  # computed by an earlier step

    def steps(self) -> list[Step]:
        found = []
        for node in self.graph.nodes:
            if node.op == "call_function" and node in self.needed and node not in self.done | self.constants.keys():
                found.append(self._step(node))
        found.sort(key=lambda step: self.order[step.output])
        return self._without_dead(found)

    def _without_dead(self, steps: list[Step]) -> list[Step]:
        """Without what no step and no output reads any more: a flattening that a linear layer has undone."""
        read, kept = set(self.outputs), []
        for step in reversed(steps):
            if step.output in read:
                kept.append(step)
                read.update(step.inputs)
        return kept[::-1]

    def _needed(self) -> set[fx.Node]:
        needed, todo = set(), list(self.outputs)
        while todo:
            node = todo.pop()
            if node not in needed:
                needed.add(node)
                todo += node.all_input_nodes
        return needed

    def _step(self, node: fx.Node) -> Step:
        if node.target is operator.getitem and isinstance(value_of(node.args[0]), (list, tuple)):
            return Torch(layer_name(node), node, [node.args[0]], node, "")
        for attempt in (self._conv, self._linear, self._max_pool, self._avg_pool, self._add_relu, self._view):
            step = attempt(node)
            if isinstance(step, Step):
                return step
        inputs = [n for n in node.all_input_nodes if n not in self.constants]
        return Torch(layer_name(node), node, inputs, node, self._why_torch(node))

    def _why_torch(self, node: fx.Node) -> str:
        if node.target in _CONVOLUTIONS:
            return self.refused
        return "no kernel of our own"

    def _user(self, node: fx.Node) -> fx.Node | None:
        """The only node that reads this one, if nothing else does and no step computes it already."""
        users = [user for user in node.users if user in self.needed]
        alone = len(users) == 1 and node not in self.outputs and users[0] not in self.done
        return users[0] if alone else None

    def _take(self, nodes: Sequence[fx.Node]) -> None:
        self.done.update(nodes)

    # Convolutions and linear layers

    def _conv(self, node: fx.Node) -> Conv | None:
        if node.target not in _CONVOLUTIONS:
            return None
        arguments = _conv_arguments(node)
        self.refused = _why_torch_conv(node, arguments, self.constants)
        if self.refused:
            return None
        x, weight, bias, stride, padding, dilation, groups = arguments
        kernel = tuple(value_of(weight).shape[2:])
        conv = Conv(
            layer_name(node), node, [x], weight, self._bias(weight, bias), kernel, stride, padding, dilation, groups,
            parts=[node],
        )  # fmt: skip
        return self._absorb(conv)

    def _linear(self, node: fx.Node) -> Conv | None:
        """As a convolution whose kernel is the whole map: what flattened it before, channel by channel, is undone."""
        if node.target is not _aten.linear.default:
            return None
        x, weight, bias = (*node.args, None)[:3]
        if weight not in self.constants or (bias is not None and bias not in self.constants):
            return None
        if value_of(x).dim() != 2 or value_of(x).dtype not in FUSED_DTYPES or 0 in value_of(node).shape:
            return None
        kernel = (1, 1)
        if _is_reshape(x) and value_of(x.args[0]).dim() == 4 and value_of(x).shape[0] == value_of(x.args[0]).shape[0]:
            x = x.args[0]
            kernel = tuple(value_of(x).shape[2:])
        conv = Conv(
            layer_name(node), node, [x], weight, self._bias(weight, bias), kernel, [1, 1], [0, 0], [1, 1], 1,
            parts=[node],
        )  # fmt: skip
        return self._absorb(conv)

    def _bias(self, weight: fx.Node, bias: fx.Node | None) -> Affine:
        filters = value_of(weight).shape[0]
        shift = torch.zeros(filters, dtype=torch.float64) if bias is None else self.constants[bias].double()
        return Affine(torch.ones(filters, dtype=torch.float64), shift)

    def _absorb(self, conv: Conv) -> Conv | None:
        """Takes into the convolution whatever its store can do, as long as nothing else reads what lies between."""
        while (user := self._user(conv.output)) is not None:
            affine = self._affine(user, conv.output)
            if affine is None:
                break
            conv.affine = conv.affine.then(*affine)
            self._extend(conv, user)
            if isinstance(value_of(user), (list, tuple)):  # BatchNorm and two statistics that nobody reads
                self._extend(conv, self._user(user))
        if not self.is_usable(self.constants[conv.weight], conv.affine):
            self.refused = "a folded weight or bias is not finite"
            return None
        if (user := self._user(conv.output)) is not None:
            residual = self._residual(user, conv.output)
            if residual is not None:
                conv.inputs.append(residual)
                self._extend(conv, user)
        if (user := self._user(conv.output)) is not None and user.target is _aten.relu.default:
            conv.relu = True
            self._extend(conv, user)
        self._take(conv.parts)
        return conv

    @staticmethod
    def _extend(conv: Conv, node: fx.Node) -> None:
        conv.parts.append(node)
        conv.output = node

    def _affine(self, node: fx.Node, x: fx.Node) -> tuple[Tensor, Tensor] | None:
        """Scale and shift [K] in float64, if the node does that to x [N, K, ...] and nothing else."""
        filters = value_of(x).shape[1]
        if node.target in _BATCH_NORMS and node.args[0] is x:
            return self._batch_norm(node)
        if node.target not in _ARITHMETIC or len(node.args) != 2 or node.kwargs:
            return None
        if node.args[0] is not x and node.target not in (_aten.add.Tensor, _aten.mul.Tensor):
            return None
        if value_of(node).shape != value_of(x).shape or value_of(node).dtype != value_of(x).dtype:
            return None
        other = node.args[1] if node.args[0] is x else node.args[0]
        if isinstance(other, fx.Node):
            if other not in self.constants:
                return None
            constant = self.constants[other].double()
            rank = value_of(x).dim()
            shape = [1] * (rank - constant.dim()) + list(constant.shape)
            if len(shape) != rank or any(n != 1 for d, n in enumerate(shape) if d != 1):
                return None
            other = constant.reshape(-1).expand(filters)
        elif not isinstance(other, (int, float)):
            return None
        one, zero = torch.ones(filters, dtype=torch.float64), torch.zeros(filters, dtype=torch.float64)
        return _ARITHMETIC[node.target](one, zero, other)

    def _batch_norm(self, node: fx.Node) -> tuple[Tensor, Tensor] | None:
        is_native = node.target is _aten._native_batch_norm_legit_no_training.default
        _, weight, bias, mean, var, *rest = node.args
        eps = rest[1] if is_native else rest[2]
        if not is_native and rest[0]:  # training
            return None
        if mean is None or var is None or any(n not in self.constants for n in (weight, bias, mean, var) if n):
            return None
        if is_native and [u.args[1] for u in node.users if u in self.needed] != [0]:
            return None
        scale = torch.rsqrt(self.constants[var].double() + eps)
        if weight is not None:
            scale = scale * self.constants[weight].double()
        shift = -self.constants[mean].double() * scale
        return scale, shift if bias is None else shift + self.constants[bias].double()

    def _residual(self, node: fx.Node, x: fx.Node) -> fx.Node | None:
        if node.target is not _aten.add.Tensor or node.kwargs or len(node.args) != 2:
            return None
        other = node.args[1] if node.args[0] is x else node.args[0]
        if not isinstance(other, fx.Node) or other in self.constants or other is x:
            return None
        ours, theirs = value_of(x), value_of(other)
        fits = isinstance(theirs, Tensor) and theirs.shape == ours.shape and theirs.dtype == ours.dtype
        return other if fits and ours.dim() == 4 else None

    # The rest

    def _max_pool(self, node: fx.Node) -> MaxPool | None:
        if node.target is not _aten.max_pool2d.default:
            return None
        defaults = ([], 0, 1, False)
        x, kernel_size, stride, padding, dilation, _ = (*node.args, *defaults[len(node.args) - 2 :])
        if pair("max_pool", "dilation", dilation) != [1, 1] or not _is_map(x) or 0 in value_of(node).shape:
            return None
        sizes = [pair("max_pool", "", v) for v in (kernel_size, stride or kernel_size, padding)]
        return MaxPool(layer_name(node), node, [x], *sizes)

    def _avg_pool(self, node: fx.Node) -> AvgPool | None:
        is_mean = node.target is _aten.mean.dim and not node.kwargs
        if node.target is _aten.adaptive_avg_pool2d.default:
            if list(node.args[1]) != [1, 1]:
                return None
        elif not is_mean or not _is_map(node.args[0]) or sorted(d % 4 for d in node.args[1]) != [2, 3]:
            return None
        x = node.args[0]
        if not _is_map(x) or 0 in value_of(x).shape:
            return None
        return AvgPool(layer_name(node), node, [x])

    def _add_relu(self, node: fx.Node) -> AddRelu | None:
        if node.target is not _aten.add.Tensor or node.kwargs or len(node.args) != 2:
            return None
        user = self._user(node)
        a, b = node.args
        if user is None or user.target is not _aten.relu.default or not isinstance(b, fx.Node):
            return None
        fits = all(_is_map(n) and n not in self.constants for n in (a, b)) and value_of(a).shape == value_of(b).shape
        if not fits or value_of(a).dtype != value_of(b).dtype or 0 in value_of(a).shape:
            return None
        self._take([node, user])
        return AddRelu(layer_name(node), user, [a, b])

    def _view(self, node: fx.Node) -> View | None:
        """What changes nothing in memory, such as between [N, C] and [N, C, 1, 1]."""
        if node.target is _aten.adaptive_avg_pool2d.default and value_of(node).shape == value_of(node.args[0]).shape:
            return View(layer_name(node), node, [node.args[0]])  # every mean is of one pixel
        if not _is_reshape(node) or value_of(node).dtype not in FUSED_DTYPES:
            return None
        before, after = value_of(node.args[0]).shape, value_of(node).shape
        if max(len(before), len(after)) > 4:
            return None
        flat = [shape[:2] for shape in (before, after) if len(shape) >= 2 and all(n == 1 for n in shape[2:])]
        if len(flat) != 2 or flat[0] != flat[1] or 0 in after:
            return None
        return View(layer_name(node), node, [node.args[0]])


_CONVOLUTIONS = (_aten.conv2d.default, _aten.conv2d.padding, _aten.convolution.default)
_BATCH_NORMS = (_aten.batch_norm.default, _aten._native_batch_norm_legit_no_training.default)
_ARITHMETIC = {
    _aten.mul.Tensor: lambda one, zero, c: (one * c, zero),
    _aten.div.Tensor: lambda one, zero, c: (one / c, zero),
    _aten.add.Tensor: lambda one, zero, c: (one, zero + c),
    _aten.sub.Tensor: lambda one, zero, c: (one, zero - c),
}
_RESHAPES = (
    _aten.view.default, _aten.reshape.default, _aten.flatten.using_ints, _aten.squeeze.dims, _aten.squeeze.default,
    _aten.squeeze.dim, _aten.unsqueeze.default, _aten._unsafe_view.default,
)  # fmt: skip


def _is_reshape(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in _RESHAPES


def _is_map(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dim() == 4 and value.dtype in FUSED_DTYPES


def is_convolution(node: fx.Node) -> bool:
    return node.target in _CONVOLUTIONS


def _conv_arguments(node: fx.Node) -> tuple:
    """input, weight, bias, stride, padding, dilation, groups of any 2-D convolution; None for a transposed one."""
    if node.target is _aten.convolution.default:
        x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
        if transposed or value_of(weight).dim() != 4:
            return (x, weight, bias, None, None, None, None)
    else:
        names = ("bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(names, node.args[2:], strict=False)) | dict(node.kwargs)
        x, weight = node.args[:2]
        bias, stride = given.get("bias"), given.get("stride", 1)
        padding, dilation, groups = given.get("padding", 0), given.get("dilation", 1), given.get("groups", 1)
    stride, dilation = pair("conv2d", "stride", stride), pair("conv2d", "dilation", dilation)
    if padding == "valid":
        padding = 0
    elif padding == "same":  # where the two sides of a dimension differ, there is no padding of both
        extra = [d * (k - 1) for d, k in zip(dilation, value_of(weight).shape[2:], strict=True)]
        padding = None if any(e % 2 for e in extra) else [e // 2 for e in extra]
    return x, weight, bias, stride, None if padding is None else pair("conv2d", "padding", padding), dilation, groups


def _why_torch_conv(node: fx.Node, arguments: tuple, constants: dict[fx.Node, Tensor]) -> str:
    x, weight, bias, stride, padding, _, _ = arguments
    if stride is None:
        return "not a plain 2-D convolution"
    if padding is None:
        return "pads one side more than the other"
    if weight not in constants or (bias is not None and bias not in constants):
        return "its weight depends on the input"
    if not _is_map(x):
        return f"no kernels for {value_of(x).dtype} and {value_of(x).dim()} dimensions"
    if 0 in value_of(node).shape or 0 in value_of(x).shape:
        return "empty"
    return ""
