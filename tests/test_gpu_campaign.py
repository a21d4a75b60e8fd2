"""The campaign for a CUDA machine: what it would do, and the same steps run on the CPU."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from checkout import ROOT, copy_sources

from resnet_fast import _C

pytest.importorskip("torchvision")

CAMPAIGN = ROOT / "benchmarks" / "gpu_campaign.py"
STEPS = ["build", "doctor", "test", "peers", "kernels", "models", "tune", "train", "profile"]
# The smallest of everything, in the program's own options.
SMALL = ["--device", "cpu", "--models", "resnet18", "--batch", "1", "--rounds", "1", "--peers", "torch",
         "--tests", "tests/test_checks.py", "--layers", "1x1 256->512"]  # fmt: skip


def run(*arguments, script=CAMPAIGN, **env):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.run([sys.executable, str(script), *arguments], env=env, capture_output=True, text=True)


def rows(out):
    return [json.loads(line) for line in (out / "campaign.jsonl").read_text().splitlines()]


def test_dry_run_names_every_step_and_writes_nothing(tmp_path):
    result = run("--out", str(tmp_path / "out"), "--steps", "all", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert list(dict.fromkeys(line.split()[0] for line in result.stdout.splitlines()[:-1])) == STEPS
    assert "torch.compile max-autotune" in result.stdout and "tensorrt" in result.stdout
    assert "34 layers and 8 add_relu, bfloat16 batch 256" in result.stdout
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """Every step but build on the CPU, and what was printed."""
    out = tmp_path_factory.mktemp("campaign")
    steps = ",".join(STEPS[1:])
    result = run("--out", str(out), "--steps", steps, "--dtype", "float32", *SMALL)
    assert result.returncode == 0, result.stdout + result.stderr
    return out, result.stdout


def test_every_step_runs_on_the_cpu(campaign):
    out, text = campaign
    found = {row["name"]: row for row in rows(out)}
    assert found["environment"]["threads"] >= 1 and found["ceilings"]["bandwidth"] > 1e9
    assert found["pytest tests/test_checks.py"]["summary"]
    layer = found["1x1 256->512 s2 @14 float32 batch 1"]
    assert {"torch", "ours", "ours, cpu"} <= set(layer["ms"]) and layer["error"]["ours"] < 1e-4
    assert layer["flops"] == pytest.approx(2 * 49 * 512 * 256, rel=1e-4) and 0 < layer["fraction_of_bound"] < 5
    assert found["resnet18, batch 1, float32, channels_last, cpu"]["error"] < 1e-4
    assert found["resnet18, batch 1, float32, resnet_fast"]["loss"] >= 0  # one image is learnt at once
    for name in ("batch_norm_relu", "Triton tiles", "ncu", "compute-sanitizer"):
        assert found[name]["absent"] and any(name in ln and "absent: " in ln for ln in text.splitlines())
    cell = json.loads((out / "peers.json").read_text())["cells"][0]
    assert set(cell["peers"]) == {"resnet_fast", "torch"} and cell["peers"]["torch"]["running_rss_mb"] > 100


def test_it_ends_with_a_short_table_and_a_report(campaign):
    out, text = campaign
    last = text.strip().splitlines()
    assert last[-1].endswith("REPORT.md") and any(ln.startswith("worst") and "of its" in ln for ln in last)
    page = (out / "REPORT.md").read_text()
    for title in ("## Whole models", "## Single layers", "## Ways to run our models", "## Training steps"):
        assert title in page


def test_a_second_run_measures_only_what_is_missing(campaign, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(campaign[0], out)
    before = rows(out)
    kept = [row for row in before if row["name"] != "ceilings"]
    kept[0] = {"step": kept[0]["step"], "name": kept[0]["name"], "error_message": "RuntimeError: out of luck"}
    (out / "campaign.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    result = run("--out", str(out), "--steps", "doctor,peers,kernels", "--dtype", "float32", *SMALL)
    assert result.returncode == 0, result.stdout + result.stderr
    after = {row["name"]: row for row in rows(out)}
    assert set(after) == {row["name"] for row in before}
    assert "error_message" not in after[kept[0]["name"]]  # what failed was tried again
    unchanged = [row for row in kept[1:] if "took_s" in row]
    assert [after[row["name"]] for row in unchanged] == unchanged


def test_a_spent_budget_is_said(tmp_path):
    result = run("--out", str(tmp_path), "--steps", "models", "--budget", "0", "--dtype", "float32", *SMALL)
    assert result.returncode == 0, result.stderr
    assert "rows left out: the budget of 0 s is used up" in result.stdout


def test_a_failure_is_a_row_and_the_campaign_goes_on(tmp_path):
    arguments = ["--dtype", "float32", *SMALL, "--peers", "no such peer"]
    result = run("--out", str(tmp_path), "--steps", "peers,test", *arguments)
    assert result.returncode == 1
    assert "FAILED: ValueError: --peers must be of resnet_fast, resnet_fast module, torch," in result.stdout
    assert [row["step"] for row in rows(tmp_path)][-1] == "test"
    assert "## Failed" in (tmp_path / "REPORT.md").read_text()


def test_tune_runs_in_tritons_interpreter(tmp_path):
    pytest.importorskip("triton")
    arguments = ["--out", str(tmp_path), "--steps", "tune", "--dtype", "float16", *SMALL]
    result = run(*arguments, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr
    (row,) = rows(tmp_path)
    assert len(row["ms"]) == 2 and all(error < 1e-2 for error in row["error"].values())


def test_build_from_a_wheel(tmp_path):
    checkout = copy_sources(tmp_path)
    library = Path(_C.__file__)
    wheel = tmp_path / "resnet_fast-0.1.0-cp310-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.write(library, "resnet_fast/_C.abi3.so")
        file.writestr("resnet_fast/cli.py", "raise SystemExit('the wheel must not replace sources')")
    script = checkout / "benchmarks" / "gpu_campaign.py"
    result = run("--out", str(checkout / "out"), "--steps", "build,doctor", "--device", "cpu", "--wheel", str(wheel),
                 script=script)  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert (checkout / "resnet_fast" / "_C.abi3.so").read_bytes() == library.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "doctor,nonsense"], f"--steps must be of {','.join(STEPS)}, got nonsense"),
        (["--wheel", "no.whl"], "--wheel no.whl: no such file"),
        (["--steps", "doctor"], "no CUDA device here; --device cpu runs the same steps on the CPU"),
    ],
)
def test_mistakes_are_told_in_words(tmp_path, arguments, words):
    result = run("--out", str(tmp_path), *arguments)
    assert result.returncode == 2 and words in result.stderr
