"""Every variant that the launchers can ask for compiles for sm_80 and sm_90 without a spill, into the right instructions.

The launchers themselves are called, on meta tensors, with a driver that only names a target; so what is compiled is
exactly what would be launched (alignment, strides and absent tensors included). Nothing runs.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from resnet_fast.kernels import add_relu as add_relu_module
from resnet_fast.kernels import conv_bn_relu as conv_module

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHS = (80, 90)
# Bytes a block may have on the smallest GPU of each generation (sm_86 and sm_89 run sm_80's configuration).
SHARED_LIMIT = {80: 101376, 90: 232448}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class MockDriver:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch  # Triton keeps compiled kernels per device

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


class Recorder:
    """Stands in for a kernel: compiles what it is launched with, and keeps the result."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.compiled = []

    def __getitem__(self, grid):
        def compile(*args, **options):
            self.compiled.append(self.kernel.warmup(*args, grid=grid, **options))

        return compile


@dataclass(frozen=True)
class Report:
    registers: int
    spilled: int  # bytes, stores and loads
    warnings: list[str]
    shared: int  # bytes
    instructions: Counter[str]

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))


def report(compiled, arch: int, folder: Path) -> Report:
    ptx, cubin = folder / "kernel.ptx", folder / "kernel.cubin"
    ptx.write_text(compiled.asm["ptx"])
    cubin.write_bytes(compiled.asm["cubin"])
    target = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    command = [TOOLS / "ptxas", "-v", f"--gpu-name={target}", ptx, "-o", folder / "again.cubin"]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    sass = subprocess.run([TOOLS / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+ )?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE)
    return Report(
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        spilled=int(spills[1]) + int(spills[2]),
        # Such as wgmma instructions that had to be serialized.
        warnings=re.findall(r"Potential Performance Loss[^\n]*", log),
        shared=compiled.metadata.shared,
        instructions=Counter(names),
    )


@pytest.fixture(params=ARCHS, ids=lambda arch: f"sm_{arch}")
def arch(request):
    triton.runtime.driver.set_active(MockDriver(request.param))
    return request.param


def recorded(module, name: str, monkeypatch) -> Recorder:
    recorder = Recorder(getattr(module, name))
    monkeypatch.setattr(module, name, recorder)
    return recorder


def compile_add_relu(n: int, dtype, arch, monkeypatch, folder) -> Report:
    kernel = recorded(add_relu_module, "add_relu_kernel", monkeypatch)
    a, b = (torch.empty(n, dtype=dtype, device="meta") for _ in range(2))
    add_relu_module.add_relu_triton(a, b)
    return report(kernel.compiled[0], arch, folder)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2**20, 2**20 + 1])
def test_add_relu(n, dtype, arch, monkeypatch, tmp_path):
    """128-bit accesses in whole blocks for every n, even one that 16 does not divide."""
    r = compile_add_relu(n, dtype, arch, monkeypatch, tmp_path)
    words = 1024 * dtype.itemsize // (16 * 128)  # a thread's, per operand
    assert r.spilled == 0 and r.count(r"LDL.*|STL.*") == 0
    assert r.count(r"LDG.*\.128.*") >= 2 * words
    assert r.count(r"STG.*\.128.*") >= words


@dataclass(frozen=True)
class Conv:
    """A convolution on [8, channels, 56, 56]; filters and channels over all groups."""

    channels: int
    filters: int
    size: int = 3
    stride: int = 1
    groups: int = 1
    residual: bool = False
    bias: bool = False
    affine: bool = True
    batch: int = 8
    memory_format: torch.memory_format = torch.channels_last  # the weight's


CONVS = {
    "stem": Conv(3, 64, size=7, stride=2),
    "3x3": Conv(64, 64),
    "3x3 contiguous weight": Conv(64, 64, memory_format=torch.contiguous_format),
    "3x3 stride 2": Conv(128, 256, stride=2),
    "1x1 residual": Conv(64, 256, size=1, residual=True),
    "1x1 stride 2": Conv(256, 512, size=1, stride=2),
    "groups": Conv(128, 128, groups=32),
    "depthwise": Conv(32, 32, groups=32),
    "odd channels": Conv(65, 33, residual=True, bias=True, affine=False),
    "few filters": Conv(96, 17),
    "worst": Conv(
        72, 64, residual=True, bias=True, batch=2**31 // (72 * 56 * 56) + 1, memory_format=torch.contiguous_format
    ),
    "worst elements": Conv(
        65, 65, residual=True, bias=True, batch=2**31 // (65 * 56 * 56) + 1, memory_format=torch.contiguous_format
    ),
    "64-bit offsets": Conv(64, 64, residual=True, bias=True, batch=2**31 // (64 * 56 * 56) + 1),
    "64-bit offsets, stem": Conv(3, 64, size=7, stride=2, batch=2**31 // (3 * 56 * 56) + 1),
}


def compile_conv(conv: Conv, dtype, arch, monkeypatch, folder) -> Report:
    def empty(*shape, memory_format=torch.contiguous_format):
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)

    kernel = recorded(conv_module, "conv_bn_relu_kernel", monkeypatch)
    padding = conv.size // 2
    pixels = (56 + 2 * padding - conv.size) // conv.stride + 1
    k = conv.filters
    out = empty(conv.batch, k, pixels, pixels, memory_format=torch.channels_last)
    weight = empty(k, conv.channels // conv.groups, conv.size, conv.size, memory_format=conv.memory_format)
    mean, var, gamma, beta = torch.empty(4, k, device="meta").unbind()
    conv_module.conv_bn_relu_triton(
        empty(conv.batch, conv.channels, 56, 56, memory_format=torch.channels_last),
        weight,
        empty(k) if conv.bias else None,
        *((gamma, beta) if conv.affine else (None, None)),
        mean,
        var,
        empty(*out.shape, memory_format=torch.channels_last) if conv.residual else None,
        [conv.stride] * 2, [padding] * 2, [1, 1], conv.groups, 1e-5, True, out,
    )  # fmt: skip
    return report(kernel.compiled[0], arch, folder)


@cache
def tensor_core_instruction(arch: int) -> str:
    return {80: r"HMMA.*", 90: r"HGMMA.*|HMMA.*"}[arch]


def assert_sound(r: Report, arch: int) -> None:
    assert r.spilled == 0 and r.count(r"LDL.*|STL.*") == 0, r
    assert r.warnings == []
    assert r.shared <= SHARED_LIMIT[arch]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONVS)
def test_conv_bn_relu(name, dtype, arch, monkeypatch, tmp_path):
    r = compile_conv(CONVS[name], dtype, arch, monkeypatch, tmp_path)
    print(
        "\nROW",
        arch,
        name,
        dtype,
        r.registers,
        r.spilled,
        r.shared,
        r.count("HGMMA.*"),
        r.count("HMMA.*"),
        r.count("LDGSTS.*128.*"),
        r.count("LDGSTS.*"),
        r.warnings,
    )
    assert_sound(r, arch)
    assert r.count(tensor_core_instruction(arch)) > 0
