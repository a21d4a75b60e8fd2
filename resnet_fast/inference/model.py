"""optimize_for_inference: a frozen copy of a model whose convolutions, poolings and additions run as one planned list
of kernels."""

from __future__ import annotations

import copy
import functools
import itertools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .capture import capture, frozen_copy
from .explain import LayerTable, layer_table
from .fuse import FUSED_DTYPES
from .kernel_choice import Options
from .plan import NotFinite, Plan
from .weights import Weights

# Input shapes whose plans are kept; the one that was not used for longest is dropped first. A plan holds the packed
# weights of its kernels, most of which it shares with the others, and its buffers.
MOST_PLANS = 8

_NAME = "optimize_for_inference"


class Memory(NamedTuple):
    """Bytes that an optimized model holds.

    ``parameters``: its frozen copy of the model's parameters and buffers; ``packed_weights``: the same as the kernels
    want them, for all shapes whose plans are kept; ``buffers``: feature maps, one set for each call that ran at a time;
    ``peak``: all of it together, with a set of buffers at least.
    """

    parameters: int
    packed_weights: int
    buffers: int
    peak: int

    def __str__(self) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {size / 2**20:.1f} MiB" for name, size in self._asdict().items())


class OptimizedModel(nn.Module):
    """What `optimize_for_inference` returns; call it like the model that it was made from.

    Results are new tensors, which no later call changes. Several threads may call it at a time, each with buffers of
    its own. It can be copied, pickled and saved; plans are made again where it is loaded.
    """

    def __init__(
        self, model: nn.Module, example: tuple[Tensor, ...], dtype: torch.dtype | None, weight_memory: int | None
    ) -> None:
        super().__init__()
        # Not a submodule: what is frozen has no parameters that an optimizer or load_state_dict() could change.
        self.__dict__["_frozen"] = frozen_copy(model)
        self.__dict__["_example"] = tuple(x.shape for x in example)
        self._cast = dtype
        self._dtypes = tuple(x.dtype if dtype is None else dtype for x in example)
        self._channels_last = tuple(_is_channels_last(x) for x in example)
        self._options = Options(weight_memory=weight_memory)
        self.training = False
        self._reset()
        self._plan_for(self._example)

    def _reset(self) -> None:
        self._plans: dict[tuple, Plan] = {}  # by the inputs' shapes
        self._plans_without_winograd: dict[tuple, Plan] = {}
        self._calls = itertools.count()
        self._weights = Weights()
        self._lock = threading.RLock()

    def forward(self, *inputs: Tensor) -> Any:
        if torch.compiler.is_compiling():  # one opaque call: a compiler has nothing to add
            return torch.compiler.disable(self._call)(*inputs)
        return self._call(*inputs)

    def _call(self, *inputs: Tensor) -> Any:
        inputs = self._checked(inputs)
        shapes = tuple(x.shape for x in inputs)
        plan = self._plans.get(shapes) or self._plan_for(shapes)
        plan.used = next(self._calls)
        outputs = self._run(plan, lambda p: p.run(inputs), shapes)
        return pytree.tree_unflatten(outputs, plan.out_spec)

    def _run(self, plan: Plan, run: Callable[[Plan], Any], shapes: tuple) -> Any:
        with torch.no_grad():
            if torch.is_autocast_enabled("cpu"):  # the plan has its dtypes
                with torch.autocast("cpu", enabled=False):
                    return self._run(plan, run, shapes)
            try:
                return run(plan)
            except NotFinite:
                return run(self._plan_for(shapes, winograd=False))

    def _checked(self, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        if len(inputs) != len(self._example):
            raise TypeError(
                f"the optimized model takes {len(self._example)} inputs, as the example had, got {len(inputs)}"
            )
        found = []
        for i, (x, shape, dtype) in enumerate(zip(inputs, self._example, self._dtypes, strict=True)):
            name = "input" if len(inputs) == 1 else f"input {i}"
            _check_tensor(name, x)
            if x.dim() != len(shape):
                raise ValueError(
                    f"{name} must have {len(shape)} dimensions, as the example, got shape {tuple(x.shape)}"
                )
            if x.dim() > 1 and x.shape[1] != shape[1]:
                raise ValueError(f"{name} must have {shape[1]} channels, as the example, got shape {tuple(x.shape)}")
            if x.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(
                    f"{name} requires a gradient, which an optimized model has not; call it under torch.no_grad() "
                    "or pass input.detach()"
                )
            found.append(x if x.dtype == dtype else x.to(dtype))
        return tuple(found)

    def _plan_for(self, shapes: tuple[torch.Size, ...], winograd: bool = True) -> Plan:
        plans = self._plans if winograd else self._plans_without_winograd
        with self._lock:
            if shapes in plans:
                return plans[shapes]
            while len(plans) >= MOST_PLANS:
                del plans[min(plans, key=lambda shapes: plans[shapes].used)]
            everything = [*self._plans.values(), *self._plans_without_winograd.values()]
            self._weights.keep_only({key for plan in everything for key in plan.keys})
            captured = capture(self._frozen, self._inputs_of(shapes), self._cast)
            options = self._options._replace(winograd=winograd)
            plan = Plan(captured, self._weights, options)
            plan.used = next(self._calls)
            plans[shapes] = plan
            return plan

    def _inputs_of(self, shapes: tuple[torch.Size, ...], make: Callable = torch.zeros) -> tuple[Tensor, ...]:
        """Tensors laid out as the example was."""
        found = []
        for shape, dtype, channels_last in zip(shapes, self._dtypes, self._channels_last, strict=True):
            layout = torch.channels_last if channels_last else torch.contiguous_format
            found.append(make(shape, dtype=dtype).to(memory_format=layout))
        return tuple(found)

    def explain(self, *inputs: Tensor, rounds: int = 10) -> LayerTable:
        """Runs the model and says for every layer which kernel computed it, how long it took, and why torch did.

        Args:
            inputs: as for a call; left out, random ones of the example's shape.
            rounds: calls, of which each layer's median counts.
        """
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {rounds}")
        if not inputs:
            generator = torch.Generator().manual_seed(0)
            inputs = self._inputs_of(self._example, functools.partial(torch.randn, generator=generator))
        inputs = self._checked(inputs)
        shapes = tuple(x.shape for x in inputs)
        plan = self._plan_for(shapes)
        used = plan

        def timed(p: Plan) -> dict[int, float]:
            nonlocal used
            used = p
            return p.timed(inputs)

        times = [self._run(plan, timed, shapes) for _ in range(rounds + 1)][1:]
        return layer_table(used.layers, times, self._dtypes[0])

    def memory(self) -> Memory:
        """What the model holds now, in bytes."""
        state = {id(t): t for t in (*self._frozen.parameters(), *self._frozen.buffers())}
        parameters = sum(t.numel() * t.element_size() for t in state.values())
        plans = [*self._plans.values(), *self._plans_without_winograd.values()]
        kept = sum(plan.arena_bytes * plan.idle_buffers() for plan in plans)
        packed, largest = self._weights.bytes(), max(plan.arena_bytes for plan in plans) if plans else 0
        return Memory(parameters, packed, kept, parameters + packed + max(kept, largest))

    # What is frozen stays as it is.

    def train(self, mode: bool = True) -> OptimizedModel:
        if mode:
            self._refuse("be trained")
        return self

    def _apply(self, fn: Callable, recurse: bool = True) -> NoReturn:
        self._refuse("be moved or cast")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("load other weights")

    def _refuse(self, what: str) -> NoReturn:
        raise RuntimeError(
            f"an optimized model is frozen and cannot {what}: do that to the original and call {_NAME} again"
        )

    def extra_repr(self) -> str:
        sizes = ", ".join(str(tuple(shape)) for shape in self._example)
        return f"{type(self._frozen).__name__}, example {sizes}, {self._dtypes[0]}".replace("torch.", "")

    def __getstate__(self) -> dict:
        made_again = ("_plans", "_plans_without_winograd", "_weights", "_lock", "_calls")
        return {name: value for name, value in self.__dict__.items() if name not in made_again}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._frozen.eval()
        self._reset()

    def __deepcopy__(self, memo: dict) -> OptimizedModel:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new


def _check_tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, got {x.device}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_NAME}: model must be an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(
                f"{_NAME}: model must be in eval mode, but {name or 'it'} is in training mode; call model.eval()"
            )
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.device.type != "cpu":
            raise ValueError(f"{_NAME}: model must be on the CPU, but {name} is on {t.device}")


def optimize_for_inference(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    dtype: torch.dtype | None = None,
    *,
    weight_memory: int | None = None,
) -> OptimizedModel:
    """A frozen copy of ``model`` that computes the same, as fast as this CPU can.

    The model's code is followed once for each shape of its inputs (`torch.export`); BatchNorm is folded into the
    convolutions in float32, residual, ReLU and the first max-pooling are taken into their store, weights are packed
    once, and every feature map gets a place in one block of memory, so that a call allocates its outputs alone. What
    this package has no kernel for runs as torch does; ``.explain()`` says which, and how long each layer takes.

    Args:
        model: any nn.Module in eval mode, on the CPU; it stays as it is. Hooks and Python code run while it is
            followed, not in later calls.
        example_input: what the model takes, a tensor [N, C, H, W] or a tuple of several. Other batch and image sizes
            work too: each new shape is planned at its first call (0.3 to 3 s), the last 8 are kept.
        dtype: float32, bfloat16 or float16 to compute in; inputs are cast to it, outputs have it. None: the model's.
        weight_memory: bytes that the transformed weights of Winograd's algorithm may take, which are 1.8 to 5.4 times
            as large as a 3x3 layer's; layers that save least time for their bytes do without. None: no bound.

    Returns:
        A module to be called as ``model`` is, which returns what ``model`` does. It has no parameters: it cannot be
        trained, moved or cast.

    Raises:
        TypeError: model is no module, or an input no tensor of floating point.
        ValueError: the model is in training mode, or not on the CPU; dtype or weight_memory is none of the above.
        RuntimeError: torch.export cannot follow the model's code, or the model changes its own buffers.
    """
    _check_model(model)
    example = example_input if isinstance(example_input, tuple) else (example_input,)
    if not example:
        raise ValueError(f"{_NAME}: example_input must not be an empty tuple")
    for x in example:
        _check_tensor(f"{_NAME}: example_input", x)
    if dtype not in (None, *FUSED_DTYPES):
        raise ValueError(f"{_NAME}: dtype must be float32, bfloat16, float16 or None, got {dtype}")
    if weight_memory is not None and (type(weight_memory) is not int or weight_memory < 0):
        raise ValueError(
            f"{_NAME}: weight_memory must be a number of bytes, at least 0, or None, got {weight_memory!r}"
        )
    return OptimizedModel(model, example, dtype, weight_memory)
