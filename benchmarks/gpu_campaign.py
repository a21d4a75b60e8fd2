"""Everything worth doing when a CUDA machine is at hand, in one command:

    python benchmarks/gpu_campaign.py --out DIR [--steps build,doctor,test,peers,kernels] [--budget 300]

    build       compiles the extension in place, or takes the compiled parts of --wheel FILE
    doctor      the device, versions, backends, and the two ceilings: a large matrix product and a copy
    primitives  every instruction that the tests' emulator of a GPU imitates, against the GPU's own
    sanitizer   compute-sanitizer (memcheck, racecheck, synccheck, initcheck), where it is installed, on the smallest
                shapes of every CUDA C++ kernel, type and tile: benchmarks/sanitizer_cases.py
    test        the tests marked gpu, the smallest file first; memcheck on a few
    peers       whole models beside their peers, as `resnet-fast bench --peers`
    kernels     every convolution of the models with its BatchNorm, residual and ReLU, the ends of blocks with their
                projection, the stem with its max-pooling, add_relu and the poolings: on every backend, in Triton on
                each of its paths, beside torch, cuDNN's convolution alone and fused, for 1x1 the same product by
                cuBLAS, for add_relu a copy of as many bytes, and with --cutlass CUTLASS's convolutions; all of it
                replayed as CUDA graphs, so without launches
    models      our models on every backend, in both layouts; channels_last as CUDA graphs too
    tune        the best tile of the CUDA C++ convolution for each class of layers, all of them as JSON; then candidate
                entries for resnet_fast/kernels/configs.py on the same convolutions, on each path that Triton has for
                them (compiles on all cores first), and for each entry the best, as it would be written there
    train       a training step of whole models: time, peak memory, and the largest batch by two peaks
    profile     ncu on the layers that --layers names, where it is installed

No step starts a new row once it has used up its budget. Each row goes to DIR/campaign.jsonl as soon as it is measured,
and a second run with the same DIR goes on where the first stopped: what failed is tried again. A short table comes
last, and DIR/REPORT.md with each kernel's fraction of its bound and the ten worst. Every output is compared with
float64 before it is timed. Without a CUDA device, --device cpu runs the same steps on the CPU; what has no meaning
there says "absent".
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = (
    "build", "doctor", "primitives", "sanitizer", "test", "peers", "kernels", "models", "tune", "train", "profile",
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")


class Campaign:
    """The rows measured so far, here and in earlier runs into the same folder, and the time left for the step."""

    def __init__(self, out: Path, budget: float) -> None:
        self.out, self.budget = out, budget
        out.mkdir(parents=True, exist_ok=True)
        self.file = out / "campaign.jsonl"
        self.rows = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        self.step, self.start, self.skipped = "", time.monotonic(), 0

    def begin(self, step: str) -> None:
        self.step, self.start, self.skipped = step, time.monotonic(), 0

    def seconds_left(self) -> float:
        return self.budget - (time.monotonic() - self.start)

    def row(self, name: str, measure: Callable[[], dict]) -> None:
        """Measures a row, unless an earlier run has it or the step's time is used up. A failure is a row too."""
        if self.has(name):
            return
        if self.seconds_left() <= 0:
            self.skipped += 1
            return
        start = time.monotonic()
        try:
            figures = measure()
        except Exception as error:
            return self.fail(name, error)
        self.put(name, {**figures, "took_s": round(time.monotonic() - start, 2)})

    def has(self, name: str) -> bool:
        """Whether this step has measured the row."""
        return any(r["step"] == self.step and r["name"] == name and "error_message" not in r for r in self.rows)

    def put(self, name: str, figures: dict) -> None:
        """A row that is known; it replaces an earlier one."""
        self._add({"step": self.step, "name": name, **figures})

    def fail(self, name: str, error: Exception) -> None:
        self.put(name, {"error_message": f"{type(error).__name__}: {error}"[:300]})

    def absent(self, name: str, why: str) -> None:
        """Names what this step cannot do here, so that nobody takes it for done."""
        self.put(name, {"absent": why})

    def _add(self, row: dict) -> None:
        print(line(row), flush=True)
        self.rows = [r for r in self.rows if (r["step"], r["name"]) != (row["step"], row["name"])] + [row]
        text = "".join(to_json(r) + "\n" for r in self.rows)
        part = self.file.with_suffix(".part")
        part.write_text(text)
        part.replace(self.file)  # whoever stops us finds the old file or the new one


def to_json(row: dict) -> str:
    """With five significant digits. (resnet_fast.bench.results has the same, but may not be built yet.)"""
    return json.dumps(json.loads(json.dumps(row), parse_float=lambda text: float(f"{float(text):.5g}")))


def line(row: dict) -> str:
    """A row for a reader of the terminal: what it is, and what came of it."""
    head = f"{row['step']:10} {row['name']:46} "
    if "absent" in row:
        return f"{head}absent: {row['absent']}"
    if "error_message" in row:
        return f"{head}FAILED: {row['error_message']}"
    shown = (
        "ms",
        "img_s",
        "fraction_of_bound",
        "bound",
        "summary",
        "peak_gb",
        "largest_batch",
        "flops",
        "bandwidth",
        "available",
        "entry",
    )
    return head + " ".join(f"{key}={_short(row[key])}" for key in shown if key in row)


def _short(value):
    if isinstance(value, float):
        return float(f"{value:.3g}")
    return {k: _short(v) for k, v in value.items()} if isinstance(value, dict) else value


# The one step that must work before the package can be imported


def build(campaign: Campaign, args: argparse.Namespace) -> None:
    def compile_in_place() -> dict:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(60.0, args.budget))
        (campaign.out / "build.txt").write_text(done.stdout + done.stderr)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[1:])}: {done.stderr.strip().splitlines()[-1]} (see build.txt)")
        return {"summary": [text for text in done.stderr.splitlines() if text.startswith("[resnet_fast]")]}

    def unpack() -> dict:
        with zipfile.ZipFile(args.wheel) as wheel:
            libraries = [name for name in wheel.namelist() if name.endswith(".so")]
            if not libraries:
                raise ValueError(f"--wheel {args.wheel}: holds no compiled part")
            wheel.extractall(ROOT, libraries)
        return {"summary": libraries}

    if args.wheel:
        campaign.row(f"wheel {Path(args.wheel).name}", unpack)
    else:
        campaign.row("from source", compile_in_place)


# The command line


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for rows, logs and the report")
    default = "doctor,test,peers,kernels"
    parser.add_argument("--steps", default=default, help=f"of {','.join(STEPS)}, or all (default: {default})")
    parser.add_argument("--budget", type=float, default=300, metavar="SECONDS", help="for each step (default: 300)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--models", nargs="+", default=["resnet50", "resnet18"], metavar="MODEL")
    parser.add_argument("--batch", nargs="+", type=int, default=[256], metavar="N", help="default: 256")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="default: bfloat16")
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="these alone, beside ours (default: all)")
    text = "peers: leave out the process for each peer that measures its memory, which compiles once more"
    parser.add_argument("--no-memory", dest="memory", action="store_false", help=text)
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="samples of a model (default: 15)")
    text = (
        'only layers with this in their names, as "3x3 64"; for tune also "descriptors", "pointers", "few tiles", '
        '"CUDA C++"'
    )
    parser.add_argument("--layers", default="", metavar="TEXT", help=text)
    text = "test files, without compute-sanitizer (default: all with tests marked gpu)"
    parser.add_argument("--tests", nargs="+", metavar="FILE", help=text)
    text = "kernels: build CUTLASS's convolutions (1-2 minutes; needs its wheel) and measure them too"
    asked = os.environ.get("RESNET_FAST_CUTLASS") == "1"
    parser.add_argument("--cutlass", action="store_true", default=asked, help=f"{text}; also RESNET_FAST_CUTLASS=1")
    parser.add_argument("--wheel", metavar="FILE", help="for build: take its compiled parts")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and measure nothing")
    args = parser.parse_args(argv)
    args.steps = list(STEPS) if args.steps == "all" else args.steps.split(",")
    unknown = [step for step in args.steps if step not in STEPS]
    if unknown:
        parser.error(f"--steps must be of {','.join(STEPS)}, got {','.join(unknown)}")
    if args.wheel and not Path(args.wheel).is_file():
        parser.error(f"--wheel {args.wheel}: no such file")
    return args


def main(argv: list[str] | None = None) -> int:
    os.environ.setdefault("OMP_PROC_BIND", "true")  # before torch is imported; see resnet-fast bench --help
    # The checkout that this file lies in, whatever else is installed: here and in child processes.
    sys.path.insert(0, str(ROOT))
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT) + (os.pathsep + inherited if inherited else "")
    args = parse(argv)
    campaign = None if args.dry_run else Campaign(args.out, args.budget)
    if "build" in args.steps and campaign is not None:
        campaign.begin("build")
        build(campaign, args)
    import campaign_steps as steps  # beside this file; it needs the package, which build may just have compiled

    return steps.plan(args) if campaign is None else steps.run(campaign, args)


if __name__ == "__main__":
    sys.exit(main())
