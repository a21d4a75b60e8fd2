"""The project's CUDA kernels in this process, behind its operators, on CPU tensors."""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from resnet_fast.backends import declare_cuda_emulated

from .build import KERNELS, LANDINGS, SCHEDULES, build, torch_flags

# Every combination that tells apart more than the ones before it.
ORDERS = (("forward", "late", 1), ("reverse", "early", 1), ("random", "random", 1), ("random", "random", 2))


class SharedMemory(ctypes.Structure):
    """Thread blocks and warp-wide instructions; instructions that access shared memory, the passes that they take, and
    the passes that they would take without bank conflicts."""

    _fields_ = [(n, ctypes.c_uint64) for n in ("blocks", "collectives", "accesses", "wavefronts", "best")]


def sources() -> list[Path]:
    """Kernels and host sides, but for what calls cuDNN."""
    of_host = [KERNELS / f"{name}.cpp" for name in ("ops", "batch_norm", "conv_bn_relu", "pooling")]
    return of_host + [p for p in sorted(KERNELS.glob("*.cu")) if p.stem != "fold_batch_norm"]


@cache
def load() -> ctypes.CDLL:
    """Registers the operators' CUDA kernels for CPU tensors, once."""
    flags, libraries = torch_flags().values()
    library = build("operators", sources(), flags=["-DRESNET_FAST_EMULATED", *flags], libraries=libraries)
    torch.ops.load_library(str(library))
    loaded = ctypes.CDLL(str(library))
    loaded.emulator_launches.restype = ctypes.c_char_p
    loaded.emulator_configure.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64]
    declare_cuda_emulated()
    return loaded


def configure(schedule: str = "forward", landing: str = "late", seed: int = 1) -> None:
    """In which order threads run, and when asynchronous copies arrive."""
    load().emulator_configure(SCHEDULES.index(schedule), LANDINGS.index(landing), seed)


@contextmanager
def shared_memory() -> Iterator[SharedMemory]:
    """Counts what the kernels do meanwhile."""
    found = SharedMemory()
    load().emulator_count(1)
    try:
        yield found
    finally:
        load().emulator_counters(ctypes.byref(found))
        load().emulator_count(0)


@contextmanager
def launches() -> Iterator[Counter]:
    """Counts the kernels launched, by name."""
    found: Counter = Counter()
    load().emulator_launches()
    yield found
    for line in load().emulator_launches().decode().splitlines():
        found[re.search(r"(\w+_kernel)", line)[1]] += 1
