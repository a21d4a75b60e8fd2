"""The tables of layers are torchvision's, and the bounds follow from them by arithmetic."""

import pytest
import torch

from resnet_fast.bench import layers, limits
from resnet_fast.bench.kernels import residual_maps
from resnet_fast.bench.limits import Ceilings, Kernel

pytest.importorskip("torchvision")

ROOF = Ceilings("cpu", 1, {"float32": 100.0, "bfloat16": 200.0}, 10.0, "")


@pytest.mark.parametrize("model", layers.MODELS)
def test_the_tables_are_torchvisions(model):
    from torchvision.models import get_model_weights

    assert layers.read(model) == layers.derive(model)
    # torchvision's own count, in multiply-adds of convolutions and the last linear layer.
    published = get_model_weights(model).DEFAULT.meta["_ops"]
    ours = sum(k.flops for k in limits.inference(model)) / 2e9
    assert ours == pytest.approx(published, rel=0.002)


def test_blocks_are_the_models():
    for model, kinds in {
        "resnet18": {"basic": 5, "basic_projection": 3},
        "resnet50": {"bottleneck": 12, "bottleneck_projection": 4},
    }.items():
        found = [block.kind for block in layers.blocks(model)]
        assert {kind: found.count(kind) for kind in found} == kinds
        flat = [layers.stem(model), *(layer for block in layers.blocks(model) for layer in block.layers)]
        assert flat == list(layers.read(model))
        for block in layers.blocks(model):
            assert [layer.residual for layer in block.branch] == [False] * (len(block.branch) - 1) + [True]
            assert all(layer.relu for layer in block.branch)


def test_distinct_layers_and_residual_maps():
    found = layers.distinct(["resnet50", "resnet50", "resnet101"])
    assert len(found) == 24 == len({layer.shape for layer in found})
    assert residual_maps(["resnet50"]) == [(256, 56), (512, 28), (1024, 14), (2048, 7)]


@pytest.mark.parametrize(("model", "size"), [("resnet18", 160), ("resnext50_32x4d", 224)])
def test_weights_are_counted(model, size):
    import torchvision

    net = getattr(torchvision.models, model)()
    convolutions = sum(m.weight.numel() for m in net.modules() if isinstance(m, torch.nn.Conv2d))
    assert sum(layer.weights for layer in layers.derive(model, size)) == convolutions


def test_unknown_names_are_refused_in_words():
    with pytest.raises(ValueError, match=r"model must be one of resnet18, .*, got 'resnet19'"):
        layers.read("resnet19")
    with pytest.raises(ValueError, match=r"pattern must be one of eager, .*, got 'fast'"):
        limits.inference("resnet18", "fast")
    with pytest.raises(ValueError, match=r"pattern must be one of eager, .*, got 'fast'"):
        limits.training("resnet18", "fast")


# Megabytes an image at batch 256 in 16 bits, and kernels, counted once by hand-checked arithmetic of another program.
INFERENCE_MB = {
    "resnet18": (34.641, 21.696, 12.464, 8.550, 4.210, 4.210),
    "resnet50": (159.869, 93.336, 54.901, 45.669, 29.312, 23.391),
    "resnet152": (343.181, 200.380, 116.185, 106.953, 67.715, 54.168),
}
TRAINING_MB = {
    "resnet18": (105.940, 77.226, 64.833, 47.071),
    "resnet50": (473.418, 353.823, 324.169, 225.549),
}


def megabytes(kernels):
    return sum(kernel.total_bytes(256, 2) for kernel in kernels) / 256e6


@pytest.mark.parametrize("model", INFERENCE_MB)
def test_inference_traffic(model):
    found = [megabytes(limits.inference(model, pattern)) for pattern in limits.INFERENCE]
    assert found == pytest.approx(INFERENCE_MB[model], abs=1e-3)
    flops = {sum(k.flops for k in limits.inference(model, pattern)) for pattern in limits.INFERENCE}
    assert max(flops) == pytest.approx(min(flops))


@pytest.mark.parametrize("model", TRAINING_MB)
def test_training_traffic(model):
    found = [megabytes(limits.training(model, pattern)) for pattern in limits.TRAINING]
    assert found == pytest.approx(TRAINING_MB[model], abs=1e-3)


@pytest.mark.parametrize("model", layers.MODELS)
def test_less_traffic_from_pattern_to_pattern(model):
    for make, patterns in ((limits.inference, limits.INFERENCE), (limits.training, limits.TRAINING)):
        found = [megabytes(make(model, pattern)) for pattern in patterns]
        assert found == sorted(found, reverse=True)


def test_a_layer_by_hand():
    # 3x3, 64 to 128 channels, stride 2, 56 to 28 pixels; then the 1x1 projection beside it, which skips pixels.
    block = next(block for block in layers.blocks("resnet18") if block.name == "layer2.0")
    kernel = limits.layer_kernel(block.branch[0])
    assert kernel.flops == 2 * 28 * 28 * 128 * 64 * 9
    assert kernel.total_bytes(8, 4) == 4 * (8 * (64 * 56 * 56 + 128 * 28 * 28) + 128 * 64 * 9)
    projection = limits.layer_kernel(block.projection)
    assert projection.total_bytes(1, 2) == 2 * (64 * 28 * 28 + 128 * 28 * 28 + 128 * 64)
    last = limits.layer_kernel(block.branch[1])
    assert last.maps == 3 * 128 * 28 * 28  # input, residual, output
    assert limits.block_kernel(block).maps == 64 * 56 * 56 + 128 * 28 * 28
    assert limits.add_relu_kernel(128, 28).maps == 3 * 128 * 28 * 28


def test_the_bound_is_the_slower_of_the_two():
    compute, memory = Kernel("", "", 1000.0, 1.0), Kernel("", "", 1.0, 100.0)
    bound = limits.bound([compute], 2, torch.float32, ROOF)
    assert (bound.seconds, bound.by, bound.flops, bound.bytes) == (20.0, "compute", 2000.0, 8.0)
    bound = limits.bound([memory], 2, torch.float32, ROOF)
    assert (bound.seconds, bound.by) == (80.0, "memory")
    bound = limits.bound([compute, memory], 2, torch.bfloat16, ROOF)
    assert (bound.seconds, bound.by) == (10.0 + 40.0, "memory")
    assert bound.figures(100.0) == {
        "gflops": 2002.0 / 100 / 1e9, "gb_s": bound.bytes / 100 / 1e9, "fraction_of_bound": 0.5, "bound": "memory"
    }  # fmt: skip


def test_ceilings_are_plausible_and_measured_once(monkeypatch):
    limits._ceilings.cache_clear()
    found = limits.ceilings("cpu")
    assert found is limits.ceilings("cpu")
    assert set(found.flops) == {"float32", "bfloat16", "float16"}
    # Any core since 2010: 4 to 2 x 2 x 16 x 2 operations a cycle at 1 to 6 GHz.
    per_thread = found.flops["float32"] / found.threads
    assert 4e9 < per_thread < 800e9
    assert found.flops["bfloat16"] >= found.flops["float32"]
    assert 1e9 < found.bandwidth < 2e12
    limits._ceilings.cache_clear()


def test_the_loop_behind_the_peak_runs_on_any_number_of_threads():
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.ops.resnet_fast._fma_peak(1000, False) > 0
            assert torch.ops.resnet_fast._fma_peak(1000, True) >= 0  # 0: no bfloat16 instructions
    finally:
        torch.set_num_threads(threads)


def test_the_table_for_a_reader():
    rows = limits.table("resnet50", 8, torch.float32, ROOF)
    assert rows[0][0] == "" and len({len(row) for row in rows}) == 1
    names = [row[0].strip() for row in rows]
    assert {"inference, eager", "training, least", "stem", "layer4.2", "head"} <= set(names)
