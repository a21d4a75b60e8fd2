"""Builds CUDA sources for the CPU: g++, the emulator's headers in the place of CUDA's, the emulator linked in.

    library = build("name", ["csrc/cuda/add_relu.cu"])                       # a shared library
    program = build("name", [..., "driver.cpp"], program=True, sanitizer="thread")

What is built is kept under build/cuda_emulator, by the contents of everything that went into it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "csrc" / "cuda"
BUILT = ROOT / "build" / "cuda_emulator"
ENGINE = tuple(HERE / name for name in ("engine.cpp", "ampere.cpp", "hopper.cpp", "tma.cpp", "wgmma.cpp"))

SCHEDULES, LANDINGS = ("forward", "reverse", "random"), ("late", "early", "random")  # enums of engine.h

# Kernels read values as integers and back, as nvcc allows.
FLAGS = ["-std=c++17", "-O2", "-march=native", "-fPIC", "-fno-strict-aliasing", "-g1", "-Wall", "-Wno-unknown-pragmas"]
# The engine is not instrumented for ThreadSanitizer: it says itself what it reads and writes.
SANITIZERS = {
    None: ([], []),
    "address": (["-fsanitize=address"], ["-fsanitize=address"]),
    "thread": (["-fsanitize=thread"], ["-DEMULATOR_TSAN"]),
}


def torch_flags() -> dict[str, list[str]]:
    """For sources that include torch's headers: those of the stable ABI, as in setup.py."""
    torch = Path(find_spec("torch").origin).parent
    flags = ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-isystem{torch / 'include'}"]
    return {"flags": flags, "libraries": [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]}


def _digest(paths: Iterable[Path]) -> bytes:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.digest()


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-8000:]}")


def _object(source: Path, flags: Sequence[str], headers: bytes) -> Path:
    command = [os.environ.get("CXX", "g++"), *FLAGS, *flags, f"-I{HERE / 'include'}"]
    key = hashlib.sha256(headers + source.read_bytes() + "\0".join([*command, str(source)]).encode()).hexdigest()[:24]
    target = BUILT / f"{source.stem}-{key}.o"
    if not target.exists():
        made = target.with_suffix(f".{os.getpid()}.o")
        _run([*command, "-x", "c++", "-c", str(source), "-o", str(made)])
        made.rename(target)
    return target


def build(
    name: str,
    sources: Sequence[str | Path],
    *,
    flags: Sequence[str] = (),
    libraries: Sequence[str] = (),
    sanitizer: str | None = None,
    program: bool = False,
    kernels: Path = KERNELS,
) -> Path:
    """The library or program made of ``sources`` and the emulator.

    Args:
        name: of the file.
        sources: .cu and .cpp files; relative ones are those of the project.
        flags: for the compiler, of the sources.
        libraries: for the linker.
        sanitizer: None, "address" or "thread".
        program: an executable instead of a shared library.
        kernels: the folder of the kernels' headers; another one than csrc/cuda for changed copies of it.

    Raises RuntimeError with what the compiler says.
    """
    of_kernels, of_engine = SANITIZERS[sanitizer]
    emulator = _digest([*HERE.glob("*.h"), *HERE.glob("*/*.h")])
    headers = emulator + _digest([*kernels.parent.glob("*.h"), *kernels.glob("*.h"), *kernels.glob("*.cuh")])
    jobs = [(ROOT / source, [*of_kernels, *flags, f"-I{kernels}"], headers) for source in sources]
    jobs += [(source, of_engine, emulator) for source in ENGINE]
    BUILT.mkdir(parents=True, exist_ok=True)
    with open(BUILT / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(lambda job: _object(*job), jobs))
        key = hashlib.sha256(" ".join([name, str(sanitizer), *map(str, objects), *libraries]).encode()).hexdigest()[:24]
        target = BUILT / f"{name}-{key}{'' if program else '.so'}"
        if not target.exists():
            link = [os.environ.get("CXX", "g++"), *of_kernels, *([] if program else ["-shared"])]
            _run([*link, *map(str, objects), *libraries, "-o", str(target)])
    return target


@cache
def _wrapper() -> tuple[str, ...]:
    """Programs with ThreadSanitizer want addresses that are not random."""
    wrapper = ("setarch", "-R")
    found = shutil.which(wrapper[0]) and subprocess.run([*wrapper, "true"], capture_output=True).returncode == 0
    return wrapper if found else ()


def run_program(
    program: Path, *arguments: str, schedule: str = "forward", landing: str = "late", seed: int = 1
) -> subprocess.CompletedProcess:
    """The finished process of a program that takes, after its own ``arguments``, those of emulator_configure."""
    order = (str(SCHEDULES.index(schedule)), str(LANDINGS.index(landing)), str(seed))
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    command = [*_wrapper(), str(program), *arguments, *order]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
