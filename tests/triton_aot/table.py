"""Writes benchmarks/results/triton_tiles.md: what every convolution of `convolutions.py` is compiled to.

python tests/triton_aot/table.py        (4 minutes; `make triton-table`)
"""

from __future__ import annotations

from pathlib import Path

import triton
from compiled import ARCHITECTURES, Report
from convolutions import LAYERS, Layer, compile_layer

from resnet_fast.kernels.configs import LIMITS, StemConfig

FILE = Path(__file__).parents[2] / "benchmarks" / "results" / "triton_tiles.md"
# Operations a second on tensor cores in 16 bits (half of it in TF32) and bytes a second of memory that an A100, an H100
# and a B200 sustain: round figures, assumed and not measured.
SUSTAINED = {80: (260e12, 1.75e12), 90: (800e12, 3.0e12), 100: (1800e12, 7.0e12)}
HEADER = (
    "layer", "entry", "tile", "warps", "stages", "registers", "shared KB", "blocks", "FLOP per byte of L2", "bound us", "by",
)  # fmt: skip
TEXT = f"""# What the Triton convolutions are compiled to

Made by `make triton-table` with Triton {triton.__version__}; nothing here was run. Layers: batch 256 at the sizes of ResNets
unless they say otherwise, bfloat16 unless they say otherwise. "blocks" run at a time on a multiprocessor. "FLOP per byte
of L2" is what a tile makes of a byte that it fetches. "bound" is the least time for the layer's operations or its bytes
of memory, whichever is longer, at assumed rates: an A100 260 TFLOP/s and 1.75 TB/s, an H100 800 and 3.0, a B200 1800 and
7.0 (TF32 half of it; full float32 has no bound here). No kernel may spill, and none does.
"""


def _bound(layer: Layer, arch: int) -> tuple[str, str]:
    operations, memory = SUSTAINED[arch]
    if layer.dtype.itemsize == 4:
        if not layer.tf32:
            return "", ""
        operations /= 2
    compute, move = layer.operations / operations, layer.bytes / memory
    return f"{1e6 * max(compute, move):.1f}", "operations" if compute > move else "memory"


def _row(name: str, arch: int) -> tuple[str, ...]:
    layer = LAYERS[name]
    result, (product, shape_class), entry = compile_layer(layer, arch)
    depth = "" if isinstance(entry, StemConfig) else f" x {entry.block_k}"
    columns = min(entry.block_n, layer.filters)
    intensity = entry.block_m * columns / (entry.block_m + columns) * 2 / layer.dtype.itemsize
    return (
        name, f"{product}, {shape_class}", f"{entry.block_m} x {entry.block_n}{depth}", str(entry.num_warps),
        str(entry.num_stages), str(result.registers), f"{result.shared / 1024:.0f}", str(_blocks(result, arch)),
        f"{intensity:.0f}", *_bound(layer, arch),
    )  # fmt: skip


def _blocks(result: Report, arch: int) -> int:
    return LIMITS[f"sm_{arch}"].blocks(result.registers, result.shared, result.warps)


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def rows_of(text: str) -> dict[int, set[str]]:
    """The layers of each architecture that a table has."""
    found: dict[int, set[str]] = {}
    for line in text.splitlines():
        if line.startswith("## sm_"):
            rows = found[int(line.removeprefix("## sm_"))] = set()
        elif line.startswith("| ") and not line.startswith(("| layer", "| ---")):
            rows.add(line.split(" | ")[0].removeprefix("| "))
    return found


def main() -> None:
    lines = [TEXT]
    for arch in ARCHITECTURES:
        lines += [f"## sm_{arch}", "", _line(HEADER), _line(("---",) * len(HEADER))]
        for name in LAYERS:
            lines.append(_line(_row(name, arch)))
            print(f"sm_{arch} {name}", flush=True)
        lines.append("")
    FILE.write_text("\n".join(lines))
    print(FILE)


if __name__ == "__main__":
    main()
