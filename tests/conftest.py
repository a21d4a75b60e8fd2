import os

# Before torch: a system may put two of its threads on one core, where each spins until its time slice is over before
# the other goes on, and a suite takes ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

import resnet_fast


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def empty_cache():
    resnet_fast.clear_cache()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
