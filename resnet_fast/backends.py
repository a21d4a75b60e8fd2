"""What can run here: the compiled library, the backends and the switch between them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

try:
    from . import _C  # noqa: F401  (loading it registers the operators)
except ImportError as error:
    raise ImportError(
        f"resnet_fast's compiled part does not load ({error}). Build it with `pip install -e .` in an environment "
        f"that has torch >= 2.11 (this one: torch {torch.__version__})"
    ) from error

_cuda_library_error: str | None = None
if torch.version.cuda is None:
    _cuda_library_error = f"torch {torch.__version__} has no CUDA"
else:
    try:
        from . import _C_cuda  # noqa: F401
    except ImportError as error:
        missing = "no module named" in str(error).lower() or "cannot import name" in str(error)
        _cuda_library_error = "built without CUDA kernels (no nvcc at install time)" if missing else str(error)

NAMES = ("reference", "cpu", "triton", "cuda", "cudnn")
_CONVOLUTIONS = ("conv_bn_relu", "conv_bn_relu_max_pool", "conv_bn_relu_projection")
TRAINING = (
    "batch_norm_relu",
    "batch_norm_relu_conv",
    "batch_norm_relu_projection",
    "batch_norm_statistics",
    "conv2d",
    "max_pool_with_indices",
)
_ON_THE_CPU = ("add_relu", "avg_pool_flatten", "max_pool")  # whether torch has oneDNN or not
CPU_LEVELS = ("portable", "avx2", "avx512", "avx512_bf16")  # as in csrc/cpu/levels.cpp

# Asked at import, outside any tracing mode, since operators called under one are traced instead of run.
_cpu_level, _cpu_level_error = "", ""
try:
    _cpu_level = CPU_LEVELS[torch.ops.resnet_fast._cpu_level()]
except RuntimeError as error:
    _cpu_level_error = str(error).splitlines()[0]


@dataclass(frozen=True)
class Backend:
    """One way to run the operators.

    ``devices`` are the device types whose tensors it takes in this process; empty if it does not work here, and then
    ``reason`` says why. ``operators`` are those it has a kernel for.
    """

    name: str
    operators: tuple[str, ...]
    devices: tuple[str, ...]
    reason: str

    @property
    def available(self) -> bool:
        return bool(self.devices)


def cpu_level() -> str:
    """Instruction-set level of the C++ kernels in use: ``portable``, ``avx2``, ``avx512`` or ``avx512_bf16``.

    Raises RuntimeError if ``RESNET_FAST_CPU_LEVEL`` names one that is unknown or that this CPU does not have.
    """
    if _cpu_level_error:
        raise RuntimeError(_cpu_level_error)
    return _cpu_level


def triton_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1`` at start)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


_interpreter_has_bfloat16 = False


def interpreter_has_bfloat16() -> bool:
    """Whether Triton's interpreter may be given bfloat16: left alone it computes on the raw bits and says nothing."""
    return _interpreter_has_bfloat16


def declare_interpreter_repaired() -> None:
    """Says that bfloat16 is right in Triton's interpreter now (tests/triton_interpreter/interpreter.py makes it so)."""
    global _interpreter_has_bfloat16
    _interpreter_has_bfloat16 = True


_cuda_emulated = False


def cuda_emulated() -> bool:
    """Whether the CUDA C++ kernels run in an emulator, on CPU tensors."""
    return _cuda_emulated


def declare_cuda_emulated() -> None:
    """Says that the operators' CUDA C++ kernels take CPU tensors now (tests/cuda_emulator loads what makes them)."""
    global _cuda_emulated
    _cuda_emulated = True


def tf32_allowed() -> bool:
    """Whether torch's own float32 convolutions may use TF32 on a GPU.

    Asked by the newer per-operator setting where torch has it: the older ``allow_tf32`` raises once a program has set
    the newer one.
    """
    precision = getattr(getattr(torch.backends.cudnn, "conv", None), "fp32_precision", None)
    return torch.backends.cudnn.allow_tf32 if precision is None else precision == "tf32"


def _reference() -> Backend:
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return Backend("reference", (*_ON_THE_CPU, *_CONVOLUTIONS, *TRAINING), devices, "plain torch operators")


def _cpu() -> Backend:
    operators = (*_ON_THE_CPU, *_CONVOLUTIONS, *TRAINING)
    try:
        level = cpu_level()
    except RuntimeError as error:
        return Backend("cpu", operators, (), str(error))
    if not torch.backends.mkldnn.is_available():
        return Backend("cpu", _ON_THE_CPU, ("cpu",), f"C++ kernels at level {level}; this torch has no oneDNN")
    return Backend("cpu", operators, ("cpu",), f"C++ kernels at level {level}, oneDNN convolutions")


def _triton() -> Backend:
    operators = (*_ON_THE_CPU, *_CONVOLUTIONS, *TRAINING)
    if importlib.util.find_spec("triton") is None:
        return Backend("triton", operators, (), "the package triton is not installed (CPU builds of torch lack it)")
    if triton_interpreted():
        return Backend("triton", operators, ("cpu",), "Triton's interpreter (TRITON_INTERPRET=1): slow, no bfloat16")
    if not torch.cuda.is_available():
        return Backend("triton", operators, (), "no CUDA device (set TRITON_INTERPRET=1 to run the kernels on the CPU)")
    return Backend("triton", operators, ("cuda",), "Triton kernels")


def _cuda() -> Backend:
    operators = (*_ON_THE_CPU, *_CONVOLUTIONS, *TRAINING)
    if cuda_emulated():
        return Backend("cuda", operators, ("cpu",), "CUDA C++ kernels in the emulator: slow")
    if _cuda_library_error is not None:
        return Backend("cuda", operators, (), _cuda_library_error)
    if not torch.cuda.is_available():
        return Backend("cuda", operators, (), "no CUDA device")
    return Backend("cuda", operators, ("cuda",), "CUDA C++ kernels")


def _cudnn() -> Backend:
    operators = ("conv_bn_relu", "conv_bn_relu_projection")
    if _cuda_library_error is not None:
        return Backend("cudnn", operators, (), _cuda_library_error)
    if not torch.cuda.is_available():
        return Backend("cudnn", operators, (), "no CUDA device")
    if not torch.backends.cudnn.is_available():
        return Backend("cudnn", operators, (), "this torch has no cuDNN")
    return Backend("cudnn", operators, ("cuda",), "cuDNN's fused convolutions, BatchNorm folded by a CUDA C++ kernel")


def backends() -> dict[str, Backend]:
    """Every backend by name: whether it works in this process, on which devices, and why not if not.

    >>> resnet_fast.backends()["triton"].reason
    'no CUDA device (set TRITON_INTERPRET=1 to run the kernels on the CPU)'
    """
    return {b.name: b for b in (_reference(), _cpu(), _triton(), _cuda(), _cudnn())}


def _check_name(name: str | None, origin: str) -> str | None:
    if name not in (None, "", *NAMES):
        raise ValueError(f"{origin} must be one of {', '.join(NAMES)}, got {name!r}")
    return name or None


_default = _check_name(os.environ.get("RESNET_FAST_BACKEND"), "RESNET_FAST_BACKEND")
_forced: ContextVar[str | None] = ContextVar("resnet_fast_backend", default=_default)


def forced() -> str | None:
    """The backend that `use_backend` or ``RESNET_FAST_BACKEND`` names, or None (the chooser decides)."""
    return _forced.get()


@contextmanager
def forcing(name: str | None) -> Iterator[None]:
    """`use_backend` for a name that has been checked."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Runs every operator and block inside the ``with`` on one backend; None gives the choice back.

    Holds for the current thread (or asyncio task), nests, and also reaches graphs compiled outside it. An operator
    raises RuntimeError where the backend has no kernel for it or does not take its device; models run such a block
    the plain torch way, and `resnet_fast.explain` says so.

    Args:
        name: ``"reference"`` (plain torch), ``"cpu"``, ``"triton"``, ``"cuda"`` (CUDA C++), ``"cudnn"`` or None.

    Raises:
        ValueError: the name is none of these.
        RuntimeError: the backend does not work in this process; the message says why.
    """
    name = _check_name(name, "the backend")
    if name is not None:
        backend = backends()[name]
        if not backend.available:
            raise RuntimeError(f"backend {name!r} does not work here: {backend.reason}")
    with forcing(name):
        yield
