"""CUTLASS's convolutions, which only benchmarks use. RESNET_FAST_TEST_CUTLASS=1 compiles them, about 100 seconds."""

import importlib.util
import os
import re

import pytest
import torch
from checkout import ROOT

from resnet_fast.bench import kernels
from resnet_fast.bench.layers import Layer

BUILD = ROOT / "benchmarks" / "cutlass_conv" / "build.py"


@pytest.fixture(scope="module")
def cutlass():
    spec = importlib.util.spec_from_file_location("cutlass_conv_build", BUILD)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def work(channels=16, dtype=torch.bfloat16, residual=True, relu=True, groups=1):
    layer = Layer("b", "conv", channels, 24, 3, 2, groups, 9, residual, relu)
    return kernels.problem(layer, 2, dtype, "cpu")


def test_without_the_wheel_the_command_is_named(cutlass, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install --no-deps nvidia-cutlass=="):
        cutlass.includes()


def test_what_it_takes(cutlass):
    assert cutlass.takes(work()) and cutlass.takes(work(dtype=torch.float16, residual=False))
    others = (work(channels=12), work(dtype=torch.float32), work(relu=False), work(groups=8))
    assert not any(map(cutlass.takes, others)) and cutlass.ways(others[0]) == {}
    assert cutlass.apis((8, 6)) == {"sm80": "86"} and cutlass.apis((9, 0)) == {"sm80": "90", "sm90": "90a"}


def test_a_call_has_the_problems_sizes_and_addresses(cutlass, monkeypatch):
    """With a stand-in for the library, which notes what it is given."""
    found = []

    def function(is_bfloat16, tile, sizes, pointers, stream):
        found.append((is_bfloat16, tile, [getattr(sizes, n) for n, _ in sizes._fields_], pointers, stream))
        return 1 if tile == 64 else 0

    monkeypatch.setattr(cutlass, "_functions", lambda capability: {"sm80": function})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"cuda_stream": 7}))
    problem = work()
    ways = cutlass.ways(problem)
    assert list(ways) == ["CUTLASS sm80, 128", "CUTLASS sm80, 64"]
    out = ways["CUTLASS sm80, 128"]()
    is_bfloat16, tile, sizes, pointers, stream = found[0]
    assert (is_bfloat16, tile, stream) == (1, 128, 7) and sizes == [2, 9, 9, 16, 24, 3, 3, 5, 5, 2, 1]
    assert pointers.x == problem.tensors["input"].data_ptr() and pointers.out == out.data_ptr()
    assert pointers.residual == problem.tensors["residual"].data_ptr()
    with pytest.raises(RuntimeError, match="CUTLASS refuses this convolution"):
        ways["CUTLASS sm80, 64"]()


@pytest.mark.skipif(
    os.environ.get("RESNET_FAST_TEST_CUTLASS") != "1",
    reason="needs nvcc and CUTLASS's wheel, and takes about 100 seconds",
)
@pytest.mark.parametrize(("api", "architecture", "count"), [("sm80", "80", 8), ("sm90", "90a", 2)])
def test_it_compiles_without_a_spill(cutlass, api, architecture, count):
    """sm80: two types, two tiles, with and without a residual."""
    library, said = cutlass.build(api, architecture)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) == count and max(registers) < 255
    assert re.findall(r"(\d+) bytes spill stores", said) == ["0"] * count
    assert cutlass.build(api, architecture) == (library, said)  # from build/
