"""Floating point operations, least traffic and least time of every traffic pattern and block of a model, here:

    python benchmarks/limits.py [MODEL ...] [--batch 8] [--dtype float32] [--device cpu] [--plot FILE.svg]

The model behind it: resnet_fast/bench/limits.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resnet_fast.bench import layers, limits, plots
from resnet_fast.bench.cells import DTYPES
from resnet_fast.bench.results import per_second, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", default=["resnet50"], metavar="MODEL", help=f"of {', '.join(layers.MODELS)}"
    )
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose ceilings (default: cpu)")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="also draw the traffic of every pattern")
    args = parser.parse_args()
    roof = limits.ceilings(args.device)
    peak = per_second(roof.flops[args.dtype], "FLOP")
    print(f"{args.device}: {peak} in {args.dtype}, {per_second(roof.bandwidth, 'B')} ({roof.how})")
    for model in args.models:
        rows = limits.table(model, args.batch, DTYPES[args.dtype], roof)
        print(f"\n{model}, batch {args.batch}; blocks in the pattern epilogue\n{table(rows)}")
    if args.plot:
        plots.traffic(args.models, args.plot)


if __name__ == "__main__":
    main()
