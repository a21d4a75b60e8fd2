"""The command line and the measuring behind it, run in this process."""

import json
import sys
import time
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import nn

from resnet_fast.backends import NAMES
from resnet_fast.bench import training
from resnet_fast.cli import OURS, RANDOM, main
from resnet_fast.measure import Timing, calibrate, environment, interleaved, ratio, ratio_error, relative_rms

pytest.importorskip("torchvision")

PHOTO_FOLDER = Path(__file__).parent.parent / "examples" / "photos"
PHOTOS = [str(PHOTO_FOLDER / "cat.jpg"), str(PHOTO_FOLDER / "coffee.jpg")]


@pytest.fixture(autouse=True)
def one_thread():
    # Two OpenMP threads that the system puts on one core wait for each other: 20 times slower than one thread.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(capsys, *argv):
    """Exit code, stdout and stderr of one command."""
    code = main(list(argv))
    return code, *capsys.readouterr()


# info and explain

EXPLAIN = ["explain", "resnet18", "--device", "cpu", "--size", "64"]


def test_info(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert torch.__version__ in out
    for name in NAMES:
        assert f"\n  {name} " in out


def test_info_json(capsys):
    code, out, _ = run(capsys, "info", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["threads"] == torch.get_num_threads()
    assert set(facts["backends"]) == set(NAMES)
    assert facts["backends"]["reference"]["devices"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_explain(capsys, dtype):
    code, out, _ = run(capsys, *EXPLAIN, "--dtype", dtype)
    assert code == 0
    assert f"resnet18, 1x3x64x64, {dtype}, optimized for inference" in out
    assert "layer4.1.conv2" in out and "100.0 % of the operations in kernels of resnet_fast" in out
    assert "packed weights" in out


def test_explain_json(capsys):
    code, out, _ = run(capsys, *EXPLAIN, "--batch", "2", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["model"], found["batch"], found["own_share"]) == ("resnet18", 2, 1.0)
    assert [layer["name"] for layer in found["layers"]][::21] == ["conv1", "fc"]
    assert found["memory"]["packed_weights"] > found["memory"]["parameters"] > 40e6


def test_explain_plot(capsys, tmp_path):
    code, _, _ = run(capsys, *EXPLAIN, "--plot", str(tmp_path / "layers.svg"))
    assert code == 0 and "layer4.1.conv2" in (tmp_path / "layers.svg").read_text()
    code, _, err = run(capsys, *EXPLAIN, "--plot", str(tmp_path / "layers.xyz"))
    assert code == 2 and "--plot" in err and "xyz" in err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_explain_modules(capsys, dtype):
    code, out, _ = run(capsys, "explain", "resnet18", "--device", "cpu", "--modules", "--dtype", dtype)
    assert code == 0
    assert f"resnet18, {dtype} on cpu, eval mode" in out
    assert "layer4.1" in out and "of 9 blocks fused" in out


def test_bench_train(capsys, tmp_path, monkeypatch):
    """Steps of every way, each with its loss and what it keeps; mistakes are told in a line."""
    fixed = torch.randn(8, 3, 64, 64)
    monkeypatch.setattr(training, "images", lambda n: fixed[:n])
    file = tmp_path / "training.json"
    arguments = ("bench", "--train", "resnet18", "--batch", "4", "--rounds", "2", "--device", "cpu", "--no-compile")
    code, out, _ = run(capsys, *arguments, "--json", str(file))
    assert code == 0 and "resnet_fast lean" in out and "kept MB/image" in out
    (cell,) = json.loads(file.read_text())["cells"]
    assert cell["train"] and {"resnet_fast", "resnet_fast lean", "torch", "torch channels_last"} <= set(cell["peers"])
    losses = [peer["loss"] for peer in cell["peers"].values()]
    assert max(losses) - min(losses) < 1e-3
    kept = {name: peer["kept_bytes_per_image"] for name, peer in cell["peers"].items()}
    assert 0 < kept["resnet_fast"] < 0.8 * kept["torch channels_last"]
    for wrong, words in (
        (("--peers", "ncnn"), "unknown 'ncnn'; the ways to train"),
        (("--update",), "--update is for"),
    ):
        code, _, err = run(capsys, "bench", "resnet18", "--train", "--device", "cpu", *wrong)
        assert code == 2 and words in err


def test_explain_train(capsys):
    code, out, _ = run(capsys, "explain", "resnet18", "--device", "cpu", "--train")
    assert code == 0
    assert "train mode" in out and "9 of 9 blocks fused" in out


def test_explain_modules_json(capsys):
    code, out, _ = run(capsys, "explain", "resnet18", "--device", "cpu", "--modules", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["model"], found["mode"], len(found["blocks"])) == ("resnet18", "eval", 9)


def test_explain_layers(capsys):
    arguments = ("explain", "resnet18", "--device", "cpu", "--layers", "--batch", "2", "--size", "64")
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "layer4.1.conv2" in out and "2x512x2x2" in out and "of the convolutions' operations" in out
    code, out, _ = run(capsys, *arguments, "--json")
    found = json.loads(out)
    assert len(found["convolutions"]) == 20 and found["own_share"] > 0.9


# classify

CLASSIFY = ["classify", PHOTOS[0], "--model", "resnet18"]


def check_random_labels(out, photos, topk):
    labels = [line for line in out.splitlines() if " %  " in line]
    assert len(labels) == photos * 2 * topk
    assert all(RANDOM in line for line in labels)
    differences = [line for line in out.splitlines() if "largest difference" in line]
    assert len(differences) == photos
    assert all(float(line.split(":")[1].split()[0]) < 1e-3 for line in differences)


def test_classify_random(capsys):
    argv = ["classify", *PHOTOS, "--model", "resnet18", "--weights", "none", "--topk", "3"]
    code, out, err = run(capsys, *argv, "--device", "cpu")
    assert (code, err) == (0, "")
    check_random_labels(out, 2, 3)


def test_classify_offline(capsys, monkeypatch):
    def fail(self, *args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", fail)
    code, out, err = run(capsys, *CLASSIFY, "--topk", "2", "--device", "cpu")
    assert code == 0
    assert len(err.splitlines()) == 1
    assert "ResNet18_Weights.IMAGENET1K_V1" in err and "no network" in err and "random" in err
    check_random_labels(out, 1, 2)


@pytest.mark.parametrize("classes", [1000, 7])
def test_classify_file(capsys, tmp_path, classes):
    from torchvision.models import resnet18

    path = str(tmp_path / "weights.pth")
    torch.save(calibrate(resnet18(num_classes=classes), torch.randn(4, 3, 64, 64)).state_dict(), path)
    code, out, err = run(capsys, *CLASSIFY, "--weights", path, "--device", "cpu")
    assert (code, err) == (0, "")
    assert RANDOM not in out and path in out
    assert ("class " in out) == (classes == 7)


# Mistakes


@pytest.fixture
def bad_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("not an image")
    Path("empty.jpg").write_bytes(b"")
    Path("list.json").write_text("[1, 2]")
    Path("cut.jpg").write_bytes(Path(PHOTOS[0]).read_bytes()[:5000])
    Path("text.pth").write_text("not weights")
    torch.save({"weight": torch.zeros(1)}, "other.pth")
    torch.save({"fc.weight": torch.zeros(1000, 512)}, "part.pth")


@pytest.mark.usefixtures("bad_files")
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["classify"], "PHOTO"),
        (["classify", "nothing.jpg"], "nothing.jpg: no such file"),
        (["classify", "notes.txt"], "notes.txt: not an image"),
        (["classify", "empty.jpg"], "empty.jpg: not an image"),
        (["classify", "cut.jpg"], "cut.jpg: OSError"),
        (["classify", "."], ".: IsADirectoryError"),
        (["classify", PHOTOS[0], "--model", "vgg16"], "unknown model 'vgg16'; the models are resnet18, resnet34,"),
        ([*CLASSIFY, "--topk", "0"], "at least 1, got '0'"),
        ([*CLASSIFY, "--weights", "none", "--topk", "1001"], "from 1 to the number of classes, 1000, got 1001"),
        ([*CLASSIFY, "--weights", "V9"], "one of DEFAULT, none, IMAGENET1K_V1, or a .pth file"),
        ([*CLASSIFY, "--weights", "nothing.pth"], "nothing.pth: no such file"),
        ([*CLASSIFY, "--weights", "text.pth"], "text.pth: not a file of weights"),
        ([*CLASSIFY, "--weights", "other.pth"], "other.pth: not the state_dict of a ResNet"),
        ([*CLASSIFY, "--weights", "part.pth"], "part.pth: not weights of this model"),
        (["explain", "resnet19"], "unknown model 'resnet19'"),
        (["explain", "resnet18", "--dtype", "int8"], "int8"),
        (["bench", "resnet18", "resnet19"], "unknown model 'resnet19'"),
        (["bench", "--rounds", "0"], "at least 1, got '0'"),
        (["bench", "--seconds", "0"], "at least 1, got '0'"),
        (["bench", "--batch", "x"], "at least 1, got 'x'"),
        (["bench", "--precision", "3"], "a fraction between 0 and 1, got '3'"),
        (["bench", "resnet18", "--json", "no/such/folder.json"], "no/such/folder.json: No such file or directory"),
        (["bench", "resnet18", "--compare", "nothing.json"], "--compare nothing.json: No such file or directory"),
        (["bench", "resnet18", "--compare", "notes.txt"], "--compare notes.txt: not a file of `bench --json`"),
        (["bench", "resnet18", "--compare", "list.json"], "--compare list.json: not a file of `bench --json`"),
        (["bench", "--peers", "resnet18"], "--peers: unknown 'resnet18'; the peers on c"),
    ],
)
def test_mistakes(capsys, argv, words):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1 and err.startswith("resnet-fast: error: ")
    assert words in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", [["explain", "resnet18"], ["bench"], CLASSIFY])
def test_no_cuda(capsys, command):
    code, _, err = run(capsys, *command, "--device", "cuda")
    assert code == 2
    assert "no CUDA device" in err


def test_without_torchvision(capsys, monkeypatch):
    # None in sys.modules makes the import fail, as if the module were not there.
    monkeypatch.setitem(sys.modules, "resnet_fast.models", None)
    monkeypatch.delattr("resnet_fast.models", raising=False)
    code, _, err = run(capsys, "bench")
    assert code == 2
    assert "resnet_fast.models" in err


@pytest.mark.parametrize("command", ["", "info", "classify", "explain", "bench", "report"])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*filter(None, [command]), "--help"])
    assert stop.value.code == 0
    assert "usage: resnet-fast" in capsys.readouterr().out


# bench

BENCH = ["bench", "resnet18", "--batch", "1", "--no-compile", "--rounds", "2", "--dtype", "float32", "--device", "cpu"]


def test_bench(capsys, tmp_path):
    path = tmp_path / "bench.json"
    code, out, _ = run(capsys, *BENCH, "--json", str(path))
    assert code == 0
    assert "resnet18, batch 1, float32" in out and out.count("fastest") == 1

    found = json.loads(path.read_text())
    assert found["environment"] == environment()
    (cell,) = found["cells"]
    assert (cell["model"], cell["batch"], cell["dtype"], cell["device"]) == ("resnet18", 1, "float32", "cpu")
    assert set(cell["peers"]) == {OURS, f"{OURS} module", "torch", "torch channels_last"}
    for name, peer in cell["peers"].items():
        assert peer["refused"] is None
        assert peer["relative_rms"] < 1e-4
        assert len(peer["samples_ms"]) + peer["dropped"] == (6 if name == OURS else 2)  # ours before each of the others


def test_bench_in_passes(capsys, tmp_path):
    path = tmp_path / "bench.json"
    code, out, _ = run(capsys, *BENCH, "--passes", "2", "--peers", "torch", "--no-memory", "--json", str(path))
    assert code == 0
    assert out.count("resnet18, batch 1, float32") == 1  # one table, of all samples
    (cell,) = json.loads(path.read_text())["cells"]
    assert {name: len(p["samples_ms"]) + p["dropped"] for name, p in cell["peers"].items()} == {OURS: 4, "torch": 4}


def test_bench_updates_a_file(capsys, tmp_path):
    path = tmp_path / "bench.json"
    quick = [*BENCH, "--peers", "torch", "--no-memory", "--json", str(path)]
    assert run(capsys, *quick)[0] == 0
    found = json.loads(path.read_text())
    assert found["cells"][0]["commit"] == found["environment"]["commit"]
    other = found["cells"][0] | {"model": "resnet50", "commit": "of before"}
    stale = found["cells"][0] | {"commit": "of before", "peers": {}}
    ceilings = found["ceilings"] | {"flops": {"float32": 1e20, "float16": 1.0}, "bandwidth": 1.0}
    path.write_text(json.dumps(found | {"ceilings": ceilings, "cells": [stale, other]}))
    assert run(capsys, *quick, "--update")[0] == 0
    updated = json.loads(path.read_text())
    first, second = updated["cells"]
    assert first["peers"] and first["commit"] == found["environment"]["commit"]
    assert second == other
    assert updated["ceilings"]["flops"]["float32"] == 1e20 and updated["ceilings"]["flops"]["float16"] > 1.0
    assert updated["ceilings"]["bandwidth"] > 1.0
    path.write_text(json.dumps(found | {"environment": found["environment"] | {"torch": "1.0"}}))
    code, _, err = run(capsys, *quick, "--update")
    assert code != 0 and "measured elsewhere (torch: 1.0 then" in err
    assert "needs the file of --json" in run(capsys, *BENCH, "--update")[2]


def test_bench_says_what_moved(capsys, tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    assert run(capsys, *BENCH, "--json", str(old))[0] == 0
    found = json.loads(old.read_text())
    ours = found["cells"][0]["peers"][OURS]
    for key in ("median_ms", "p20_ms", "p80_ms"):
        ours[key] *= 1e-3  # as if it had been 1000 times faster
    found["environment"]["torch"] = "1.0"
    old.write_text(json.dumps(found))
    code, out, _ = run(capsys, *BENCH, "--json", str(new), "--compare", str(old))
    assert code == 0
    compared = out[out.index("against ") :].splitlines()
    (line,) = [line for line in compared if line.startswith(f"resnet18, batch 1, float32, {OURS}  ")]
    assert line.endswith("slower")  # two samples of the others say little
    assert f"torch: 1.0 then, {torch.__version__} now" in compared


def test_bench_with_chosen_peers(capsys, monkeypatch):
    from resnet_fast.bench import peers as module

    absent = module.Peer("another", "cpu", lambda subject: None, ("no_such_engine",))
    monkeypatch.setattr(module, "PEERS", (*module.PEERS, absent))
    code, out, _ = run(capsys, *BENCH, "--peers", "torch", "another", "--no-memory")
    assert code == 0
    table = [line.split("  ")[0] for line in out.splitlines()]
    assert OURS in table and "torch" in table and "torch channels_last" not in table
    assert "another: absent: no_such_engine not installed" in out


def test_bench_warns_where_threads_may_share_a_core(capsys, monkeypatch):
    monkeypatch.delenv("OMP_PROC_BIND", raising=False)
    assert "OMP_PROC_BIND=true is not set" in run(capsys, *BENCH)[2]
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    assert "OMP_PROC_BIND" not in run(capsys, *BENCH)[2]


def test_bench_refuses_a_wrong_output(capsys, monkeypatch):
    from resnet_fast import OptimizedModel

    right = OptimizedModel.forward
    monkeypatch.setattr(OptimizedModel, "forward", lambda self, x: right(self, x) * 1.01)
    code, out, _ = run(capsys, *BENCH)
    assert code == 1
    assert f"{OURS}: wrong output: not timed" in out


# measure


def test_calibrate():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4, momentum=0.3))
    images = 50 * torch.randn(4, 3, 16, 16) + 7
    assert calibrate(model, images) is model
    assert not any(m.training for m in model.modules())
    assert [model[1].momentum, model[3].momentum] == [0.1, 0.3]
    assert all(p.grad is None for p in model.parameters())

    out = model(images)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)


def test_calibrate_restores_momentum_after_an_error():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Linear(3, 1))
    with pytest.raises(RuntimeError):
        calibrate(model, torch.randn(2, 3, 4, 4))
    assert model[0].momentum == 0.1 and not model.training


def test_relative_rms():
    ref = torch.tensor([3.0, 4.0])
    assert relative_rms(ref, ref) == 0
    assert relative_rms(ref * 1.5, ref) == 0.5
    assert relative_rms(torch.tensor([3.0, 9.0], dtype=torch.bfloat16), ref) == 1
    assert not relative_rms(torch.tensor([3.0, float("nan")]), ref) < 1
    assert relative_rms(torch.tensor([3.0, float("inf")]), ref) == float("inf")


def test_interleaved_order():
    calls, ticks = [], []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = interleaved(functions, 4, ticks.append)
    # Warm-up, then the rounds: the first before each of the others.
    assert calls == [*"aabbcc", *"abac", *"acab", *"abac", *"acab"]
    assert sum(ticks) == 12
    for timing, n in zip(timings.values(), (8, 4, 4), strict=True):
        assert len(timing.samples) + timing.dropped == n
        assert len(timing.samples) >= n / 2 and min(timing.samples) >= 0


def test_interleaved_of_one_and_of_none():
    calls = []
    assert interleaved({}, 3) == {}
    alone = interleaved({"a": lambda: calls.append("a")}, 3)["a"]
    assert len(calls) == 2 + 3 and len(alone.samples) + alone.dropped == 3


def test_interleaved_budget():
    calls = []
    functions = {"slow": lambda: (calls.append("slow"), time.sleep(0.01)), "fast": lambda: calls.append("fast")}
    ticks = []
    functions = {"first": lambda: calls.append("first"), **functions}
    timings = interleaved(functions, 10, ticks.append, budget=0.005)
    assert calls.count("slow") == 2 + 3  # the warm-up and the least number of samples
    assert calls.count("fast") == 2 + 10
    assert calls.count("first") == 2 + 3 + 10  # before each of the others
    assert sum(ticks) == 30
    assert timings["slow"].median >= 0.01
    calls.clear()
    interleaved({"slow": functions["slow"]}, 10, budget=0.005)
    assert calls.count("slow") == 2 + 3


def test_interleaved_warms_up_before_each_sample():
    calls = []
    functions = {"slow": lambda: (calls.append("slow"), time.sleep(0.02)), "fast": lambda: calls.append("fast")}
    timings = interleaved(functions, 3, warm=0.01)
    assert calls.count("slow") == 2 + 3 * 2  # one warm-up call is enough
    assert calls.count("fast") > 2 + 3 * 10
    assert all(len(t.samples) + t.dropped == 3 for t in timings.values())


def test_interleaved_does_not_warm_up_a_long_call(monkeypatch):
    from resnet_fast import measure

    monkeypatch.setattr(measure, "_WARM_UP_BELOW", 0.01)
    calls = []
    interleaved({"long": lambda: (calls.append("long"), time.sleep(0.02))}, 3, warm=0.1)
    assert len(calls) == 1 + 3


def test_interleaved_drops_disturbed_samples(monkeypatch):
    from resnet_fast import measure

    def times(samples):
        later = iter([(0.0, False), *samples])
        monkeypatch.setattr(measure, "_time", lambda function: next(later))
        return interleaved({"f": lambda: None}, len(samples))["f"]

    assert times([(1.0, False), (9.0, True), (3.0, False)]) == Timing((1.0, 3.0), 1)
    assert times([(1.0, True), (9.0, True), (3.0, False)]) == Timing((1.0, 9.0, 3.0), 0)


def test_trimmed_mean():
    timing = Timing((9.0, 1.0, *(3.0, 5.0) * 4, 100.0, 2.0, 4.0))  # 13 samples: 1 and 100 are cut off
    assert timing.trimmed_mean == pytest.approx((9 + 2 + 4 + 4 * 8) / 11)
    assert Timing((1.0, 3.0)).trimmed_mean == 2
    sum_ = Timing((1.0,), 2) + Timing((3.0, 5.0), 1)
    assert sum_ == Timing((1.0, 3.0, 5.0), 3)


def test_trimmed_mean_error():
    assert Timing((1.0,) * 6).trimmed_mean_error == 0
    assert Timing((1.0,) * 5).trimmed_mean_error == float("inf")
    # Nothing is cut off six samples: twice the standard error of the mean.
    assert Timing((1.0, 2.0, 3.0, 4.0, 5.0, 6.0)).trimmed_mean_error == pytest.approx(2 * 3.5**0.5 / 6**0.5 / 3.5)
    # The interval holds the true mean in 95 % of experiments.
    generator = torch.Generator().manual_seed(0)
    samples = (10 + torch.randn(1000, 40, generator=generator, dtype=torch.float64)).tolist()
    timings = [Timing(tuple(s)) for s in samples]
    assert 0.93 < sum(abs(t.trimmed_mean / 10 - 1) < t.trimmed_mean_error for t in timings) / 1000 < 0.97


def test_interleaved_goes_on_until_ratios_are_known(monkeypatch):
    from resnet_fast import measure

    def rounds(seconds, **options):
        later = {name: iter([1.0] + samples) for name, samples in seconds.items()}
        calls = {name: lambda: None for name in seconds}
        names = {call: name for name, call in calls.items()}
        monkeypatch.setattr(measure, "_time", lambda function: (next(later[names[function]]), False))
        return {name: len(t.samples) for name, t in interleaved(calls, 6, **options).items()}

    noisy = {"ours": [1.0] * 100, "other": [1.0, 2.0] * 50}
    assert rounds(noisy) == {"ours": 6, "other": 6}
    assert rounds(noisy, precision=0.05, most_rounds=60) == {"ours": 60, "other": 60}
    quiet = {"ours": [1.0] * 100, "other": [1.0, 2.0, 1.5] + [1.5] * 90}
    assert 6 < rounds(quiet, precision=0.05, most_rounds=60)["other"] < 20
    slow = {"ours": [1.0] * 100, "other": [30.0, 70.0] * 50}
    assert rounds(slow, precision=0.05, most_rounds=60, budget=55.0)["other"] == 3  # not waited for


def test_interleaved_bad_rounds():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        interleaved({}, 0)


def test_timing():
    timing = Timing((5.0, 1.0, 3.0, 2.0, 4.0, 6.0))
    assert (timing.p20, timing.median, timing.p80) == (2.0, 3.5, 5.0)
    one = Timing((2.0,))
    assert (one.p20, one.median, one.p80) == (2.0, 2.0, 2.0)


def test_ratio():
    a, b = Timing((2.0, 30.0, 4.0)), Timing((1.0, 2.0, 6.0))
    assert ratio(a, b) == 4
    assert ratio_error(a, b) == float("inf")  # too few samples
    long, still = Timing(tuple(1 + i / 100 for i in range(100))), Timing((3.0,) * 6)
    assert ratio_error(long, long) == 0
    assert ratio_error(long, still) == ratio_error(still, long) == long.trimmed_mean_error
    assert ratio_error(long, Timing(long.samples)) == pytest.approx(2**0.5 * long.trimmed_mean_error)
