"""A build from source, and that its objects of the instruction-set levels are separate: what one level was compiled to
can never be linked into another."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT, copy_sources, load_setup

KERNELS = sorted((ROOT / "csrc/cpu/kernels").glob("*.cpp"))
SETUP = load_setup()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A fresh checkout that benchmarks/gpu_campaign.py has built, and what it printed.

    Without optimization: it takes a third of the time, and no function of a header vanishes by being inlined
    everywhere, so that all of them can be seen in the objects.
    """
    folder = copy_sources(tmp_path_factory.mktemp("built"))
    compiler = folder / "unoptimized"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" -O0\n')
    compiler.chmod(0o755)
    # A machine that is busy with other tests took longer than the 300 s that the campaign allows a step.
    steps = ["--steps", "build,doctor", "--device", "cpu", "--budget", "1800"]
    command = [sys.executable, "benchmarks/gpu_campaign.py", "--out", "out", *steps]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "RESNET_FAST_CUDA": "0", "CXX": str(compiler)}
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result.stdout


def test_build_from_source(built):
    folder, text = built
    assert "CPU-only build (RESNET_FAST_CUDA=0)" in text
    assert (folder / "resnet_fast" / "_C.abi3.so").exists()


def symbols(file: Path) -> dict[str, str]:
    """Mangled name: nm's letter for its kind, of everything that the linker sees."""
    lines = subprocess.run(["nm", "--extern-only", file], capture_output=True, text=True, check=True).stdout
    return {name: kind for kind, name in re.findall(r"^[0-9a-f ]* (\w) (\S+)$", lines, re.MULTILINE)}


@pytest.fixture(scope="module")
def objects(built):
    """Object files by level."""
    found = {level: sorted(built[0].glob(f"build/temp*/{level}/*.o")) for level in SETUP.LEVELS}
    for files in found.values():
        assert [file.stem for file in files] == [source.stem for source in KERNELS]
    return found


def test_no_symbol_is_shared_between_levels(objects):
    """Where two objects define a weak symbol of one name (an inline function), the linker takes either, and the one
    built for AVX-512 could be given to the portable path: every symbol is in its level's namespace."""
    assert len(objects) > 0 and len(KERNELS) > 4
    for level, files in objects.items():
        own = re.compile(f"_ZN?K?11resnet_fast{len(level)}{level}\\d")
        for file in files:
            for name, kind in symbols(file).items():
                if kind == "U" and not name.startswith("_Z"):
                    continue  # a call of C, as of memcpy
                assert own.match(name), f"not of {level}'s namespace: {file.name}: {name} ({kind})"


def test_every_level_has_every_kernel(objects):
    listed = (ROOT / "csrc/cpu/levels.h").read_text()
    listed = listed[listed.index("#define RESNET_FAST_LEVEL_LIST") : listed.index("#define RESNET_FAST_POINTER")]
    names = re.findall(r"\bK\([\w ]+, (\w+),", listed) + re.findall(r"\bC\((\w+)\)", listed)
    assert len(names) > 15 and "conv_gemm" in names and "vector_width" in names
    for level, files in objects.items():
        prefix = f"_ZN11resnet_fast{len(level)}{level}"
        defined = [name for file in files for name, kind in symbols(file).items() if kind in "TRDB"]
        for name in names:
            assert sum(bool(re.match(f"{prefix}{len(name)}{name}E", d)) for d in defined) == 1, f"{level}: {name}"
