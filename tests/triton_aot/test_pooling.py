"""What the launchers of the poolings ask for compiles without a spill, and moves 128 bits at a time."""

from __future__ import annotations

import pytest
import torch
from compiled import ARCHITECTURES, DTYPES, Report, assert_sound, compiled_by

from resnet_fast.kernels import avg_pool_flatten as avg_pool_module
from resnet_fast.kernels import max_pool as max_pool_module

pytestmark = pytest.mark.parametrize("arch", ARCHITECTURES)


def channels_last(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


def past_int32(channels: int) -> int:
    """Images of 56 x 56 that together have more elements than 32 bits count."""
    return 2**31 // (channels * 56 * 56) + 1


def compile_max_pool(arch, dtype, channels=64, kernel=3, stride=2, padding=1, batch=8) -> Report:
    pixels = (56 + 2 * padding - kernel) // stride + 1
    x, out = (channels_last(batch, channels, size, size, dtype=dtype) for size in (56, pixels))
    arguments = (x, [kernel] * 2, [stride] * 2, [padding] * 2, [1, 1], out)
    return compiled_by(lambda: max_pool_module.max_pool_triton(*arguments), arch, (max_pool_module, "max_pool_kernel"))


def compile_avg_pool(arch, dtype, channels=2048, size=7, batch=64) -> Report:
    x = channels_last(batch, channels, size, size, dtype=dtype)
    out = torch.empty(batch, channels, dtype=dtype, device="meta")
    kernel = (avg_pool_module, "avg_pool_flatten_kernel")
    return compiled_by(lambda: avg_pool_module.avg_pool_flatten_triton(x, out), arch, kernel)


def assert_vectors(r: Report, access: str) -> None:
    assert r.count(rf"{access}\..*") == r.count(rf"{access}\..*128.*") > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_pool_of_the_stem(dtype, arch):
    """A thread has 8 elements: the loads of all 9 taps stand side by side, not in a loop."""
    r = compile_max_pool(arch, dtype)
    words = 8 * dtype.itemsize // 16
    assert_sound(r, arch)
    assert r.count(r"LDG\..*128.*") == 9 * words and r.count(r"STG\..*128.*") == words
    assert_vectors(r, "LDG"), assert_vectors(r, "STG")


# By name: arguments, and whether 16 bytes are moved at a time.
MAX_POOLS = {
    "2x2": (dict(kernel=2, padding=0), True),
    "7x7": (dict(kernel=7, padding=3), True),
    "96 channels": (dict(channels=96), True),
    "3 channels": (dict(channels=3), False),
    "64-bit": (dict(batch=past_int32(64)), True),
    # What costs the most registers: 64-bit offsets of elements that are read one by one.
    "64-bit, odd channels": (dict(channels=65, batch=past_int32(65)), False),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", MAX_POOLS)
def test_max_pool(name, dtype, arch):
    arguments, vectors = MAX_POOLS[name]
    r = compile_max_pool(arch, dtype, **arguments)
    assert_sound(r, arch)
    if vectors:
        assert_vectors(r, "LDG"), assert_vectors(r, "STG")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_avg_pool_flatten_of_resnets_last_map(dtype, arch):
    """49 pixels on 16 threads: the 4 loads of each stand side by side. What is stored is one value a thread."""
    r = compile_avg_pool(arch, dtype)
    assert_sound(r, arch)
    assert_vectors(r, "LDG")
    assert r.count(r"LDG\..*") == 4


AVG_POOLS = {
    "batch 1": (dict(batch=1), True),
    "large map": (dict(channels=64, size=112, batch=1), True),
    "one pixel": (dict(size=1), False),
    "64-bit": (dict(channels=64, size=56, batch=past_int32(64)), True),
    "64-bit, odd channels": (dict(channels=65, size=56, batch=past_int32(65)), False),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", AVG_POOLS)
def test_avg_pool_flatten(name, dtype, arch):
    arguments, vectors = AVG_POOLS[name]
    r = compile_avg_pool(arch, dtype, **arguments)
    assert_sound(r, arch)
    if vectors:
        assert_vectors(r, "LDG")
