"""The Triton kernels, as tests see them: which were launched, and what faults in their source do."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

from triton.runtime.interpreter import InterpretedFunction

from resnet_fast.kernels import (
    add_relu,
    avg_pool_flatten,
    batch_norm_relu,
    conv_few_channels,
    conv_pointers,
    conv_tma,
    max_pool,
    shared,
)

MODULES = (
    add_relu,
    avg_pool_flatten,
    batch_norm_relu,
    conv_few_channels,
    conv_pointers,
    conv_tma,
    max_pool,
    shared,
)


class _Counted:
    """Stands in for a kernel and counts its launches."""

    def __init__(self, kernel, name: str, found: Counter):
        self.kernel, self.name, self.found = kernel, name, found

    def __getitem__(self, grid):
        self.found[self.name] += 1
        return self.kernel[grid]


@contextmanager
def launches() -> Iterator[Counter]:
    """Counts the launches of every kernel by its name."""
    found: Counter = Counter()
    with ExitStack() as stack:
        for module in MODULES:
            for name, value in vars(module).items():
                if name.endswith("_kernel") and isinstance(value, InterpretedFunction):
                    stack.enter_context(mock.patch.object(module, name, _Counted(value, name, found)))
        yield found


@contextmanager
def fault(module: ModuleType, text: str, wrong: str) -> Iterator[None]:
    """Puts ``wrong`` in the place of ``text``, wherever it stands in the module's source, into all kernels."""
    source = Path(module.__file__).read_text()
    assert text in source, f"{module.__name__} has no {text!r} any more"
    faulty = _imported(module, source.replace(text, wrong))
    with ExitStack() as stack:
        for name, value in list(vars(module).items()):
            if isinstance(value, InterpretedFunction):
                for user in MODULES:
                    if vars(user).get(name) is value:
                        stack.enter_context(mock.patch.object(user, name, vars(faulty)[name]))
        yield


def _imported(module: ModuleType, source: str) -> ModuleType:
    """A module of that source, which lies in the package beside ``module``; Triton reads kernels from files."""
    path = Path(_folder()) / f"faulty_{len(sys.modules)}_{Path(module.__file__).name}"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.{path.stem}", path)
    faulty = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = faulty  # where dataclasses look for their module
    spec.loader.exec_module(faulty)
    return faulty


def _folder() -> str:
    import tempfile

    if not hasattr(_folder, "made"):
        _folder.made = tempfile.TemporaryDirectory()
    return _folder.made.name
