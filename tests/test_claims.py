"""What is claimed of residual networks holds in what the example measures on its quick settings, and its page is true.

With RESNET_FAST_TEST_SEEDS=5 for that many seeds instead of the first: the margins were chosen to hold for five.
"""

import dataclasses
import importlib
import math
import os
import re
import subprocess
import sys

import pytest
import torch
import why_residuals
from checkout import ROOT
from claims import degradation, gradients, images, parameters, shortcuts
from claims.training import Curve, train
from torch import nn

from resnet_fast.models import cifar

SEEDS = range(int(os.environ.get("RESNET_FAST_TEST_SEEDS", "1")))
PAGE = ROOT / "examples" / "README.md"


def measured(claim, seed=0, **settings):
    """What the claim measures on its quick settings but for these, and that its progress bar ends where it says."""
    settings, moved = dataclasses.replace(claim.QUICK, **settings), []
    found = claim.measure(settings, seed, "cpu", moved.append)
    assert sum(moved) == claim.steps(settings)
    return found


def assert_holds(verdicts):
    assert verdicts and all(v.holds for v in verdicts), verdicts


@pytest.mark.parametrize("seed", SEEDS)
def test_plain_networks_degrade_with_depth_and_residual_ones_do_not(seed):
    found = measured(degradation, seed)
    assert_holds(degradation.verdicts(found))
    for depth in (32, 56):
        assert found["plain", depth].training[-1] > found["residual", depth].training[-1] + 0.04
        assert found["plain", depth].test > found["residual", depth].test


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_of_plain_networks_shatter(seed):
    found = measured(gradients, seed)
    assert_holds(gradients.verdicts(found))
    for kind in gradients.KINDS:
        first = found.different[kind][0]
        assert abs(first - gradients.THEORY[kind](1)) < 0.05  # one layer is as the theorems say
        assert found.different[kind] == sorted(found.different[kind], reverse=True) or kind == "plain"


@pytest.mark.parametrize("seed", SEEDS)
def test_shortcuts_help_and_identities_most(seed):
    found = measured(shortcuts, seed, rounds=1, batch=2)
    assert_holds(shortcuts.verdicts(found))


def test_bottleneck_has_a_seventeenth_of_the_weights():
    found = measured(parameters, rounds=1)
    wide, narrow = found.values()
    assert (wide.weights, narrow.weights) == (2 * 256 * 256 * 9, 256 * 64 + 64 * 64 * 9 + 64 * 256)
    assert (wide.weights, narrow.weights) == (1_179_648, 69_632) and round(wide.weights / narrow.weights, 1) == 16.9
    assert (wide.flops, narrow.flops) == (2 * 196 * 1_179_648, 2 * 196 * 69_632)
    maps = {"two 3x3": 3 * 256, "bottleneck": 2 * 64 + 2 * 256}  # what convolutions and the block return
    for name, block in found.items():
        assert block.kept_bytes == pytest.approx(4 * 196 * maps[name], rel=0.1)
        assert block.inference_bytes > 4 * block.weights
        assert min(block.inference_ms, block.training_ms, block.torch_inference_ms, block.torch_training_ms) > 0
    assert all(v.holds for v in parameters.verdicts(found)[:2])  # the third is about times


def test_verdicts_can_fail():
    good, bad = Curve([0.5, 0.0], 0.1), Curve([0.9, 0.8], 0.8)

    def holds(plain, residual):
        found = {("plain", 20): good, ("residual", 20): good, ("plain", 56): plain, ("residual", 56): residual}
        return [v.holds for v in degradation.verdicts(found)]

    assert holds(bad, good) == [True, True]
    assert holds(good, bad) == [False, False]
    kinds = gradients.KINDS
    flat = gradients.Found((1, 8, 24), {k: [0.9, 0.8, 0.7] for k in kinds}, {k: {8: 0.8, 24: 0.7} for k in kinds}, {})
    assert not any(v.holds for v in gradients.verdicts(flat))
    equal = {name: shortcuts.Network(100, 100, good) for name in shortcuts.OPTIONS}
    assert [v.holds for v in shortcuts.verdicts(equal)] == [True, False, False, False, False]


def test_rates_are_fitted():
    depths = (1, 2, 4, 8, 16)
    exact = {"plain": [0.6**d for d in depths], "residual": [d**-0.5 for d in depths]}
    found = gradients.Found(depths, exact, {}, {})
    assert math.isclose(gradients.factor_per_layer(found, "plain"), 0.6)
    assert math.isclose(gradients.power(found), -0.5)


def test_images():
    split = images.digits("cpu", 128)
    assert split.images.shape == (1536, 1, 8, 8) and split.test_images.shape == (261, 1, 8, 8)
    assert split.labels.bincount().min() > 100 and len(split.test_labels) == 261
    assert abs(torch.cat([split.images, split.test_images]).mean()) < 1e-5
    assert torch.equal(split.images, images.digits("cpu", 128).images)
    patches = images.patches(16, torch.Generator().manual_seed(1))
    assert patches.shape == (16, 3, 8, 8) and patches.mean(0).abs().max() < 1e-5
    torch.testing.assert_close(patches.std(0), torch.ones(3, 8, 8))
    way = gradients.walk(patches[:2], 9)
    torch.testing.assert_close(way[0], patches[0])
    torch.testing.assert_close(way[4], patches[1], atol=1e-5, rtol=0)


def test_gradient_is_the_one_of_the_written_out_network():
    """of_theorem, through the package's operators, against the formulas in the module's head in float64."""
    x = images.patches(6, torch.Generator().manual_seed(0))

    def written_out(kind, layers, v, generator):
        for _ in range(layers):
            weight = gradients._weight(v, generator).double()
            inner = (
                v
                if "without" in kind
                else (v - v.mean((0, 2, 3), keepdim=True))
                / (v.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
            )
            branch = nn.functional.conv2d(inner.relu(), weight, padding=1)
            v = branch if kind == "plain" else v + branch
        return v

    for kind in gradients.KINDS:
        found = gradients.gradients(x, gradients.of_theorem, kind, 3, 16, seed=5)
        wide = lambda kind, layers, v, generator: written_out(kind, layers, v.double(), generator)  # noqa: E731
        expected = gradients.gradients(x, wide, kind, 3, 16, seed=5)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_without_batch_norm_inputs_grow_alike():
    """Why its gradients agree for longer than the theorem says: more units are active together than it supposes."""
    x, cosines, together = images.patches(32, torch.Generator().manual_seed(0)), [], []
    for layers in (0, 8, 24):
        generator = torch.Generator().manual_seed(1)
        first = gradients._first_maps(x, 64, generator)
        v = gradients.of_theorem("residual without BatchNorm", layers, first, generator).flatten(1)
        pairs = torch.triu(torch.ones(32, 32), 1).bool()
        unit, active = nn.functional.normalize(v), (v > 0).float()
        cosines.append((unit @ unit.T)[pairs].mean().item())
        together.append((active @ active.T)[pairs].mean().item() / v.shape[1])
    assert abs(cosines[0]) < 0.1 and abs(together[0] - 0.25) < 0.02
    assert cosines[1] > 0.4 and cosines[2] > 0.7 and together[1] > 0.35


def test_same_seed_same_curve():
    split = images.digits("cpu", 128)
    split = images.Split(split.images[:256], split.labels[:256], split.test_images, split.test_labels)

    def curve():
        torch.manual_seed(3)
        return train(cifar.resnet20(in_channels=1), split, 2, 3, lambda _: None)

    assert curve() == curve()


# The command line.


@pytest.fixture
def tiny(monkeypatch):
    """Every claim with the least settings, for what the command line does with it."""
    monkeypatch.setattr(degradation, "QUICK", degradation.Settings(depths=(8, 14), epochs=1))
    monkeypatch.setattr(degradation, "KINDS", {"plain": "plain", "residual": "resnet"})
    for depth in (8, 14):
        for kind, shortcut in (("plain", None), ("resnet", "A")):
            build = lambda depth=depth, shortcut=shortcut, **kw: cifar.ResNet(depth, shortcut=shortcut, **kw)  # noqa: E731
            monkeypatch.setattr(cifar, f"{kind}{depth}", build, raising=False)
    monkeypatch.setattr(gradients, "QUICK", gradients.Settings((2, 8), networks=1, inputs=4, channels=8))
    monkeypatch.setattr(parameters, "QUICK", parameters.Settings(size=4, batch=1, rounds=1))
    monkeypatch.setattr(shortcuts, "QUICK", shortcuts.Settings(depth=8, epochs=1, batch=1, rounds=1))


def test_all_writes_plots_and_tables(tiny, tmp_path, capsys):
    code = why_residuals.main(["all", "--quick", "--out", str(tmp_path / "new"), "--device", "cpu"])
    out = capsys.readouterr().out
    assert code == 1 and "DOES NOT HOLD" in out and "holds: 1,179,648 weights against 69,632" in out
    for name in why_residuals.CLAIMS:
        plot, text = (tmp_path / "new" / f"{name}.{ending}" for ending in ("svg", "md"))
        assert plot.read_text().startswith("<?xml") and plot.stat().st_size > 5000
        claim = importlib.import_module(f"claims.{name}")
        assert text.read_text().startswith(f"# {claim.TITLE}\n\n| ") and "holds" in text.read_text().lower()
        assert claim.TITLE in out and str(plot) in out


def test_one_claim_that_holds(monkeypatch, tmp_path, capsys):
    few = dataclasses.replace(gradients.QUICK, depths=(1, 2, 4, 8, 24), networks=1)
    monkeypatch.setattr(gradients, "QUICK", few)
    options = ["--quick", "--seed", "1", "--out", str(tmp_path), "--format", "png", "--device", "cpu"]
    assert why_residuals.main(["gradients", *options]) == 0
    assert "DOES NOT" not in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["gradients.md", "gradients.png"]
    assert (tmp_path / "gradients.png").read_bytes().startswith(b"\x89PNG\r")


def test_errors_are_in_words(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        why_residuals.main(["gravity"])
    assert "degradation" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_residuals.main(["gradients", "--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("sklearn", "tqdm") else name)
    assert why_residuals.main(["gradients"]) == 2
    assert 'needs sklearn, tqdm: pip install -e ".[examples]"' in capsys.readouterr().err


def test_help():
    command = [sys.executable, str(ROOT / "examples" / "why_residuals.py"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for word in (*why_residuals.CLAIMS, "--quick", "--seed", "--out", "--format", "--device"):
        assert word in text


# The page.


def test_the_code_of_the_page_runs():
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    names = {}
    exec(compile(code, str(PAGE), "exec"), names)
    assert names["logits"].shape == (4, 10) and names["logits"].isfinite().all()
    found = names["resnet_fast"].explain(names["net"]).blocks
    assert len(found) == 8 and all(b.fused for b in found)


def test_the_page_has_every_plot():
    text = PAGE.read_text()
    for name in why_residuals.CLAIMS:
        (path,) = re.findall(rf"!\[[^\]]+\]\((\S*{name}\.svg)\)", text)
        assert (PAGE.parent / path).stat().st_size > 5000
        assert f"## {importlib.import_module(f'claims.{name}').TITLE}" in text
