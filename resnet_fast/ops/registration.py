"""How every public operator is registered: one function, so that all of them obey the same rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import forced, forcing

library = torch.library.Library("resnet_fast", "IMPL")

# By operator
_kernels: dict[Any, Callable[..., Any]] = {}
_differentiable: dict[Any, type[torch.autograd.Function]] = {}
_autocasts: dict[Any, Callable[..., tuple]] = {}


def register(
    name: str,
    *,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., tuple] | None = None,
    autocast: Callable[..., tuple] | None = None,
) -> None:
    """Gives the operator ``resnet_fast::name`` (schema in csrc/ops.cpp) everything that torch asks of an operator.

    Args:
        kernel: runs it on CPU and CUDA tensors; called below autograd and autocast.
        fake: same arguments, returns empty tensors with the exact shape, strides, dtype and device of the results.
        setup_context, backward: as `torch.library.register_autograd` takes them. A gradient operator, which is called
            only where no further gradient is asked for, has none of its own and no autocast.
        autocast: ``autocast(device_type, *args)`` returns the arguments as they are under autocast.
    """
    op = getattr(torch.ops.resnet_fast, name).default

    def checked_kernel(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_forward_ad(name)
        return kernel(*args)

    _kernels[op] = kernel
    for key in ("CPU", "CUDA"):
        library.impl(name, checked_kernel, key)
    torch.library.register_fake(f"resnet_fast::{name}", fake, lib=library)
    if backward is None:
        return

    def setup(ctx, inputs, output) -> None:
        ctx.forced = forced()
        setup_context(ctx, inputs, output)

    def gradient(ctx, *grads):
        # The gradient of CUDA tensors is computed in another thread, which does not know of use_backend.
        with forcing(ctx.forced):
            return backward(ctx, *grads)

    torch.library.register_autograd(f"resnet_fast::{name}", gradient, setup_context=setup, lib=library)
    _differentiable[op], _autocasts[op] = _function(name, kernel, setup, gradient), autocast
    for key, device_type in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
        library.impl(name, _autocast_kernel(op, key, device_type, autocast), key)


def _function(name: str, kernel: Callable, setup: Callable, gradient: Callable) -> type[torch.autograd.Function]:
    """The operator for autograd without the dispatcher."""

    def forward(ctx, *args: Any) -> Any:
        with below_autograd():
            out = kernel(*args)
        setup(ctx, args, out)
        return out

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
    return type(f"resnet_fast_{name}", (torch.autograd.Function,), methods)


def dispatch(op: Any, args: tuple, typed: bool | None = False) -> Any:
    """``op(*args)``, where nobody could see the difference past the dispatcher: torch reaches kernels and gradients in
    Python through it in several steps. Without a gradient that is 7 us less a convolution on a Zen 3 core, with one 74
    of 144 on Emerald Rapids.

    The caller has asked `under_transform`. ``typed``: every argument that is no tensor has exactly the type that the
    kernel takes; the dispatcher would convert or refuse it. None: to be asked; of a kernel that takes a number for two.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    direct = (_is_typed(args) if typed is None else typed) and _only_the_kernel_is_left(args)
    if direct:
        args = cast_for_autocast(op, args)
    if torch.is_grad_enabled():
        return _differentiable[op].apply(*args) if direct else op(*args)
    if not direct:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)
    with below_autograd():
        return _kernels[op](*args)


def is_direct(args: tuple) -> bool:
    """Whether `dispatch` would go past the dispatcher with these arguments, types and all."""
    return not torch.compiler.is_compiling() and _is_typed(args) and _only_the_kernel_is_left(args)


def cast_for_autocast(op: Any, args: tuple) -> tuple:
    """The operator's arguments, cast if autocast is on."""
    if torch._C._is_any_autocast_enabled() and op in _autocasts:
        device_type = args[0].device.type
        if torch.is_autocast_enabled(device_type):
            return _autocasts[op](device_type, *args)
    return args


def dispatch_gradient(op: Any, *args: Any) -> Any:
    """`dispatch` of an operator that computes a gradient, from where no further one is asked for."""
    if torch.compiler.is_compiling() or not _only_the_kernel_is_left(args):
        return op(*args)
    with below_autograd():
        return _kernels[op](*args)


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


class below_autograd:
    """Where the dispatcher calls kernels: below autograd and autocast."""

    __slots__ = ("autocast", "autograd")

    def __enter__(self) -> None:
        self.autograd = torch._C._AutoDispatchBelowAutograd()
        self.autograd.__enter__()
        self.autocast = torch._C._ExcludeDispatchKeyGuard(_AUTOCAST)
        self.autocast.__enter__()

    def __exit__(self, *error) -> None:
        self.autocast.__exit__(*error)
        self.autograd.__exit__(*error)


# To look here takes a quarter of the time of isinstance.
_PLAIN = frozenset((type(None), tuple, int, float, bool))
_TYPED = _PLAIN | {Tensor, torch.nn.Parameter}


def _is_typed(args: tuple) -> bool:
    for value in args:
        kind = type(value)
        if kind not in _TYPED or (kind is tuple and any(type(number) is not int for number in value)):
            return False
    return True


def _only_the_kernel_is_left(args: tuple) -> bool:
    """Whether the dispatcher would do nothing but cast, note the gradient, and call the operator's CPU or CUDA kernel:
    no trace, mode or profiler, plain tensors in plain memory."""
    if (
        torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    for t in args:
        kind = type(t)
        if kind is Tensor or kind is torch.nn.Parameter:
            if t.layout is not torch.strided or t.is_neg() or not (t.is_cpu or t.is_cuda):
                return False
        elif kind not in _PLAIN and isinstance(t, Tensor):
            return False
    return True


def _autocast_kernel(op: Any, key: str, device_type: str, autocast: Callable[..., tuple]) -> Callable[..., Tensor]:
    # torch.library.register_autocast would cast every floating-point argument, BatchNorm's tensors too.
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(below):
            return op(*autocast(device_type, *args))

    return kernel


def autocast_tensor(t: Tensor | None, device_type: str) -> Tensor | None:
    """What torch's own autocast does to one argument: floating point, on the device, not float64."""
    dtype = torch.get_autocast_dtype(device_type)
    castable = t is not None and t.is_floating_point() and t.dtype not in (dtype, torch.float64)
    return t.to(dtype) if castable and t.device.type == device_type else t


def double_backward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of ``function(*inputs)``, made of torch's operators alone, behind ``grad``, to be differentiated
    again; None for those that nobody needs."""
    with torch.enable_grad():
        aliases = [None if t is None else t.view_as(t) for t in inputs]
        wanted = [t for t, need in zip(aliases, needs, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(function(*aliases), wanted, grad, create_graph=True, allow_unused=True))
    return tuple(next(found) if need and t is not None else None for t, need in zip(aliases, needs, strict=True))


def constant_when_compiled(function: Callable) -> Callable:
    """`torch.compiler.assume_constant_result` without its import of all of dynamo, which takes a second."""
    function._dynamo_marked_constant = True
    return function


@constant_when_compiled  # dynamo would put the call into its graph and take the result for "not None"
def _functorch_active() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def under_transform() -> bool:
    """Whether forward-mode AD or a `torch.func` transform is active: only plain torch operators give its result."""
    return forward_ad._current_level >= 0 or _functorch_active()


def _refuse_forward_ad(name: str) -> None:
    # Autograd's generated kernel drops tangents silently, and below torch.func.jvp they cannot even be seen: so every
    # call inside a forward-mode level is refused rather than some of them answered with zero derivatives.
    raise RuntimeError(
        f"torch.ops.resnet_fast.{name} has no forward-mode derivative; resnet_fast.ops.{name} takes the plain "
        "torch path under forward-mode AD and torch.func transforms"
    )
