"""Every CUDA kernel on small cases under AddressSanitizer (bounds of every tensor) and ThreadSanitizer (races)."""

from pathlib import Path

import pytest

from .build import KERNELS, build, run_program

PROGRAMS = Path(__file__).parent / "programs"
SOURCES = {
    "convolutions": (),
    "pooling": ("add_relu", "max_pool", "max_pool_with_indices", "avg_pool_flatten"),
    "batch_norm": ("batch_norm_statistics", "batch_norm_relu", "batch_norm_relu_backward"),
}
ELEMENTS = {"bf16": "__nv_bfloat16", "fp16": "__half", "tf32": "float"}
ORDERS = (("forward", "late"), ("reverse", "early"), ("random", "random"))


def program(name: str, sanitizer: str | None, element: str = "bf16", kernels: Path = KERNELS) -> Path:
    """Of programs/: "convolutions" in that element, or one of the others in all; built with the kernels in that
    folder, of which only what has changed is compiled again."""
    sources = [kernels / f"{source}.cu" for source in SOURCES[name] or (f"conv_bn_relu_sm80_{element}",)]
    if all(_is_unchanged(path) for path in kernels.iterdir() if path not in sources):
        sources, kernels = [KERNELS / path.name if _is_unchanged(path) else path for path in sources], KERNELS
    flags = [f"-DELEMENT={ELEMENTS[element]}"] if name == "convolutions" else ["-O0"]  # which compiles in half the time
    sources.append(PROGRAMS / f"{name}.cpp")
    return build(name, sources, flags=flags, sanitizer=sanitizer, program=True, kernels=kernels)


def _is_unchanged(path: Path) -> bool:
    return path.read_bytes() == (KERNELS / path.name).read_bytes()


# float16 differs from bfloat16 in the instruction alone.
@pytest.mark.parametrize(("sanitizer", "element"), (("thread", "bf16"), ("address", "bf16"), ("address", "tf32")))
def test_convolutions(sanitizer, element):
    built = program("convolutions", sanitizer, element)
    for schedule, landing in ORDERS:
        result = run_program(built, "all", schedule=schedule, landing=landing)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("sanitizer", ("address", "thread"))
@pytest.mark.parametrize("name", ("pooling", "batch_norm"))
def test_maps(name, sanitizer):
    built = program(name, sanitizer)
    case, orders = ("all", ORDERS) if sanitizer == "address" else ("races", ORDERS[:1])
    for schedule, landing in orders:
        result = run_program(built, case, schedule=schedule, landing=landing)
        assert result.returncode == 0, result.stdout + result.stderr
