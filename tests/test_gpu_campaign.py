"""The campaign for a CUDA machine: what it would do, and the same steps run on the CPU."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkout import ROOT, copy_sources

from resnet_fast import _C
from resnet_fast.choose import CUDA_TILES

pytest.importorskip("torchvision")

CAMPAIGN = ROOT / "benchmarks" / "gpu_campaign.py"
STEPS = ["build", "doctor", "primitives", "sanitizer", "test", "peers", "kernels", "models", "tune", "train", "profile"]
# The smallest of everything, in the program's own options.
SMALL = ["--device", "cpu", "--models", "resnet18", "--batch", "1", "--rounds", "1", "--peers", "torch",
         "--tests", "tests/test_checks.py", "--layers", "1x1 256->512"]  # fmt: skip


def run(*arguments, script=CAMPAIGN, **env):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.run([sys.executable, str(script), *arguments], env=env, capture_output=True, text=True)


def rows(out):
    return [json.loads(line) for line in (out / "campaign.jsonl").read_text().splitlines()]


def test_dry_run_names_every_step_and_writes_nothing(tmp_path):
    result = run("--out", str(tmp_path / "out"), "--steps", "all", "--dry-run", "--cutlass")
    assert result.returncode == 0, result.stderr
    assert list(dict.fromkeys(line.split()[0] for line in result.stdout.splitlines()[:-1])) == STEPS
    assert "torch.compile max-autotune" in result.stdout and "tensorrt" in result.stdout
    assert "42 convolutions and 57 operators on maps, bfloat16 batch 256" in result.stdout
    assert "CUTLASS's convolutions, built first" in result.stdout
    assert "memcheck on benchmarks/sanitizer_cases.py" in result.stdout
    assert f"{len(CUDA_TILES)} tiles of the CUDA C++ convolution" in result.stdout
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """Every step but build on the CPU, and what was printed."""
    out = tmp_path_factory.mktemp("campaign")
    steps = ",".join(STEPS[1:])
    result = run("--out", str(out), "--steps", steps, "--dtype", "float32", *SMALL, RESNET_FAST_CUTLASS="1")
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
    end = found["3x3 512->512 s1 @7+relu with projection 1x1 256->512 s2 @14 float32 batch 1"]
    assert {"torch", "ours", "ours, cpu"} <= set(end["ms"]) and end["flops"] > layer["flops"]
    assert found["resnet18, batch 1, float32, channels_last, cpu"]["error"] < 1e-4
    assert found["resnet18, batch 1, float32, resnet_fast"]["loss"] >= 0  # one image is learnt at once
    absent = ("primitives", "memcheck", "racecheck", "CUTLASS", "CUDA C++ tiles", "Triton tiles", "ncu")
    for name in (*absent, "bottleneck_chain", "compute-sanitizer"):
        assert found[name]["absent"] and any(name in ln and "absent: " in ln for ln in text.splitlines())
    cell = json.loads((out / "peers.json").read_text())["cells"][0]
    assert set(cell["peers"]) == {"resnet_fast", "torch"} and cell["peers"]["torch"]["running_rss_mb"] > 100


def test_it_ends_with_a_short_table_and_a_report(campaign):
    out, text = campaign
    last = text.strip().splitlines()
    assert last[-1].endswith("REPORT.md") and any(ln.startswith("worst") and "of its" in ln for ln in last)
    page = (out / "REPORT.md").read_text()
    for title in ("## Whole models", "## Single layers", "## Ways to run our models", "## Training"):
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


@pytest.fixture
def cuda_steps(monkeypatch):
    """The module of the steps for the CUDA C++ kernels."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import campaign_cuda

    return campaign_cuda


@pytest.mark.parametrize(
    ("summary", "code", "errors", "message"),
    [
        ("ERROR SUMMARY: 0 errors", 0, 0, None),
        ("ERROR SUMMARY: 3 errors", 9, 3, "exit code 9, 3 errors (see sanitizer_memcheck.txt)"),
        ("RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", 0, 1, "exit code 0, 1 errors"),
        ("sanitizer_cases.py: wrong", 1, None, "exit code 1, None errors"),
    ],
)
def test_what_compute_sanitizer_says_is_a_row(cuda_steps, tmp_path, summary, code, errors, message):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho \"$@ caching $PYTORCH_NO_CUDA_MEMORY_CACHING\"\necho '{summary}'\nexit {code}\n")
    tool.chmod(0o755)
    campaign = SimpleNamespace(out=tmp_path, seconds_left=lambda: 60.0)
    row = cuda_steps.sanitized(campaign, "memcheck", str(tool))
    assert row["errors"] == errors and row["tail"].strip().endswith(summary)
    assert "--tool memcheck --error-exitcode 9" in row["tail"] and "sanitizer_cases.py caching 1" in row["tail"]
    assert (message is None and "error_message" not in row) or row["error_message"].startswith(message)


def test_primitives_that_were_not_tried_are_no_proof(cuda_steps, tmp_path, monkeypatch):
    campaign = SimpleNamespace(out=tmp_path, seconds_left=lambda: 60.0)
    for text, passes in (("def test_a(): pass", True), ("import pytest\ndef test_a(): pytest.skip()", False)):
        file = tmp_path / "test_primitives.py"
        file.write_text(text.replace("def", "import pytest\n@pytest.mark.gpu\ndef"))
        monkeypatch.setattr(cuda_steps, "PRIMITIVES", str(file))
        if passes:
            assert "1 passed" in cuda_steps._primitives(campaign)["summary"]
        else:
            with pytest.raises(RuntimeError, match="1 skipped"):
                cuda_steps._primitives(campaign)


def test_the_tile_of_a_class_is_the_one_that_takes_the_models_the_least_time(cuda_steps):
    first = {"now": 3.0, "m128n128": 3.0, "m128n64": 2.0, "m64n64": 1.0}  # of a layer that runs twice
    second = {"now": 4.0, "m128n128": 1.0, "m128n64": 9.0}
    row = cuda_steps.best_tile("3x3 64->64 s1 @56", [(2, first, {}), (1, second, {"m64n64": "does not take it"})])
    assert row["tile"] == "m128n128" and row["ms"] == {"best": 7.0, "now": 10.0} and row["subjects"] == 2
    assert json.loads("{" + row["entry"] + "}") == {"3x3 64->64 s1 @56": "m128n128"}
    assert list(row["candidates"]) == ["m128n128", "m128n64"]
    with pytest.raises(RuntimeError, match="no tile runs"):
        cuda_steps.best_tile("3x3", [(1, {}, {"m64n64": "wrong"})])


def table_of(rows, name):
    """{key: entry} of configs.py, as the row would have it pasted, and the row."""
    from resnet_fast.kernels.configs import ConvConfig, StemConfig

    (row,) = (row for row in rows if row["name"] == name)
    return eval("{" + row["entry"] + "}", {"ConvConfig": ConvConfig, "StemConfig": StemConfig}), row


def test_tune_runs_in_tritons_interpreter(tmp_path):
    pytest.importorskip("triton")
    layer = "1x1 64->64 s1 @56+relu, descriptors"
    arguments = ["--out", str(tmp_path), "--steps", "tune", "--device", "cpu", "--models", "resnet50", "--batch", "1"]
    result = run(*arguments, "--dtype", "float16", "--layers", layer, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr
    table, row = table_of(rows(tmp_path), f"{layer} float16 batch 1")
    assert list(table) == [("16-bit", "pointwise")] and row["times"] == 1
    assert len(row["candidates"]) == 3 and all(error < 1e-2 for error in row["error"].values())
    best, of_all = table_of(rows(tmp_path), "interpreter, 16-bit, pointwise float16 batch 1")
    assert best == table and of_all["subjects"] == 1 and of_all["ms"] == row["ms"]


def test_tune_knows_every_path(tmp_path):
    pytest.importorskip("triton")
    result = run(str(tmp_path), script=ROOT / "tests" / "tiny_tuning.py", TRITON_INTERPRET="1", PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stdout + result.stderr
    found = {row["name"].removesuffix(" float16 batch 1"): row for row in rows(tmp_path)}
    expected = {
        "3x3 3->8 s2 @12+relu": "stem",
        "stem with max_pool": "stem with max-pooling",
        "3x3 32->32 s1 @4+res+relu, descriptors": "few tiles + residual",
        "3x3 32->32 s1 @4+res+relu, pointers": "elements + residual",
        "last with projection, descriptors": "few tiles + projection",
        "last with projection, pointers": "elements + projection",
        "1x1 64->512 s1 @4+res+relu, descriptors": "pointwise + residual",
        "1x1 64->512 s1 @4+res+relu, pointers": "pointers + residual",
        "3x3 32->32 s1 @4 g4+relu, pointers": "elements",
    }
    assert {name: row["class"].split(", ")[-1] for name, row in found.items() if "times" in row} == expected
    assert {name.split(", ")[-1] for name, row in found.items() if "subjects" in row} == set(expected.values())
    for row in found.values():
        (key,) = table_of([row], row["name"])[0]
        assert key == tuple(row["class"].split(", ")[1:]) and row["ms"]["best"] <= row["ms"]["now"]
        assert all(error < 1e-2 for error in row.get("error", {}).values())
        assert len(row["candidates"]) == 3
    three = found["3x3 32->32 s1 @4+res+relu, pointers"]["ms"]["now"]  # of a layer that the network has three times
    assert found["interpreter, 16-bit, elements + residual"]["ms"]["now"] == pytest.approx(3 * three, rel=1e-3)


@pytest.fixture
def tuning(monkeypatch):
    """The module of the step "tune"."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import campaign_tune

    return campaign_tune


def test_candidates_begin_with_the_entry_and_fit_the_architecture(tuning):
    from resnet_fast.kernels import configs

    for target in configs.CONFIGS.keys() - {"interpreter", "default"}:
        stems = configs.STEMS.get(target, configs.STEMS["default"])
        for (product, name), config in [*configs.table_of(target).items(), *stems.items()]:
            entry = tuning.Entry(target, product, name)
            first, *others = found = tuning.candidates(entry)
            assert first == entry.now == config and len(set(found)) == len(found) > 8
            assert eval(tuning.written(first), vars(configs)) == first
            if not entry.is_stem:
                size = 2 if product == "16-bit" else 4
                assert all(configs.why_not(c, size, configs.LIMITS[target]) is None for c in others)
                assert all(c.programs == 1 or entry.has_descriptors for c in others)


def test_an_entry_without_a_residual_stands_for_one_with_it(tuning):
    entry = tuning.Entry("sm_90", "16-bit", "window + residual")
    assert entry.now == entry.table["16-bit", "window"] and ("16-bit", "window + residual") not in entry.table
    with entry.set_to(tuning.candidates(entry)[1]):
        assert entry.now == tuning.candidates(entry)[0] != entry.table["16-bit", "window"]
    assert ("16-bit", "window + residual") not in entry.table


def test_the_best_candidates_of_all_are_compiled_first(tuning, monkeypatch):
    """A budget that ends early has met the first candidates of every subject; what is refused is not timed."""
    noted = SimpleNamespace(seconds_left=lambda: 60.0, put=lambda name, figures: put.update({name: figures}))
    put, entries = {}, [tuning.Entry("sm_90", "16-bit", name) for name in ("pointwise", "stem")]
    subjects = [tuning.Subject(SimpleNamespace(), entry.shape_class, 1, entry) for entry in entries]
    monkeypatch.setattr(tuning.Subject, "__str__", lambda subject: subject.path)
    monkeypatch.setattr(tuning, "on_all_cores", lambda function, jobs, seconds: [None, None, "2 registers spilled"])
    tried, refused = tuning._compile(noted, subjects, 1, "bfloat16", "cuda")
    (first, second), (stem, _) = (tuning.candidates(entry)[:2] for entry in entries)
    assert tried == {"pointwise": [first], "stem": [stem]}
    assert refused == {"pointwise": {tuning.written(second): "2 registers spilled"}}
    summary = put["candidates bfloat16 batch 1"]["summary"]
    assert (summary["compiled"], summary["refused"]) == (3, 1) and summary["left out"] > 20


def test_work_on_all_cores_keeps_its_order_and_its_time(tuning):
    assert tuning.on_all_cores(len, ["", "a", None], 60.0)[:2] == [0, 1]
    assert tuning.on_all_cores(len, [], 60.0) == []
    assert tuning.on_all_cores(len, ["a"], 0.0) in ([], [1])


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
