"""Kernels compiled for GPUs that need not be there, and what is in the result.

The launchers themselves are called, on meta tensors, with a driver that only names a target; so what is compiled is
exactly what would be launched (alignment, strides and absent tensors included). Nothing runs.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100)
# Bytes of shared memory a block may have. sm_86 and sm_89 run the same configuration as sm_80 and have less than it.
SHARED_LIMIT = {80: 101376, 90: 232448, 100: 232448}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class MockDriver:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch  # Triton keeps compiled kernels per device, so two targets must be two devices

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


class Recorder:
    """Stands in for a kernel: compiles what it is launched with, and keeps the result."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.compiled = None

    @classmethod
    def of(cls, monkeypatch, module, name):
        recorder = cls(getattr(module, name))
        monkeypatch.setattr(module, name, recorder)
        return recorder

    def __getitem__(self, grid):
        def compile(*args, **options):
            self.compiled = self.kernel.warmup(*args, grid=grid, **options)

        return compile


@dataclass(frozen=True)
class Report:
    registers: int
    shared: int  # bytes
    warps: int
    serialized: bool  # whether wgmma instructions wait for each other
    instructions: Counter[str]

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))

    @property
    def spills(self) -> int:
        """Instructions that touch local memory: the kernels have no arrays of their own there."""
        return self.count(r"(LDL|STL)(\..*)?")


def report(compiled, arch: int, folder: Path) -> Report:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [TOOLS / "cuobjdump", "-sass", "--dump-resource-usage", cubin]
    dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+ )?([A-Z][A-Za-z0-9_.]*)", dump, re.MULTILINE)
    return Report(
        registers=int(re.search(r"REG:(\d+)", dump)[1]),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        serialized=arch == 90 and "wgmma" in compiled.asm["ptx"] and serialized(compiled.asm["ptx"], folder),
        instructions=Counter(names),
    )


def serialized(ptx: str, folder: Path) -> bool:
    """Whether ptxas had to make wgmma instructions wait for each other; only its log tells."""
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [TOOLS / "ptxas", "-v", "--gpu-name=sm_90a", source, "-o", folder / "again.cubin"]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "registers" in log
    return "Potential Performance Loss" in log


@dataclass(frozen=True)
class Usage:
    """What is known of a kernel without reading its machine code, which takes twice as long as to compile it."""

    registers: int
    stack: int  # bytes of local memory; kernels have no arrays of their own there, so these are spills
    loads: Counter[str]  # of global memory, by PTX instruction
    stores: Counter[str]

    @staticmethod
    def wide(accesses: Counter[str]) -> int:
        """Those that move 128 bits or more at a time."""
        return sum(n for name, n in accesses.items() if re.search(r"v4\.b32|v2\.b64|v8\.b32", name))


def usage(compiled, folder: Path) -> Usage:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [TOOLS / "cuobjdump", "--dump-resource-usage", cubin]
    dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", dump)[1]) for name in ("REG", "STACK"))
    loads, stores = (Counter(re.findall(rf"\b{op}\.global\S*", compiled.asm["ptx"])) for op in ("ld", "st"))
    return Usage(registers, stack, loads, stores)


@contextmanager
def recorded(*kernels: tuple[object, str]) -> Iterator[list[Recorder]]:
    """Recorders in the place of kernels, each given as module and name."""
    with ExitStack() as stack:
        found = [Recorder(getattr(module, name)) for module, name in kernels]
        for (module, name), recorder in zip(kernels, found, strict=True):
            stack.enter_context(mock.patch.object(module, name, recorder))
        yield found


def compiled_by(launch: Callable[[], object], arch: int, *kernels: tuple[object, str]) -> Report:
    """What ``launch`` asks for; the last of ``kernels`` that it launches counts."""
    triton.runtime.driver.set_active(MockDriver(arch))
    with recorded(*kernels) as recorders, TemporaryDirectory() as folder:
        launch()
        return report([r.compiled for r in recorders if r.compiled is not None][-1], arch, Path(folder))


def usages_of(launch: Callable[[], object], arch: int, module: object) -> dict[str, Usage]:
    """Of all of the module's kernels that ``launch`` asks for, by name."""
    triton.runtime.driver.set_active(MockDriver(arch))
    names = [name for name in vars(module) if name.endswith("_kernel")]
    with recorded(*((module, name) for name in names)) as recorders, TemporaryDirectory() as folder:
        launch()
        return {n: usage(r.compiled, Path(folder)) for n, r in zip(names, recorders, strict=True) if r.compiled}


def assert_sound(r: Report, arch: int, limit: int | None = None) -> None:
    assert r.spills == 0, f"{r.spills} spills with {r.registers} registers"
    assert not r.serialized
    assert r.shared <= (limit or SHARED_LIMIT[arch])
