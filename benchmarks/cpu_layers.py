"""Every layer shape of some models on the CPU: our kernel beside oneDNN's fused convolution with packed weights.

    OMP_PROC_BIND=true python benchmarks/cpu_layers.py [MODEL ...] [--levels avx512 avx2] [--batch 1 8] [--json FILE]

Each instruction-set level and dtype is a process of its own, in which oneDNN is held to the same instructions
(ONEDNN_MAX_CPU_ISA). There both are compared with float64, then run in turn, round by round; a round in which the
system switched a thread out is dropped and made again.

GFLOP/s         from the fastest round, counted in direct convolutions
of peak         of the multiply-adds that the level was measured to do in registers (Winograd's algorithm may pass 1)
ratio           oneDNN's time over ours, by the fastest rounds and by medians; below 1 the row is marked "slower"
rounds          how many were clean

How they are called: resnet_fast/bench/cpu_layers.py. `resnet-fast report` takes FILE from
benchmarks/results/DEVICE/cpu_layers.json. Exit code 1 if one of our outputs is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence

import torch
from torch.hub import tqdm  # works without the package tqdm

from resnet_fast.backends import CPU_LEVELS
from resnet_fast.bench import cpu_layers, layers
from resnet_fast.bench.cells import DTYPES
from resnet_fast.bench.cpu_layers import Job
from resnet_fast.bench.peers import OURS
from resnet_fast.bench.results import per_second, table, write_json
from resnet_fast.measure import environment


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = f"of {', '.join(layers.MODELS)} (default: {' '.join(cpu_layers.MODELS)})"
    parser.add_argument("models", nargs="*", default=cpu_layers.MODELS, metavar="MODEL", help=text)
    parser.add_argument("--levels", nargs="+", choices=CPU_LEVELS, help="default: those of this CPU, the best first")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="N", help="default: 1 8")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"], help="default: float32")
    text = "only layers whose description contains TEXT, such as '3x3 64->64'"
    parser.add_argument("--layers", default="", metavar="TEXT", help=text)
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="clean rounds at least (default: 20)")
    text = "read 128 MiB between calls, so that weights come from memory as in a network; input and residual stay warm"
    parser.add_argument("--cold", action="store_true", help=text)
    parser.add_argument("--threads", type=int, metavar="N", help="of torch (default: torch's)")
    parser.add_argument("--json", metavar="FILE", help="write times, versions and hardware to FILE")
    args = parser.parse_args(argv)
    unknown = [name for name in args.models if name not in layers.MODELS]
    if unknown:
        parser.error(f"unknown model {unknown[0]!r}; the models are {', '.join(layers.MODELS)}")
    if min(*args.batch, args.rounds, args.threads or 1) < 1:
        parser.error("--batch, --rounds and --threads must be at least 1")
    return args


def _jobs(args: argparse.Namespace) -> list[Job]:
    levels = args.levels or cpu_layers.levels()[::-1]
    rest = (args.models, args.batch, args.layers, args.rounds, args.cold, torch.get_num_threads())
    return [Job(level, dtype, *rest) for level, dtype in itertools.product(levels, args.dtype)]


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    jobs = _jobs(args)
    facts = environment()
    found = {"environment": facts, "device": facts["cpu"], "cold": args.cold, "ceilings": {}, "cells": []}
    right = True
    with tqdm(total=sum(len(job.layers()) * len(job.batches) for job in jobs), unit="layer") as bar:
        for job in jobs:
            items = cpu_layers.run(job, bar.update)
            found["ceilings"][f"{job.level}, {job.dtype}"] = ceilings = next(items)
            measured = []
            for cell in items:
                measured.append(cell)
                found["cells"].append(cell)
                write_json(args.json, found)  # what is measured stays, whatever happens later
            peak, bandwidth = per_second(ceilings["flops"][job.dtype], "FLOP"), per_second(ceilings["bandwidth"], "B")
            for name, cells in cpu_layers.groups(measured).items():
                print(f"\n{name} ({peak}, {bandwidth})\n{table(cpu_layers.rows(cells))}", flush=True)
            right &= not any(OURS in cell.get("wrong", ()) for cell in measured)
    print(f"\noneDNN's time over ours, summed by kind (least of a layer)\n{table(cpu_layers.summary(found['cells']))}")
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
