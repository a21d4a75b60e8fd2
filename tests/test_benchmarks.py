"""The benchmarks' rows: that all of them can be selected, that few of them are the default, and that they run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_fast.bench import layers

ROOT = Path(__file__).parent.parent
TRAINED = "basic-layer4-train-batch1-float32-ours_cpu"
STAGES = ("layer1", "layer2", "layer3", "layer4")


def run(*arguments):
    # Not as one of several processes, which pytest-benchmark refuses to time.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def collect(*arguments):
    """The parameters of the rows that a selection keeps, and all that was printed."""
    result = run("--collect-only", *arguments)
    assert result.returncode == 0, result.stdout[-2000:]
    return [s.split("[")[1].rstrip("]") for s in result.stdout.splitlines() if "::" in s], result.stdout


@pytest.fixture(scope="module")
def everything():
    rows, printed = collect("-m", "quick or not quick")
    assert "quick selection" not in printed
    return rows


def test_whole_matrix(everything):
    assert len(everything) > 1000 and len(set(everything)) == len(everything)
    blocks = {f"{kind}-{stage}" for kind in ("basic", "bottleneck", "bottleneck_projection") for stage in STAGES}
    blocks |= {f"basic_projection-{stage}" for stage in STAGES[1:]} | {"stem", "stem_pool"}
    subjects = blocks | set(layers.MODELS) | {f"add_relu-{stage}" for stage in STAGES}
    ways = ("ours_cpu", "ours_reference", "eager", "eager_channels_last", "compile")
    expected = {
        f"{subject}-{kind}-batch{batch}-{dtype}-{way}-cpu"
        for subject in subjects
        for kind in ("forward", "train")
        for batch in (1, 8, 32)
        for dtype in ("float32", "bfloat16", "float16")
        for way in ways
    }
    assert expected <= set(everything)


def test_every_convolution_is_an_op(everything):
    kinds = ("conv7x7_stride2-", "conv1x1-", "conv1x1_stride2-", "conv3x3-", "conv3x3_stride2-")
    ending = "-forward-batch1-float32-eager-cpu"
    ops = [row for row in everything if row.startswith(kinds) and row.endswith(ending)]
    assert len(ops) == len(layers.distinct(["resnet18", "resnet50"]))
    assert all(any(op.startswith(kind) for op in ops) for kind in kinds)


def test_default_is_the_quick_selection(everything):
    rows, printed = collect()
    assert set(rows) < set(everything) and 30 < len(rows) < 120
    assert f"the quick selection; {len(everything) - len(rows)} more rows" in printed
    types = {row.split("-forward")[0].split("-train")[0].split("-")[0] for row in rows}
    assert types == {row.split("-")[0] for row in everything} - set(layers.MODELS[1:])


def test_rows_run(tmp_path):
    file = tmp_path / "rows.json"
    forward = "(conv3x3_stride2-256to256 and eager or resnet18 and ours_cpu) and forward and batch1 and float32"
    result = run("-k", f"{forward} or {TRAINED}", "--benchmark-only", "--benchmark-json", str(file))
    assert result.returncode == 0, result.stdout[-2000:]
    assert "quick selection" not in result.stdout
    rows = json.loads(file.read_text())["benchmarks"]
    assert len(rows) == 4
    for row in rows:
        facts = row["extra_info"]
        assert {"torch", "triton", "commit", "threads", "isa_level", "device_name", "backend", "way"} <= set(facts)
        assert facts["batch"] == 1 and facts["dtype"] == "float32" and facts["device"] == "cpu"
        assert facts["pass"] == ("train" if TRAINED in row["name"] else "forward")
        assert 0 < facts["fraction_of_bound"] < 3 and facts["bound"] in ("compute", "memory")
        assert facts["gflops"] > 0 and facts["gb_s"] > 0 and facts["relative_rms"] < 0.05
        assert facts["images_per_s"] == pytest.approx(1 / row["stats"]["median"])
