"""What of benchmarks/gpu_campaign.py can be judged without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parent.parent / "benchmarks" / "gpu_campaign.py"


def run(*arguments):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, str(CAMPAIGN), *arguments], env=env, capture_output=True, text=True)


@pytest.mark.parametrize(("name", "convolutions", "gflops"), [("resnet18", 20, 3.63), ("resnet50", 53, 8.17)])
def test_layers_are_the_models(name, convolutions, gflops, monkeypatch):
    monkeypatch.syspath_prepend(str(CAMPAIGN.parent))
    from gpu_campaign import layers

    found = layers(name)
    assert sum(found.values()) == convolutions
    assert sum(layer.flops(1) * n for layer, n in found.items()) / 1e9 == pytest.approx(gflops, rel=0.01)
    blocks = {"resnet18": 8, "resnet50": 16}[name]
    assert sum(n for layer, n in found.items() if layer.residual) == blocks
    assert all(layer.relu for layer in found if layer.residual)


def test_unknown_steps_are_refused_in_words(tmp_path):
    result = run("--out", str(tmp_path), "--steps", "doctor,nonsense")
    assert (
        result.returncode == 2
        and "--steps must be of doctor,test,kernels,tune,models,train, got nonsense" in result.stderr
    )


def test_no_gpu_is_said_in_words(tmp_path):
    result = run("--out", str(tmp_path))
    assert result.returncode == 2 and "no CUDA device" in result.stderr
