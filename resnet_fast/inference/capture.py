"""A model as a graph of torch's operators for one shape of its inputs, without side effects.

`torch.export` runs the model's Python code on fake tensors: attributes, loops, shared layers, functional calls,
parametrized weights and nested outputs all become a flat list of `aten` operators, on which a second library of
patterns (modules, functionals, methods) need not be matched. ResNet-50 takes 0.4 s, ResNet-152 1 s, once for each
shape, so that sizes which the code looks at are right in each.
"""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..backends import use_backend

_aten = torch.ops.aten
_exporting = threading.RLock()  # torch.export keeps its state in globals

# What returns its first argument, or a copy of it.
_SAME = {"clone", "alias", "contiguous", "detach", "detach_", "lift_fresh_copy", "dropout", "feature_dropout"}


@dataclass
class Captured:
    """A graph whose tensor inputs are ``inputs``, in the order of the call; ``constants`` are all other placeholders
    and what is computed from them alone. Every node's ``meta["val"]`` says what it makes."""

    graph: fx.Graph
    inputs: list[fx.Node]
    constants: dict[fx.Node, Tensor]  # in the precision of the model, whatever dtype it was captured in
    names: dict[fx.Node, str]  # of parameters and buffers
    outputs: list[Any]  # nodes, or plain values
    output_values: list[Any]  # what the model returns: an output's node may have other strides
    out_spec: pytree.TreeSpec


def capture(model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype | None) -> Captured:
    """Captures ``model`` in eval mode for inputs of these shapes; ``dtype``: the model is cast to it before.

    Raises RuntimeError where torch.export cannot follow the model's code, or the model writes into its buffers.
    """
    from torch.export.graph_signature import OutputKind  # torch.export takes a second to import

    subject = model if dtype is None else frozen_copy(model).to(dtype)
    if isinstance(model, fx.GraphModule):
        subject, model = _Called(subject), _Called(model)
    with _exporting, torch.no_grad(), torch.autocast("cpu", enabled=False), use_backend("reference"):
        try:
            program = torch.export.export(subject, inputs, strict=False)
        except Exception as error:
            raise RuntimeError(
                f"optimize_for_inference: torch.export cannot capture {type(model).__name__} for inputs of "
                f"{[tuple(x.shape) for x in inputs]}: {type(error).__name__}: {_first_lines(error)}"
            ) from error
        if not _functionalize(program.graph):
            program = program.run_decompositions({})
    signature = program.graph_signature
    for spec in signature.output_specs:
        if spec.kind == OutputKind.BUFFER_MUTATION:
            raise RuntimeError(
                "optimize_for_inference: the model must not change while it runs, but it writes into "
                f"{spec.target.removeprefix('graph_module.')!r}"
            )
    return _simplified(program, dict(_state(model)))


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, whose parameters want no gradient."""
    # What a weight is computed from (pruning, torch.nn.utils.weight_norm) has a gradient and cannot be copied as it is.
    attributes = [value for module in model.modules() for value in vars(module).values()]
    memo = {id(t): t.detach().clone() for t in attributes if isinstance(t, Tensor) and not t.is_leaf}
    # A copy of torchvision's feature extractor remembers its mode, but not the graph of it.
    return copy.deepcopy(model, memo).requires_grad_(False).eval()


class _Called(nn.Module):
    """A GraphModule by its code: torch.export would interpret its graph, which returns other classes of containers."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.graph_module = module

    def forward(self, *inputs: Tensor) -> Any:
        return self.graph_module(*inputs)


def _first_lines(error: Exception) -> str:
    """What is wrong, without the pages of advice that torch.export appends."""
    return str(error).strip().partition("\n\n")[0]


def _state(model: nn.Module):
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def is_fresh(node: fx.Node) -> bool:
    """Whether what the node makes shares no memory with its inputs."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    if any(r.alias_info is not None for r in target._schema.returns):
        return False
    # An operator that is made of others may hand out what a view of them returned, and its schema does not say so.
    made_of_others = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
    return not made_of_others or target in _FRESH_ALL_THE_SAME


_FRESH_ALL_THE_SAME = {
    _aten.conv2d.default, _aten.conv2d.padding, _aten.batch_norm.default, _aten.max_pool2d.default,
    _aten.adaptive_avg_pool2d.default, _aten.linear.default, _aten.relu6.default, _aten.matmul.default,
    _aten.conv1d.default, _aten.conv3d.default, _aten.layer_norm.default, _aten.group_norm.default,
    _aten.instance_norm.default, _aten.upsample_bilinear2d.vec, _aten.upsample_nearest2d.vec, _aten.selu.default,
}  # fmt: skip


def _functionalize(graph: fx.Graph) -> bool:
    """Replaces operators that write into fresh tensors by those that return a new one; False if one writes elsewhere.

    torch's own functionalization does it for all of them, but takes three times as long as capturing.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if not node.target._schema.is_mutable:
            continue
        written, packet = node.args[0], str(node.target._schema.name).split("::")[1]
        functional = getattr(getattr(_aten, packet.rstrip("_"), None), node.target._overloadname, None)
        in_place = packet.endswith("_") and functional is not None and not functional._schema.is_mutable
        if not in_place or not isinstance(written, fx.Node) or not (is_fresh(written) or written.meta.get("rewritten")):
            return False
        if not all(user is node or user.op == "output" or is_fresh(user) or _writes(user) for user in written.users):
            return False
        node.target = functional
        node.meta["rewritten"] = True
        written.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: order[user] > order[node])
    return True


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _simplified(program: torch.export.ExportedProgram, state: dict[str, Tensor]) -> Captured:
    """The graph with constants computed, and without copies and checks of what is known."""
    from torch.export.graph_signature import InputKind, OutputKind

    graph, signature = program.graph, program.graph_signature
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    constants, names, inputs = {}, {}, []
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        spec = specs[node.name]
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            constants[node] = state[spec.target].detach()
            names[node] = spec.target.removeprefix("graph_module.")
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            constants[node] = program.constants[spec.target].detach()
        elif isinstance(node.meta.get("val"), Tensor):
            inputs.append(node)

    output = next(node for node in graph.nodes if node.op == "output")
    kinds = [spec.kind for spec in signature.output_specs]
    outputs = [o for o, kind in zip(output.args[0], kinds, strict=True) if kind == OutputKind.USER_OUTPUT]
    output_values = [o.meta["val"] if isinstance(o, fx.Node) else o for o in outputs]
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if isinstance(node.target, torch._ops.OpOverload):
            packet = node.target._schema.name.split("::")[1]
            training = packet.endswith("dropout") and node.args[2]
            if packet in _SAME and not training and node.meta["val"].dtype == node.args[0].meta["val"].dtype:
                node.replace_all_uses_with(node.args[0])
                outputs = [node.args[0] if o is node else o for o in outputs]
                continue
        _compute(node, constants)
    return Captured(graph, inputs, constants, names, outputs, output_values, program.call_spec.out_spec)


def _compute(node: fx.Node, constants: dict[fx.Node, Tensor]) -> None:
    """Computes what depends on constants alone: parametrized weights, FrozenBatchNorm2d's scale and shift."""
    needed = node.all_input_nodes
    random = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
    if random or not needed or any(n not in constants for n in needed):
        return
    args, kwargs = fx.map_arg((node.args, node.kwargs), constants.__getitem__)
    with torch.no_grad():
        value = node.target(*args, **kwargs)
    constants[node] = value
