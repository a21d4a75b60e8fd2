"""Layers beside oneDNN: both are checked before they are timed, in rounds that the system left alone."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resnet_fast import measure
from resnet_fast.bench import cpu_layers, kernels
from resnet_fast.bench.cpu_layers import ONEDNN, Job
from resnet_fast.bench.layers import Layer
from resnet_fast.bench.peers import OURS
from resnet_fast.measure import clean_rounds, relative_rms

PLAIN = Layer("b", "conv1", 16, 32, 3, 2, 1, 9, residual=False, relu=True)
LINEAR = Layer("b", "downsample", 16, 32, 1, 2, 1, 8, residual=False, relu=False)
LAST = Layer("b", "conv2", 16, 16, 3, 1, 1, 5, residual=True, relu=True)
GROUPED = Layer("b", "conv2", 32, 32, 3, 1, 4, 5, residual=False, relu=True)
JOB = Job("portable", "float32", ("resnet18",), (2,), rounds=3)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(cpu_layers, "_SECONDS", 0.01)


@pytest.fixture
def command():
    """benchmarks/cpu_layers.py as a module; it may set the number of threads."""
    threads = torch.get_num_threads()
    path = Path(__file__).parent.parent / "benchmarks" / "cpu_layers.py"
    spec = importlib.util.spec_from_file_location("cpu_layers_command", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)


@torch.no_grad()
@pytest.mark.parametrize("layer", [PLAIN, LINEAR, LAST, GROUPED], ids=["plain", "linear", "residual", "grouped"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_both_compute_the_layer(layer, dtype, most):
    work = kernels.problem(layer, 2, dtype, "cpu")
    call, name = cpu_layers.ours(work)
    for out in (call(), cpu_layers.onednn(work)()):
        assert out.dtype == dtype and relative_rms(out, work.reference()) < most
    assert name.startswith(("Winograd", "GEMM", "oneDNN", "grouped", "direct"))


@torch.no_grad()
def test_onednn_computes_in_float32_where_it_lacks_the_dtype(monkeypatch):
    monkeypatch.setattr(cpu_layers, "onednn_runs", lambda dtype: dtype == torch.float32)
    work = kernels.problem(LAST, 2, torch.bfloat16, "cpu")
    out = cpu_layers.onednn(work)()
    assert out.dtype == torch.bfloat16 and relative_rms(out, work.reference()) < 5e-3


@pytest.mark.parametrize("cold", [False, True])
def test_a_layer_is_checked_and_timed(monkeypatch, cold):
    timed = measure._time
    monkeypatch.setattr(measure, "_time", lambda function: (timed(function)[0], False))  # a busy machine is no failure
    monkeypatch.setattr(cpu_layers, "_COLD_BYTES", 1 << 20)
    cell = cpu_layers.time_layer(LAST, 2, replace(JOB, cold=cold), 1e12)
    mine, other = cell["peers"][OURS], cell["peers"][ONEDNN]
    assert cell["ratio"] == other["min_ms"] / mine["min_ms"] and mine["rounds"] == other["rounds"] >= 1
    assert mine["gflops"] == pytest.approx(2 * 2 * 25 * 16 * 16 * 9 / mine["min_ms"] / 1e6)
    assert cell["of_peak"] == pytest.approx(mine["gflops"] / 1e3) and "refused" not in cell
    assert cell["kind"] == "3x3 stride 1" and cpu_layers.kind(GROUPED) == "3x3 stride 1 grouped"


def test_between_calls_the_maps_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(cpu_layers, "_COLD_BYTES", 1 << 20)
    work = kernels.problem(LAST, 2, torch.float32, "cpu")
    before = {name: work.tensors[name].clone() for name in ("input", "residual")}
    cpu_layers._flush(work)()
    assert all(torch.equal(work.tensors[name], t) for name, t in before.items())


def test_a_wrong_output_is_not_timed(monkeypatch):
    right = cpu_layers.ours
    monkeypatch.setattr(cpu_layers, "ours", lambda work: (lambda: right(work)[0]() * 1.01, "GEMM"))
    cell = cpu_layers.time_layer(PLAIN, 2, JOB, 1e12)
    assert cell["wrong"] == [OURS] and cell["refused"] == "wrong output of resnet_fast" and "ratio" not in cell
    assert cpu_layers.rows([cell])[1][-1] == "wrong output of resnet_fast"


def test_a_layer_without_a_clean_round_is_told(monkeypatch):
    monkeypatch.setattr(measure, "_time", lambda function: (1.0, True))
    cell = cpu_layers.time_layer(PLAIN, 2, JOB, 1e12)
    assert "disturbed each of" in cell["refused"] and "ratio" not in cell and "wrong" not in cell


def test_onednn_is_held_to_the_level():
    assert [replace(JOB, level=level).onednn_isa for level in ("portable", "avx2")] == ["SSE41", "AVX2"]
    assert replace(JOB, level="avx512").onednn_isa == "AVX512_CORE"
    assert replace(JOB, level="avx512", dtype="bfloat16").onednn_isa == "DEFAULT"


def test_clean_rounds(monkeypatch):
    order, disturbed = [], iter([0, 0, 0, 1, 0, 0, 1, 0])

    def timed(function):
        order.append(function())
        return len(order), bool(next(disturbed, 0))

    monkeypatch.setattr(measure, "_time", timed)
    found = clean_rounds({"a": lambda: "a", "b": lambda: "b"}, 3, 10, before=lambda: order.append("-"))
    assert "".join(order) == "-a-b-b-a-a-b-b-a-a-b"  # rounds 1 and 3 of 0 to 4 were disturbed
    assert found["a"].samples == (2, 10, 18) and found["b"].samples == (4, 12, 20)
    assert found["a"].dropped == found["b"].dropped == 2


def test_clean_rounds_end(monkeypatch):
    results = iter([True] * 9 + [False] + [True] * 90)
    monkeypatch.setattr(measure, "_time", lambda function: (1.0, next(results)))
    found = clean_rounds({"a": lambda: None}, 3, 20)
    assert found["a"].samples == (1.0,) and found["a"].dropped == 19
    with pytest.raises(RuntimeError, match="the system disturbed each of 5 rounds"):
        clean_rounds({"a": lambda: None}, 3, 5)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        clean_rounds({"a": lambda: None}, 0, 5)


def test_command(command, tmp_path, capsys):
    file = tmp_path / "cpu_layers.json"
    layer = "1x1 256->512 s2 @14"
    arguments = ["resnet18", "--layers", layer, "--levels", "portable", "--batch", "1", "--rounds", "1"]
    assert command.main([*arguments, "--threads", "1", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert [cell["layer"] for cell in found["cells"]] == [layer] and found["environment"]["threads"] == 1
    assert found["cells"][0]["level"] == "portable" and found["cells"][0]["peers"][ONEDNN]["relative_rms"] < 1e-5
    assert found["ceilings"]["portable, float32"]["threads"] == 1 and found["cold"] is False
    text = capsys.readouterr().out
    assert "portable, float32, batch 1" in text and layer in text and "1x1 stride 2" in text


@pytest.mark.parametrize(
    ("arguments", "words"), [(["resnet19"], "unknown model 'resnet19'"), (["--batch", "0"], "must be at least 1")]
)
def test_mistakes(command, capsys, arguments, words):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert words in capsys.readouterr().err


def test_a_process_that_fails_is_told(monkeypatch):
    with pytest.raises(RuntimeError, match="the process for level nonsense in float32 failed"):
        list(cpu_layers.run(replace(JOB, level="nonsense"), lambda n: None))
