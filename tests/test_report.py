"""Pages and the README's numbers come from the files of results alone."""

import json
import shutil
from pathlib import Path

import pytest

from resnet_fast.bench import report
from resnet_fast.bench.peers import OURS
from resnet_fast.bench.results import markdown, per_second, table, write_json
from resnet_fast.cli import main

ROOT = Path(__file__).parent.parent


def peer(ms, ours, **more):
    return {"refused": None, "note": None, "relative_rms": 1e-6, "prepare_s": 1.0, "first_call_s": 0.5, "median_ms": ms,
            "p20_ms": 0.9 * ms, "p80_ms": 1.1 * ms, "images_per_s": 1e3 / ms, "time_over_ours": ms / ours,
            "fraction_of_bound": 0.5, "bound": "compute", "gflops": 1.0, "gb_s": 1.0, "running_rss_mb": 500.0,
            "peak_rss_mb": 600.0} | more  # fmt: skip


@pytest.fixture
def results(tmp_path):
    peers = {
        OURS: peer(20.0, 20.0),
        "torch": peer(30.0, 20.0),
        "openvino": peer(16.0, 20.0, note="computes in float32"),
    }
    peers["ncnn"] = {"refused": "absent: ncnn not installed", "note": None, "relative_rms": None}
    cell = {"model": "resnet18", "batch": 1, "dtype": "float32", "device": "cpu", "peers": peers}
    roof = {"flops": {"float32": 2e11}, "bandwidth": 2.5e10, "how": "by hand"}
    environment = {"torch": "2.11", "threads": 2, "cpu": "A CPU", "commit": "abc"}
    folder = tmp_path / "results" / "a_cpu"
    folder.mkdir(parents=True)
    found = {"environment": environment, "device": "A CPU", "ceilings": roof, "cells": [cell]}
    write_json(folder / "peers.json", found)
    row = {"step": "kernels", "dtype": "float32", "batch": 1, "error": {}, "bound": "compute", "bound_ms": 1.0,
           "bytes": 1e6, "gflops": 50.0, "gb_s": 5.0}  # fmt: skip
    rows = [
        row | {"name": "3x3 fast", "flops": 1e8, "ms": {"torch": 3.0, "ours": 1.2}, "fraction_of_bound": 0.8},
        row | {"name": "1x1 slow", "flops": 1e8, "ms": {"torch": 3.0, "ours": 4.0}, "fraction_of_bound": 0.2},
        row | {"name": "add_relu 64@56", "flops": 0.0, "ms": {"torch": 3.0, "ours": 2.0}, "fraction_of_bound": 0.4},
        {"step": "kernels", "name": "batch_norm_relu", "absent": "no such operator yet"},
        {"step": "kernels", "name": "5x5", "error_message": "RuntimeError: no"},
        {"step": "tune", "name": "1x1", "ms": {"best": 1.0}, "entry": "of one layer"},
        {"step": "tune", "name": "sm_90, pointwise", "ms": {"now": 3.0, "best": 2.0}, "entry": "best", "subjects": 2},
        {"step": "train", "name": "resnet18, batch 8, bfloat16, resnet_fast", "ms": 100.0, "img_s": 80.0},
        {
            "step": "train",
            "name": "resnet18, batch 8, bfloat16, torch, CUDA graph",
            "ms": 130.0,
            "img_s": 61.5,
            "largest_batch": 1234,
        },
    ]
    ways = (
        ("ours_cpu", 1, 0.002),
        ("ours_reference", 1, 0.009),
        ("eager", 1, 0.003),
        ("eager_channels_last", 1, 0.001),
    )
    ways += (("ours_cpu", 8, 0.016),)
    facts = {"subject": "stem", "pass": "forward", "dtype": "float32"}
    blocks = [{"extra_info": facts | {"way": w, "batch": b}, "stats": {"median": s}} for w, b, s in ways]
    (folder / "blocks.json").write_text(json.dumps({"benchmarks": blocks}))
    (folder / "campaign.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path / "results"


def test_page(results):
    text = report.page(report.Folder(results / "a_cpu"))
    assert text.startswith("# A CPU, 2 threads\n") and "200 GFLOP/s in float32" in text
    assert "torch 2.11, threads 2, commit abc" in text
    assert "| resnet18, float32, batch 1 | 20 (1.00) | 30 (1.50) | **16 (0.80)** * | absent | 50 | 0.5 |" in text
    assert "0.80 times as fast as the fastest of the others in float32" in text
    assert "- openvino: computes in float32 (float32, batch 1)" in text
    assert "- ncnn: absent: ncnn not installed" in text
    assert text.index("1. 1x1 slow: 0.20") < text.index("2. add_relu 64@56: 0.40") < text.index("3. 3x3 fast: 0.80")
    row = "| resnet18, bfloat16, batch 8 | **100 (1.00)** | 130 (1.30), at most 1,234 images |"
    assert row in text and "|  | resnet_fast | torch, CUDA graph |" in text
    assert "| sm_90, pointwise | `best` | 2 | 3 |" in text and "of one layer" not in text
    assert "|  | batch 1 | batch 8 |" in text and "| stem, forward, float32 | 2 (1.50 / 0.50) | 16 |" in text
    assert "- kernels, 5x5: RuntimeError: no" in text


def test_the_readme_is_made_anew_and_checked(results, capsys):
    readme = results.parent / "README.md"
    readme.write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    arguments = ["report", "--results", str(results), "--readme", str(readme), "--no-plots"]
    assert main([*arguments, "--check"]) == 1
    assert "are not those of" in capsys.readouterr().err
    assert main(arguments) == 0
    text = readme.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "Farthest from their bound: 1x1 slow 0.20; add_relu 64@56 0.40; 3x3 fast 0.80." in text
    assert "[report](results/a_cpu/REPORT.md)" in text and (results / "a_cpu" / "REPORT.md").exists()
    assert main([*arguments, "--check"]) == 0


@pytest.fixture
def many(results):
    """14 cells, in one of which another engine is faster, in one of which nothing else was timed."""
    file = results / "a_cpu" / "peers.json"
    found = json.loads(file.read_text())
    template = found["cells"][0] | {"peers": {OURS: peer(20.0, 20.0), "torch": peer(50.0, 20.0)}}
    names = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2")
    found["cells"] = [template | {"model": name, "batch": batch} for name in names for batch in (1, 32)]
    found["cells"][2]["peers"] = template["peers"] | {"onnxruntime": peer(18.0, 20.0)}
    found["cells"][3]["peers"] = {OURS: peer(20.0, 20.0)}
    write_json(file, found)
    return results


def test_of_many_cells_the_readme_shows_the_headline_and_every_ratio(many):
    text = report.section(many, many.parent / "README.md")
    assert "| resnet18, float32, batch 1 |" in text and "| resnet50, float32, batch 1 |" in text
    assert "| resnet34, float32, batch 1 |" not in text and "| resnet18, float32, batch 32 |" not in text
    assert "|  | float32, batch 1 | float32, batch 32 |" in text
    assert "| resnet34 | 0.90 (onnxruntime) |  |" in text and "| resnet152 | 2.50 (torch) | 2.50 (torch) |" in text
    page = report.page(report.Folder(many / "a_cpu"))
    assert "| resnet34, float32, batch 32 |" in page and "| resnet34 | 0.90 (onnxruntime) |  |" in page


def test_plots_of_many_cells(many):
    report.write(many / "a_cpu")
    plot = (many / "a_cpu" / "models.svg").read_text()
    assert "0.90 onnxruntime" in plot and "resnet152" in plot
    assert "images / s" in (many / "a_cpu" / "peers.svg").read_text()
    assert "(models.svg)" in report.page(report.Folder(many / "a_cpu"))
    assert "/models.svg)" in report.section(many, many.parent / "README.md")


@pytest.fixture
def layers(results):
    """Two layers at one level, the second slower than oneDNN, and one that was not timed."""

    def cell(name, ratio):
        ours, other = ({"gflops": rate, "min_ms": 60.0 / rate, "rounds": 25} for rate in (60.0, 60.0 / ratio))
        return {"level": "avx2", "dtype": "float32", "batch": 1, "layer": name, "kind": "3x3 stride 1",
                "kernel": "GEMM", "of_peak": 0.75, "ratio": ratio, "ratio_median": ratio + 0.1,
                "peers": {OURS: ours, "onednn": other}}  # fmt: skip

    refused = cell("3x3 8->8", 1.0) | {"refused": "wrong output of onednn", "peers": {}}
    found = {"environment": {"torch": "2.11"}, "device": "B CPU", "cold": True, "ceilings": {}}
    cells = [cell("3x3 64->64", 2.0), cell("3x3 32->32", 0.5), refused]
    write_json(results / "a_cpu" / "cpu_layers.json", found | {"cells": cells})
    return results


def test_layers_beside_onednn(layers):
    text = report.page(report.Folder(layers / "a_cpu"))
    assert "## Layers beside oneDNN" in text and "weights come from memory" in text and "# A CPU" in text
    assert "|  | avx2, float32, batch 1 |" in text and "| 3x3 stride 1 | 1.25 (0.50) |" in text
    assert "| 3x3 64->64 | GEMM | 60 | 0.75 | 30 | 2.00 | 2.10 | 25 |  |" in text
    assert "| 3x3 32->32 | GEMM | 60 | 0.75 | 120 | 0.50 | 0.60 | 25 | slower |" in text
    assert "| 3x3 8->8 | GEMM |  |  |  |  |  |  | wrong output of onednn |" in text
    assert "| 3x3 stride 1 | 1.25 (0.50) |" in report.section(layers, layers / "README.md")


def test_layers_beside_onednn_alone_are_a_folder(layers):
    (layers / "a_cpu" / "peers.json").unlink()
    text = report.section(layers, layers / "README.md")
    assert "### B CPU" in text and "torch 2.11" in text and "3x3 stride 1" in text and "forward pass" not in text


def test_mistakes_are_told_in_words(results, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["report", "--results", str(empty)]) == 2
    assert "no folder there holds a peers.json" in capsys.readouterr().err
    readme = tmp_path / "plain.md"
    readme.write_text("no marks")
    assert main(["report", "--results", str(results), "--readme", str(readme), "--no-plots"]) == 2
    assert "must hold the lines" in capsys.readouterr().err
    assert main(["report", "--results", str(results), "--readme", str(tmp_path / "none.md")]) == 2


def test_plots_are_drawn_and_the_same_each_time(layers):
    folder = layers / "a_cpu"
    drawn = []
    for _ in range(2):
        report.write_all(layers, None)
        files = [folder / "peers.svg", folder / "roofline.svg", layers / "traffic.svg", folder / "cpu_layers.svg"]
        drawn.append([file.read_text() for file in files])
    assert drawn[0] == drawn[1]
    peers, roofline, traffic, ratios = drawn[0]
    assert "3x3 64-&gt;64" in ratios and "avx2, float32, batch 1" in ratios and "3x3 8-&gt;8" not in ratios
    assert "openvino" in peers and "absent" in peers and "A CPU" in peers
    assert "3x3, ours" in roofline and "200 GFLOP/s" in roofline
    assert "resnet50, training" in traffic and "473.4" in traffic


def test_without_matplotlib_the_reason_is_told(results, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    readme = results.parent / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    assert main(["report", "--results", str(results), "--readme", str(readme)]) == 2
    assert "plots need matplotlib" in capsys.readouterr().err


def test_the_committed_readme_holds_the_committed_numbers(capsys):
    results, readme = str(ROOT / "benchmarks" / "results"), str(ROOT / "README.md")
    assert main(["report", "--results", results, "--readme", readme, "--check"]) == 0, capsys.readouterr().err


def test_committed_pages_are_those_of_their_files(tmp_path):
    for folder in report.folders(ROOT / "benchmarks" / "results"):
        copy = tmp_path / folder.name
        shutil.copytree(folder, copy)
        report.write(copy, plot=False)
        assert (copy / "REPORT.md").read_text() == (folder / "REPORT.md").read_text()


def test_results_are_written_a_line_a_peer(tmp_path):
    cell = {"model": "m", "batch": 1, "peers": {"a": {"samples_ms": [1.23456789, 2.0]}, "b": {"x": {"y": 1e-9}}}}
    write_json(tmp_path / "r.json", {"device": "d", "ceilings": {"flops": {}}, "cells": [cell, cell]})
    text = (tmp_path / "r.json").read_text()
    found = json.loads(text)
    assert found["cells"][1]["peers"] == {"a": {"samples_ms": [1.2346, 2.0]}, "b": {"x": {"y": 1e-9}}}
    assert found["device"] == "d" and sum('"a": ' in line for line in text.splitlines()) == 2
    write_json(None, {})


def test_tables():
    rows = [("", "ms"), ("a long name", "1.0"), ("b", "10.0")]
    assert table(rows).splitlines() == ["               ms", "a long name   1.0", "b            10.0"]
    assert markdown(rows).splitlines()[1] == "| --- | ---: |"
    assert [per_second(8.04e14, "FLOP"), per_second(2.5e10, "B")] == ["804 TFLOP/s", "25 GB/s"]
