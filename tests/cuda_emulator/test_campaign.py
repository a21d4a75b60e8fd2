"""What the campaign for a GPU runs there, run in the emulator first: its cases must be right before a GPU sees them."""

import json
from types import SimpleNamespace

import pytest
import torch
from checkout import ROOT

from resnet_fast.bench.layers import Layer
from resnet_fast.choose import CUDA_TILES


@pytest.fixture
def benchmarks(cuda_backend, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.usefixtures("benchmarks")
def test_the_cases_for_compute_sanitizer_are_right():
    import sanitizer_cases

    cases = sanitizer_cases.run("cpu")
    assert cases.wrong == []
    norms = {"batch_norm_statistics", "update_running_stats_", "batch_norm_relu", "batch_norm_relu_backward"}
    pools = {"max_pool", "max_pool_with_indices", "max_pool_backward", "avg_pool_flatten"}
    assert set(cases.done) == {"conv_bn_relu", "add_relu", *norms, *pools}
    assert cases.done["conv_bn_relu"] >= 3 * len(sanitizer_cases.CONVOLUTIONS) * 3  # types, and most of the tiles


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize("stride", (1, 2))
def test_every_tile_is_timed_that_takes_a_layer(stride):
    import campaign_cuda

    layer = Layer("b", "conv", 16, 40, 3, stride, 1, 6, residual=True, relu=True)
    ms, error = campaign_cuda._time_tiles(layer, 1, torch.bfloat16, "cpu")
    taken = {name for name in CUDA_TILES if stride == 1 or not name.startswith("halo")}
    assert set(ms) == {"now", *taken} and set(error) == {"now", *CUDA_TILES}
    assert all("does not take" in error[name] for name in set(CUDA_TILES) - taken)
    found = campaign_cuda.best_tile("3x3", [(2, ms, error)])
    assert found["tile"] in taken and found["ms"]["best"] == 2 * min(ms[name] for name in taken)


@pytest.mark.usefixtures("benchmarks")
def test_the_best_tiles_are_written_as_json(tmp_path):
    import campaign_cuda
    import gpu_campaign

    campaign = gpu_campaign.Campaign(tmp_path, budget=60.0)
    campaign.begin("tune")
    layer = "1x1 256->512 s2 @14"
    args = SimpleNamespace(models=["resnet18"], layers=layer, dtype=["bfloat16"], batch=[1], device="cpu")
    campaign_cuda.tune(campaign, args)
    row, of_all = (json.loads(line) for line in campaign.file.read_text().splitlines())
    assert row["name"] == f"CUDA C++ {layer} bfloat16 batch 1" and row["subjects"] == 1
    assert of_all["entries"] == {layer: row["tile"]} and row["tile"] == min(
        row["candidates"], key=row["candidates"].get
    )
