"""Every CUDA kernel on small cases under AddressSanitizer (bounds of every tensor) and ThreadSanitizer (races)."""

import os
import subprocess
from functools import cache
from pathlib import Path

import pytest

from .build import KERNELS, ROOT, build
from .emulated import LANDINGS, SCHEDULES

PROGRAMS = Path(__file__).parent / "programs"
SOURCES = {"convolutions": (), "pooling": [KERNELS / f"{n}.cu" for n in ("add_relu", "max_pool", "avg_pool_flatten")]}
ELEMENTS = {"bf16": "__nv_bfloat16", "fp16": "__half", "tf32": "float"}
ORDERS = (("forward", "late"), ("reverse", "early"), ("random", "random"))


def program(name: str, sanitizer: str | None, element: str = "bf16", kernels: Path = KERNELS) -> Path:
    """Of programs/: "convolutions" in that element, or "pooling" in all; built with the kernels in that folder."""
    sources = [kernels / source.name for source in SOURCES[name]] or [kernels / f"conv_bn_relu_sm80_{element}.cu"]
    flags = [f"-DELEMENT={ELEMENTS[element]}"]
    sources.append(PROGRAMS / f"{name}.cpp")
    return build(name, sources, flags=flags, sanitizer=sanitizer, program=True, kernels=kernels)


@cache
def without_random_addresses() -> tuple[str, ...]:
    """ThreadSanitizer of older compilers does not start where the kernel spreads addresses over too many bits."""
    wrapper = ("setarch", "-R")
    works = subprocess.run([*wrapper, "true"], capture_output=True).returncode == 0
    return wrapper if works else ()


def run(built: Path, case: str, schedule: str = "forward", landing: str = "late", seed: int = 1):
    """The finished process."""
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    order = (str(SCHEDULES.index(schedule)), str(LANDINGS.index(landing)), str(seed))
    command = [*without_random_addresses(), str(built), case, *order]
    return subprocess.run(command, env={**os.environ, **options}, capture_output=True, text=True, cwd=ROOT)


# float16 differs from bfloat16 in the instruction alone.
@pytest.mark.parametrize(("sanitizer", "element"), (("thread", "bf16"), ("address", "bf16"), ("address", "tf32")))
def test_convolutions(sanitizer, element):
    built = program("convolutions", sanitizer, element)
    for order in ORDERS:
        result = run(built, "all", *order)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("sanitizer", ("address", "thread"))
def test_pooling(sanitizer):
    built = program("pooling", sanitizer)
    for order in ORDERS[: 1 if sanitizer == "thread" else 3]:  # whose threads meet at two barriers at most
        result = run(built, "all", *order)
        assert result.returncode == 0, result.stdout + result.stderr
