"""CUTLASS's convolutions beside ours: bias, residual and ReLU in one kernel, 16-bit types. For measurements alone; the
package does not need them, and nothing here is built unless a campaign is asked to (gpu_campaign.py --cutlass).

    python benchmarks/cutlass_conv/build.py 90     compiles for sm_90, and says what the compiler said of registers

CUTLASS 2.x, tiles 128x128x32 and 64x64x32, on every architecture from sm_80 on; CUTLASS 3.x, tile 128x128x64, on
sm_90a. Its headers come from the wheel that MISSING names.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
BUILT = HERE.parent.parent / "build" / "cutlass_conv"
MISSING = (
    "CUTLASS's headers are not installed: pip install --no-deps nvidia-cutlass==4.2.0.0 (without --no-deps it brings "
    "packages that nothing here needs)"
)
FLAGS = [
    "-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xptxas", "-v",
    "-Xcompiler", "-fPIC,-fvisibility=hidden", "-shared",
]  # fmt: skip
TILES = {"sm80": (128, 64), "sm90": (128,)}  # pixels, and as many filters
RESULTS = {1: "refuses this convolution", 2: "could not be prepared", 3: "could not be launched"}  # ConvResult


class Sizes(ctypes.Structure):
    """ConvSizes of conv.h."""

    _fields_ = [(name, ctypes.c_int) for name in "n h w c k r s p q stride padding".split()]


class Pointers(ctypes.Structure):
    """ConvPointers of conv.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in "x weight bias residual out".split()]


def includes() -> list[Path]:
    """The folders of CUTLASS's headers. Raises RuntimeError with the command that installs them."""
    spec = importlib.util.find_spec("cutlass_library")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        source = Path(folder) / "source"
        if (source / "include" / "cutlass" / "cutlass.h").is_file():
            return [source / "include", source / "tools" / "util" / "include"]
    raise RuntimeError(MISSING)


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if found is None:
        raise RuntimeError("no nvcc found; set CUDA_HOME")
    return found


def build(api: str, architecture: str) -> tuple[Path, str]:
    """The library and what the compiler said, from build/ where nothing has changed since.

    Args:
        api: "sm80" (CUTLASS 2.x) or "sm90" (3.x).
        architecture: "80", say; "90a" for "sm90".

    Raises RuntimeError with what the compiler says.
    """
    source = HERE / f"conv_{api}.cu"
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    paths = [f"-I{folder}" for folder in includes()]
    command = [find_nvcc(), *FLAGS, "-gencode", target, *paths, str(source)]
    contents = b"".join(path.read_bytes() for path in (source, HERE / "conv.h"))
    key = hashlib.sha256(contents + " ".join(command).encode()).hexdigest()[:16]
    library = BUILT / f"conv_{api}_{architecture}-{key}.so"
    log = library.with_suffix(".txt")
    if not library.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
        log.write_text(done.stdout + done.stderr)
        made.rename(library)
    return library, log.read_text()


def apis(capability: tuple[int, int]) -> dict[str, str]:
    """{api: architecture} for a device."""
    major, minor = capability
    return {"sm80": f"{major}{minor}"} | ({"sm90": "90a"} if major == 9 else {})


@cache
def _functions(capability: tuple[int, int]) -> dict[str, Callable]:
    found = {}
    for api, architecture in apis(capability).items():
        function = ctypes.CDLL(str(build(api, architecture)[0]))[f"cutlass_conv_{api}"]
        number, pointer = ctypes.c_int, ctypes.c_void_p
        function.argtypes = [number, number, ctypes.POINTER(Sizes), ctypes.POINTER(Pointers), pointer]
        found[api] = function
    return found


def takes(work) -> bool:
    """Whether CUTLASS has a kernel for a kernels.Problem."""
    x, layer = work.tensors["input"], work.layer
    return (
        x.dtype != torch.float32 and layer.relu and layer.groups == 1 and layer.channels % 8 == layer.filters % 8 == 0
    )


def arguments(work, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor) -> tuple[Sizes, Pointers]:
    """weight and bias with BatchNorm folded into them; all maps channels_last."""
    x, residual, layer = work.tensors["input"], work.tensors["residual"], work.layer
    for t in (x, weight, residual, out):
        assert t is None or (t.is_contiguous(memory_format=torch.channels_last) and t.data_ptr() % 16 == 0)
    batch, channels, h, w = x.shape
    sizes = (batch, h, w, channels, layer.filters, *weight.shape[2:], *out.shape[2:], layer.stride, layer.padding)
    pointers = (None if t is None else t.data_ptr() for t in (x, weight, bias, residual, out))
    return Sizes(*sizes), Pointers(*pointers)


def ways(work) -> dict[str, Callable[[], torch.Tensor]]:
    """Ways to run a kernels.Problem, by name; builds what they need first. None where CUTLASS has no kernel for it."""
    if not takes(work):
        return {}
    x, layer = work.tensors["input"], work.layer
    weight, bias = work.folded()
    size = (len(x), layer.filters, layer.out_size, layer.out_size)

    def way(function: Callable, tile: int) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
            sizes, pointers = arguments(work, weight, bias, out)
            stream = torch.cuda.current_stream().cuda_stream
            result = function(int(x.dtype == torch.bfloat16), tile, sizes, pointers, stream)
            if result:
                raise RuntimeError(f"CUTLASS {RESULTS.get(result, result)}")
            return out

        return call

    functions = _functions(torch.cuda.get_device_capability(x.device))
    return {f"CUTLASS {api}, {tile}": way(functions[api], tile) for api in functions for tile in TILES[api]}


def main() -> None:
    architecture = sys.argv[1] if len(sys.argv) == 2 else sys.exit("which architecture? 80, 86, 89 or 90, say")
    for api, target in apis((int(architecture[:-1]), int(architecture[-1]))).items():
        library, said = build(api, target)
        print(library, said, sep="\n")


if __name__ == "__main__":
    main()
