"""The compiled CUDA part, read without a GPU: architectures, registers, spills, and the instructions that do the work."""

import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

import resnet_fast

LIBRARY = Path(os.environ.get("RESNET_FAST_CUDA_LIBRARY") or Path(resnet_fast.__file__).parent / "_C_cuda.abi3.so")
TOOLS = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"

ARCHITECTURES = ("sm_80", "sm_90a")
ELEMENTS = {
    "nv_bfloat16": r"HMMA\.16816\.F32\.BF16",
    "half": r"HMMA\.16816\.F32(?!\.BF16)",
    "float": r"HMMA\.1688\.F32\.TF32",
}
# Threads of a block, blocks that shall fit on a multiprocessor: what its 65,536 registers are divided by.
TILES = {"128, 128, 2, 4": (256, 2), "128, 64, 2, 2": (128, 3), "64, 64, 2, 2": (128, 4), "128, 32, 4, 1": (128, 4)}
HALO_TILES = ("128, 128, 2, 4", "128, 64, 2, 2")


def cuobjdump(*options):
    env = {**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}"}
    result = subprocess.run(["cuobjdump", *options, str(LIBRARY)], env=env, capture_output=True, text=True, check=True)
    return result.stdout


def by_function(text, header):
    """Lines by (architecture, demangled function)."""
    found, arch, lines = {}, None, []
    for line in text.splitlines():
        if m := re.search(r"arch = (\S+)", line):
            arch = m[1]
        elif m := re.search(header, line):
            lines = found[arch, m[1]] = []
        else:
            lines.append(line)
    names = subprocess.run(
        ["c++filt"], input="\n".join(n for _, n in found), capture_output=True, text=True, check=True
    )
    demangled = dict(zip((n for _, n in found), names.stdout.splitlines(), strict=True))
    return {(arch, demangled[name]): "\n".join(lines) for (arch, name), lines in found.items()}


@pytest.fixture(scope="module")
def functions():
    """Machine code."""
    return by_function(cuobjdump("-sass"), r"Function : (.+)")


@pytest.fixture(scope="module")
def registers():
    usage = by_function(cuobjdump("-res-usage"), r"Function (.+):$")
    return {key: int(re.search(r"REG:(\d+)", text)[1]) for key, text in usage.items()}


def of_kernel(functions, kernel, *words):
    return {k: v for k, v in functions.items() if f"::{kernel}<" in k[1] and all(word in k[1] for word in words)}


def convolutions(functions):
    """(architecture, element, tile, kernel's name, whether element by element): of every convolution kernel."""
    for (arch, name), code in functions.items():
        if m := re.search(
            r"::(conv_bn_relu_sm80\w*)<(?:\w*::)?_*(\w+), resnet_fast::Tile<(\d+, \d+, \d+, \d+), [^>]*>(.*?)>\(", name
        ):
            yield arch, m[2], m[3], m[1], "false" in m[4] or "0" in m[4], code


def test_both_architectures_and_ptx(functions):
    assert {arch for arch, _ in functions} == set(ARCHITECTURES)
    assert "compute_80" in cuobjdump("-ptx") or "sm_80" in cuobjdump("-ptx")


def test_no_local_memory(functions):
    for name, code in functions.items():
        assert not re.search(r"\b(LDL|STL)\b", code), name


def test_every_convolution_is_there(functions):
    found = sorted(
        (arch, element, tile, kernel, gathers) for arch, element, tile, kernel, gathers, _ in convolutions(functions)
    )
    aligned = [(tile, "conv_bn_relu_sm80_kernel", False) for tile in TILES]
    halo = [(tile, "conv_bn_relu_sm80_halo_kernel", False) for tile in HALO_TILES]
    kinds = [*aligned, *halo, ("128, 64, 2, 2", "conv_bn_relu_sm80_kernel", True)]
    assert found == sorted((arch, element, *kind) for arch in ARCHITECTURES for element in ELEMENTS for kind in kinds)


def test_convolutions_multiply_on_tensor_cores(functions):
    """In a step, a warp multiplies its tile twice (32 of 64 bytes at a time)."""
    for arch, element, tile, kernel, _, code in convolutions(functions):
        block_m, block_n, warps_m, warps_n = map(int, tile.split(", "))
        products = (block_m // warps_m // 16) * (block_n // warps_n // 8) * 2
        assert len(re.findall(ELEMENTS[element], code)) >= products, (arch, kernel, element, tile)
        assert len(re.findall("HMMA", code)) == len(re.findall(ELEMENTS[element], code))
        assert "LDSM.16.M88.4" in code


def test_convolutions_move_128_bits(functions):
    for arch, element, tile, kernel, gathers, code in convolutions(functions):
        what = (arch, kernel, element, tile)
        assert "STG.E.128" in code and "LDG.E.128" in code, what  # output and residual
        assert "STS.64" in code and "LDS.128" in code, what  # staging
        assert gathers or "LDGSTS.E.BYPASS.128" in code, what
        assert not gathers or "STS.128" in code, what


def test_convolutions_leave_registers_for_their_blocks(registers):
    seen = 0
    for arch, _, tile, kernel, gathers, used in convolutions(registers):
        threads, blocks = TILES[tile]
        blocks -= gathers
        assert used <= 65536 // (threads * blocks) // 8 * 8, (arch, kernel, tile)
        seen += 1
    assert seen == len(ARCHITECTURES) * len(ELEMENTS) * 7


def test_add_relu_moves_128_bits(functions):
    wide = of_kernel(functions, "add_relu_kernel", "uint4")
    assert len(wide) == 2 * 3  # architectures x dtypes
    for name, code in wide.items():
        assert len(re.findall(r"LDG\.E\.128", code)) >= 4, name  # two operands, two vectors in flight
        assert "STG.E.128" in code, name


def in_flight(code, load=r"LDG\.E\.128"):
    """The most loads in a row of which none is waited for by arithmetic on floats."""
    most = now = 0
    for line in code.splitlines():
        if re.search(load, line):
            now += 1
            most = max(most, now)
        elif re.search(r"\b(FADD|FSETP|FMNMX|FMUL|HADD2|PRMT|STG|STS)\b", line):
            now = 0
    return most


def test_poolings_move_128_bits_and_have_several_loads_in_flight(functions):
    for kernel, words, loads in (
        ("max_pool_kernel", ("uint4", "3"), 3),
        ("avg_pool_flatten_kernel", ("uint4",), 4),
        ("max_pool_backward_kernel", ("uint4",), 2),
    ):
        wide = of_kernel(functions, kernel, *words)
        assert len(wide) >= 2 * 3, kernel
        for name, code in wide.items():
            assert "STG.E.128" in code, name
            assert in_flight(code) >= loads or ", 0," in name[1], (name, in_flight(code))


# Of the kernels of batch normalisation: how many there are for words of 16 bytes in one type, the loads that a thread
# shall have in flight, whether they write maps, and the blocks of 256 threads that shall fit on a multiprocessor.
NORMS = {
    "batch_norm_moments_kernel": (1, 4, False, 3),
    "batch_norm_relu_kernel": (2, 2, True, 4),
    "batch_norm_relu_sums_kernel": (2, 4, False, 3),
    "batch_norm_relu_backward_kernel": (2, 4, True, 3),
}


@pytest.mark.parametrize("kernel", NORMS)
def test_norms_move_128_bits_and_have_several_loads_in_flight(functions, kernel):
    count, loads, writes, _ = NORMS[kernel]
    wide = of_kernel(functions, kernel, "uint4")
    assert len(wide) == len(ARCHITECTURES) * 3 * count
    for name, code in wide.items():
        assert in_flight(code) >= loads, (name, in_flight(code))
        assert ("STG.E.128" in code) == writes, name


@pytest.mark.parametrize("kernel", NORMS)
def test_norms_leave_registers_for_their_blocks(registers, kernel):
    found = of_kernel(registers, kernel)
    assert len(found) == len(ARCHITECTURES) * 3 * 2 * NORMS[kernel][0]  # and for words of one value
    for name, used in found.items():
        assert used <= 65536 // (256 * NORMS[kernel][3]) // 8 * 8, (name, used)
