"""optimize_for_inference: a frozen copy of a model whose convolutions, poolings and additions run as one planned list of
kernels."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .capture import capture
from .fuse import FUSED_DTYPES
from .plan import NotFinite, Plan
from .weights import Weights

# Input shapes whose plans are kept; the one that was not used for longest is dropped first.
MOST_PLANS = 8


class Memory(NamedTuple):
    """Bytes. ``parameters``: the frozen copy of the model's; ``packed_weights``: the same as the kernels want them;
    ``buffers``: feature maps, all sets that are kept; ``peak``: all of it, with a set of buffers at least."""

    parameters: int
    packed_weights: int
    buffers: int
    peak: int


class OptimizedModel(nn.Module):
    """What `optimize_for_inference` returns; call it like the model it was made from."""

    def __init__(self, model: nn.Module, example: tuple[Tensor, ...], dtype: torch.dtype | None) -> None:
        super().__init__()
        # Not submodules: what is frozen has no parameters that an optimizer, .to() or load_state_dict() could change.
        frozen = copy.deepcopy(model).requires_grad_(False)
        self.__dict__["_frozen"] = frozen
        self._dtypes = tuple(x.dtype if dtype is None else dtype for x in example)
        self._cast = dtype
        self._channels = tuple(x.shape[1] if x.dim() > 1 else None for x in example)
        self._ranks = tuple(x.dim() for x in example)
        self._channels_last = _is_channels_last(model, example)
        self._training_mode_is_refused = True
        self.train(False)
        self._reset()
        self._plan_for(tuple(x.shape for x in example))

    def _reset(self) -> None:
        self._plans: OrderedDict[tuple, Plan] = OrderedDict()
        self._direct: OrderedDict[tuple, Plan] = OrderedDict()
        self._weights = Weights(padding=64)
        self._lock = threading.RLock()

    def __getstate__(self) -> dict:
        state = dict(self.__dict__)
        for name in ("_plans", "_direct", "_weights", "_lock"):
            del state[name]
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._reset()

    def __deepcopy__(self, memo: dict) -> OptimizedModel:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    @torch.compiler.disable
    def forward(self, *inputs: Tensor) -> Any:
        self._check(inputs)
        inputs = tuple(x if x.dtype == d else x.to(d) for x, d in zip(inputs, self._dtypes, strict=True))
        shapes = tuple(x.shape for x in inputs)
        plan = self._plans.get(shapes) or self._plan_for(shapes)
        with torch.inference_mode(False), torch.no_grad():
            try:
                outputs = plan.run(inputs)
            except NotFinite:
                outputs = self._plan_for(shapes, winograd=False).run(inputs)
        return pytree.tree_unflatten(outputs, plan.out_spec)

    def _check(self, inputs: tuple[Any, ...]) -> None:
        pass

    def _plan_for(self, shapes: tuple[torch.Size, ...], winograd: bool = True) -> Plan:
        plans = self._plans if winograd else self._direct
        with self._lock:
            if shapes in plans:
                plans.move_to_end(shapes)
                return plans[shapes]
            layout = torch.channels_last if self._channels_last else torch.contiguous_format
            inputs = tuple(
                torch.zeros(shape, dtype=dtype).to(memory_format=layout if len(shape) == 4 else torch.contiguous_format)
                for shape, dtype in zip(shapes, self._dtypes, strict=True)
            )
            captured = capture(self._frozen, inputs, self._cast)
            plan = Plan(captured, self._weights, self._channels_last, winograd)
            plan.out_spec = captured.out_spec
            plans[shapes] = plan
            if len(plans) > MOST_PLANS:
                plans.popitem(last=False)
                self._weights.keep_only({k for p in (*self._plans.values(), *self._direct.values()) for k in p.keys})
            return plan


def _is_channels_last(model: nn.Module, example: tuple[Tensor, ...]) -> bool:
    tensors = [p for p in model.parameters() if p.dim() == 4] + [x for x in example if x.dim() == 4]
    return any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in tensors)


def optimize_for_inference(
    model: nn.Module, example_input: Tensor | tuple[Tensor, ...], dtype: torch.dtype | None = None
) -> OptimizedModel:
    example = example_input if isinstance(example_input, tuple) else (example_input,)
    return OptimizedModel(model, example, dtype)
