"""A build from source, and that its objects of the instruction-set levels are separate: what one level was compiled to
can never be linked into another."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from checkout import ROOT, copy_sources, load_setup

KERNELS = sorted((ROOT / "csrc/cpu/kernels").glob("*.cpp"))


SETUP = load_setup()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A fresh checkout that benchmarks/gpu_campaign.py has built, and what it printed."""
    folder = copy_sources(tmp_path_factory.mktemp("built"))
    # A machine that is busy with other tests took longer than the 300 s that the campaign allows a step.
    steps = ["--steps", "build,doctor", "--device", "cpu", "--budget", "1800"]
    command = [sys.executable, "benchmarks/gpu_campaign.py", "--out", "out", *steps]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "RESNET_FAST_CUDA": "0"}
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
def objects(tmp_path_factory):
    """Object files by level, compiled with the flags of the build but without optimization: then no function of a
    header vanishes by being inlined everywhere, and it takes seconds."""
    folder = tmp_path_factory.mktemp("levels")
    found, commands = {}, []
    for level in SETUP.LEVELS:
        found[level] = [folder / f"{level}_{source.stem}.o" for source in KERNELS]
        for source, target in zip(KERNELS, found[level], strict=True):
            options = [*SETUP.KERNEL_FLAGS, "-O0", *SETUP.LEVELS[level], f"-DRESNET_FAST_LEVEL={level}"]
            commands.append([os.environ.get("CXX", "g++"), *options, "-c", source, "-o", target])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(subprocess.check_call, commands))
    return found


def test_no_symbol_is_shared_between_levels(objects):
    """Where two objects define a weak symbol of one name, the linker takes either: none may lie outside its level."""
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


@pytest.mark.parametrize("level", SETUP.LEVELS)
@pytest.mark.parametrize("source", KERNELS, ids=lambda source: source.name)
def test_kernel_objects_export_no_weak_symbols(source, level, built):
    """As they are built. A weak symbol (an inline function) built for AVX-512 could be the one that the linker gives to
    the portable path."""
    (target,) = built[0].glob(f"build/temp*/{level}/{source.stem}.o")
    lines = subprocess.run(["nm", "-C", target], capture_output=True, text=True, check=True).stdout.splitlines()
    kinds = {line[17]: line[19:] for line in lines}
    assert not set("VWvwu") & set(kinds), lines
    defined = [line[19:] for line in lines if line[17] in "TRDB"]
    assert defined and all(name.startswith(f"resnet_fast::{level}::") for name in defined)
