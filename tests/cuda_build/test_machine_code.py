"""The compiled CUDA part, read without a GPU: architectures, vector width, spills."""

import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

import resnet_fast

LIBRARY = Path(resnet_fast.__file__).parent / "_C_cuda.abi3.so"
TOOLS = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"


def cuobjdump(*options):
    env = {**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}"}
    result = subprocess.run(["cuobjdump", *options, str(LIBRARY)], env=env, capture_output=True, text=True, check=True)
    return result.stdout


@pytest.fixture(scope="module")
def functions():
    """Machine code by (architecture, function)."""
    found, arch, name = {}, None, None
    for line in cuobjdump("-sass").splitlines():
        if m := re.search(r"arch = (\S+)", line):
            arch = m[1]
        elif m := re.search(r"Function : (\S+)", line):
            name = m[1]
        elif arch and name:
            found[arch, name] = found.get((arch, name), "") + line + "\n"
    return found


def test_both_architectures_and_ptx(functions):
    assert {arch for arch, _ in functions} == {"sm_80", "sm_90a"}
    assert "compute_80" in cuobjdump("-ptx") or "sm_80" in cuobjdump("-ptx")


def test_no_local_memory(functions):
    for name, code in functions.items():
        assert not re.search(r"\b(LDL|STL)\b", code), name


def test_add_relu_moves_128_bits(functions):
    wide = {key: code for key, code in functions.items() if "add_relu" in key[1] and "uint4" in key[1]}
    assert len(wide) == 2 * 3  # architectures x dtypes
    for name, code in wide.items():
        assert len(re.findall(r"LDG\.E\.128", code)) >= 4, name  # two operands, two vectors in flight
        assert "STG.E.128" in code, name
