"""Compiles the Triton kernels for GPUs that need not be there. Run by `RESNET_FAST_TEST_AOT=1 pytest tests/triton_aot`.

Only then, and in a process of its own: a process in which Triton was imported to interpret cannot compile, and the mock
driver set here would mislead every other test.
"""

import importlib.util
import os

import pytest

collect_ignore_glob = [] if os.environ.get("RESNET_FAST_TEST_AOT") == "1" else ["test_*.py"]


def pytest_pycollect_makemodule():
    """The whole folder is skipped, in words, where it cannot run."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        pytest.skip("TRITON_INTERPRET=1 is set, and Triton then compiles nothing")
