"""Runs the Triton kernels on the CPU: `TRITON_INTERPRET=1 pytest tests/triton_interpreter`.

Only then, and in a process of its own: Triton decides when it is imported whether it interprets or compiles.
"""

import importlib.util
import os

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET", "0") == "1" else ["test_*.py"]


def pytest_pycollect_makemodule():
    """The whole folder is skipped, in words, where it cannot run."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed")


@pytest.fixture(autouse=True, scope="session")
def faithful_interpreter():
    from resnet_fast.backends import declare_interpreter_repaired

    from .interpreter import check_memory, repair_bfloat16

    repair_bfloat16()
    check_memory()
    declare_interpreter_repaired()


@pytest.fixture
def triton_backend(monkeypatch):
    """The Triton kernels, float32 in full: what stock torch, whose errors they are held to, computes on a CPU."""
    import torch

    import resnet_fast

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with resnet_fast.use_backend("triton"):
        yield


@pytest.fixture
def poisoned_memory():
    """torch.empty is NaN: what an earlier run has left there may be just the values that a kernel forgets to store."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def allow_tf32(monkeypatch):
    """float32 convolutions in TF32, as torch does on a GPU unless told otherwise."""
    import torch

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


@pytest.fixture(params=("interpreter", "sm_90", "sm_100"))
def table(request, monkeypatch):
    """The tiles of a GPU, or the interpreter's own, which are larger."""
    from resnet_fast.kernels import configs, conv_tma

    monkeypatch.setitem(configs.CONFIGS, "interpreter", configs.CONFIGS[request.param])
    conv_tma._plan.cache_clear()
    yield
    conv_tma._plan.cache_clear()
