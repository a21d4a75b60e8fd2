"""Runs the CUDA kernels on the CPU: `RESNET_FAST_TEST_EMULATOR=1 pytest tests/cuda_emulator`.

Only then: the first run builds them, and their operators take CPU tensors for as long as the process lives.
"""

import os
import platform

import pytest

collect_ignore_glob = [] if os.environ.get("RESNET_FAST_TEST_EMULATOR", "0") == "1" else ["test_*.py"]


def pytest_pycollect_makemodule():
    """The whole folder is skipped, in words, where it cannot run."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("the emulator changes stacks in x86-64 assembly")


@pytest.fixture
def cuda_backend():
    """The CUDA C++ kernels, in the emulator."""
    import resnet_fast

    from . import emulated

    emulated.load()
    emulated.configure()
    with resnet_fast.use_backend("cuda"):
        yield
    emulated.configure()


@pytest.fixture(params=("forward", "reverse", "random 1", "random 2"))
def order(request, cuda_backend):
    """Threads in this order; what is copied asynchronously comes late, early or at random."""
    from . import emulated

    schedule, _, seed = request.param.partition(" ")
    landing = {"forward": "late", "reverse": "early", "random": "random"}[schedule]
    emulated.configure(schedule, landing, int(seed or 1))
