"""What the launchers ask for compiles for sm_80 and sm_90 without a spill, into the right instructions.

The launchers themselves are called, on meta tensors, with a driver that only names a target; so what is compiled is
exactly what would be launched (alignment, strides and absent tensors included). Nothing runs.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from resnet_fast.kernels import add_relu as add_relu_module
from resnet_fast.kernels import conv_bn_relu as conv_module
from resnet_fast.kernels import conv_few_channels as few_channels_module

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes of shared memory a block may have. sm_86 and sm_89 run the same configuration as sm_80 and have less than it.
SHARED_LIMIT = {80: 101376, 90: 232448}
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


@pytest.fixture(params=(80, 90), ids=lambda arch: f"sm_{arch}")
def arch(request):
    triton.runtime.driver.set_active(MockDriver(request.param))
    return request.param


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
    names = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+ )?([A-Z][A-Z0-9_.]*)", dump, re.MULTILINE)
    return Report(
        registers=int(re.search(r"REG:(\d+)", dump)[1]),
        shared=compiled.metadata.shared,
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_relu_moves_128_bits_at_a_time(dtype, arch, monkeypatch, tmp_path):
    """In whole blocks for every n: this one is odd."""
    kernel = Recorder.of(monkeypatch, add_relu_module, "add_relu_kernel")
    a, b = (torch.empty(2**20 + 1, dtype=dtype, device="meta") for _ in range(2))
    add_relu_module.add_relu_triton(a, b)
    r = report(kernel.compiled, arch, tmp_path)

    threads = 32 * kernel.compiled.metadata.num_warps
    words = add_relu_module._BLOCK * dtype.itemsize // 16 // threads  # of a thread, in each tensor
    assert r.spills == 0
    assert r.count(r"LDG\..*128.*") == 2 * words
    assert r.count(r"STG\..*128.*") == words


def batch_past_int32(channels: int) -> int:
    """Images of 56 x 56 that together have more elements than 32 bits count."""
    return 2**31 // (channels * 56 * 56) + 1


@dataclass(frozen=True)
class Conv:
    """A convolution on [batch, channels, 56, 56]; filters and channels over all groups."""

    channels: int
    filters: int
    size: int = 3
    stride: int = 1
    groups: int = 1
    extras: bool = False  # a bias and a residual
    residual: bool = False
    batch: int = 8
    weight_layout: torch.memory_format = torch.channels_last


CONVS = {
    "stem": Conv(3, 64, size=7, stride=2),
    "3x3": Conv(64, 64, extras=True),
    "3x3 odd filters": Conv(72, 65, extras=True),
    "1x1": Conv(256, 512, size=1, stride=2),
    "1x1 with everything": Conv(256, 512, size=1, stride=2, extras=True),
    "expand": Conv(64, 256, size=1, residual=True),
    "depthwise": Conv(32, 32, groups=32),
    # What costs the most registers, all at once: 64-bit offsets, masked channels, elements that are read one by one.
    "most registers": Conv(72, 64, extras=True, batch=batch_past_int32(72), weight_layout=torch.contiguous_format),
    "most registers, odd": Conv(65, 65, extras=True, batch=batch_past_int32(65), weight_layout=torch.contiguous_format),
    "most registers, stem": Conv(3, 64, size=7, stride=2, extras=True, batch=batch_past_int32(3)),
}


def compile_conv(conv: Conv, dtype: torch.dtype, arch: int, monkeypatch, folder: Path) -> Report:
    def empty(*shape, memory_format=torch.channels_last):
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)

    kernel = Recorder.of(monkeypatch, conv_module, "conv_bn_relu_kernel")
    few_channels = Recorder.of(monkeypatch, few_channels_module, "conv_few_channels_kernel")
    Recorder.of(monkeypatch, few_channels_module, "pad_kernel")
    padding = conv.size // 2
    pixels = (56 + 2 * padding - conv.size) // conv.stride + 1
    k = conv.filters
    out = empty(conv.batch, k, pixels, pixels)
    gamma, beta, mean, var = (torch.empty(k, device="meta") for _ in range(4))
    conv_module.conv_bn_relu_triton(
        empty(conv.batch, conv.channels, 56, 56),
        empty(k, conv.channels // conv.groups, conv.size, conv.size, memory_format=conv.weight_layout),
        torch.empty(k, dtype=dtype, device="meta") if conv.extras else None,
        gamma, beta, mean, var,
        empty(*out.shape) if conv.extras or conv.residual else None,
        [conv.stride] * 2, [padding] * 2, [1, 1], conv.groups, 1e-5, True, out,
    )  # fmt: skip
    return report(kernel.compiled or few_channels.compiled, arch, folder)


def assert_sound(r: Report, arch: int) -> None:
    assert r.spills == 0, f"{r.spills} spills with {r.registers} registers"
    assert not r.serialized
    assert r.shared <= SHARED_LIMIT[arch]


# The 16-bit types differ in nothing but the multiply instruction, so float16 takes one case.
@pytest.mark.parametrize(
    ("dtype", "name"),
    [(dtype, name) for dtype in (torch.bfloat16, torch.float32) for name in CONVS] + [(torch.float16, "3x3")],
    ids=str,
)
def test_conv_bn_relu_runs_on_tensor_cores(dtype, name, arch, monkeypatch, tmp_path):
    """float32 in TF32, as torch's convolutions do by default."""
    r = compile_conv(CONVS[name], dtype, arch, monkeypatch, tmp_path)
    assert_sound(r, arch)
    assert r.count({80: r"HMMA\..*", 90: r"HGMMA\..*"}[arch]) > 0


@pytest.mark.parametrize("name", ["most registers", "most registers, odd"])
def test_conv_bn_relu_in_full_float32(name, arch, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    r = compile_conv(CONVS[name], torch.float32, arch, monkeypatch, tmp_path)
    assert_sound(r, arch)
    assert r.count(r"HG?MMA\..*") == 0 and r.count("FFMA") > 0


@pytest.mark.parametrize("name", ["3x3", "1x1"])
def test_conv_bn_relu_loads_128_bits_at_a_time(name, arch, monkeypatch, tmp_path):
    """Input and channels_last weight, on their way to shared memory."""
    r = compile_conv(CONVS[name], torch.bfloat16, arch, monkeypatch, tmp_path)
    assert r.count(r"LDGSTS\..*") == r.count(r"LDGSTS\..*128.*") > 0


def test_stem_loads_a_pixel_at_a_time(arch, monkeypatch, tmp_path):
    """4 channels of 16 bits: the window ends in the middle of 128 bits."""
    r = compile_conv(CONVS["stem"], torch.bfloat16, arch, monkeypatch, tmp_path)
    assert r.count(r"LDGSTS\..*") == r.count(r"LDGSTS\..*(64|128).*") > 0
