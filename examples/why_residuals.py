#!/usr/bin/env python3
"""Why residual networks work: four claims, measured and drawn in minutes, on real images, with this package's blocks.

    python examples/why_residuals.py all --quick

Needs `pip install -e ".[examples]"`. examples/README.md explains what comes out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
from pathlib import Path

CLAIMS = {
    "degradation": "training error of plain and residual networks of growing depth, on handwritten digits",
    "gradients": "correlation of the gradients at different photographs against depth, beside the theory",
    "parameters": "a bottleneck block beside two 3x3 convolutions: weights, operations, time, memory",
    "shortcuts": "identity and projection shortcuts: what each costs, and how networks learn with them",
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    listed = "\n".join(f"  {name:<13}{text}" for name, text in CLAIMS.items())
    parser = argparse.ArgumentParser(
        description="Why residual networks work: claims, measured and drawn.\n\n"
        + listed
        + "\n  all          all four",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("claim", choices=[*CLAIMS, "all"], metavar="CLAIM", help="one of these, or all")
    text = "fewer depths and epochs: less than 2 minutes each on 2 cores; without, 2 to 6 minutes each"
    parser.add_argument("--quick", action="store_true", help=text)
    parser.add_argument("--seed", type=int, default=0, help="of weights and order of images (default: 0)")
    text = "folder for NAME.svg and NAME.md (default: why_residuals)"
    parser.add_argument("--out", type=Path, default=Path("why_residuals"), metavar="FOLDER", help=text)
    parser.add_argument("--format", choices=("svg", "png"), default="svg", help="of the plots (default: svg)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU")
    return parser.parse_args(arguments)


def show(name: str, args: argparse.Namespace) -> bool:
    """Measures, prints and draws one claim; returns whether it holds."""
    from tqdm import tqdm

    from resnet_fast.bench.results import markdown, table

    claim = importlib.import_module(f"claims.{name}")
    settings = claim.QUICK if args.quick else claim.FULL
    started = time.perf_counter()
    with tqdm(total=claim.steps(settings), desc=name, unit="step", leave=False) as bar:
        found = claim.measure(settings, args.seed, args.device, bar.update)
    rows, verdicts = claim.rows(found), claim.verdicts(found)
    lines = [f"{'holds' if v.holds else 'DOES NOT HOLD'}: {v.sentence}" for v in verdicts]
    args.out.mkdir(parents=True, exist_ok=True)
    plot = args.out / f"{name}.{args.format}"
    claim.draw(found, plot)
    text = "\n".join([f"# {claim.TITLE}", "", markdown(rows), "", *(f"- {line}" for line in lines)])
    plot.with_suffix(".md").write_text(text + "\n")
    print("\n".join([f"{claim.TITLE}\n", table(rows), "", *lines]))
    print(f"{plot} and .md, in {time.perf_counter() - started:.0f} s\n", flush=True)
    return all(v.holds for v in verdicts)


def main(arguments: list[str] | None = None) -> int:
    """Exits with 0 if all that was asked for holds, else with 1."""
    args = parse(arguments)
    missing = [name for name in ("matplotlib", "sklearn", "torch", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        print(f'why_residuals.py needs {", ".join(missing)}: pip install -e ".[examples]"', file=sys.stderr)
        return 2
    # Before scikit-learn, whose OpenMP would leave torch's one core under OMP_PROC_BIND: twice the time on two.
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no CUDA device here", file=sys.stderr)
        return 2
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = list(CLAIMS) if args.claim == "all" else [args.claim]
    return 0 if all([show(name, args) for name in names]) else 1


if __name__ == "__main__":
    sys.exit(main())
