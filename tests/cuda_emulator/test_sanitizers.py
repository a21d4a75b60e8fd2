"""Every CUDA kernel on small cases under AddressSanitizer (bounds of every tensor) and ThreadSanitizer (races)."""

from pathlib import Path

import pytest

from .build import KERNELS, build, run_program

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


# float16 differs from bfloat16 in the instruction alone.
@pytest.mark.parametrize(("sanitizer", "element"), (("thread", "bf16"), ("address", "bf16"), ("address", "tf32")))
def test_convolutions(sanitizer, element):
    built = program("convolutions", sanitizer, element)
    for schedule, landing in ORDERS:
        result = run_program(built, "all", schedule=schedule, landing=landing)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("sanitizer", ("address", "thread"))
def test_pooling(sanitizer):
    built = program("pooling", sanitizer)
    for schedule, landing in ORDERS[: 1 if sanitizer == "thread" else 3]:  # whose threads meet at two barriers at most
        result = run_program(built, "all", schedule=schedule, landing=landing)
        assert result.returncode == 0, result.stdout + result.stderr
