"""Single operators at a model's shapes: every way is checked before it is timed."""

import pytest
import torch
import torch.nn.functional as F

from resnet_fast.bench import kernels
from resnet_fast.bench.layers import Layer
from resnet_fast.measure import relative_rms

PLAIN = Layer("b", "conv1", 8, 16, 3, 2, 2, 9, residual=False, relu=True)
LAST = Layer("b", "conv2", 16, 16, 1, 1, 1, 5, residual=True, relu=True)


@pytest.fixture
def stand_in(monkeypatch):
    """cuDNN's two fused operators in plain torch."""

    def fused(x, w, bias, stride, padding, dilation, groups):
        return F.conv2d(x, w, bias, stride, padding, dilation, groups).relu()

    def fused_add(x, w, z, alpha, bias, stride, padding, dilation, groups):
        return (F.conv2d(x, w, bias, stride, padding, dilation, groups) + alpha * z).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", fused)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", fused_add)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("layer", [PLAIN, LAST], ids=["plain", "residual"])
def test_cudnn_fused_folds_batch_norm(layer):
    work = kernels.problem(layer, 2, torch.float32, "cpu")
    t, n = work.tensors, work.numbers
    vectors = (t["bn_weight"], t["bn_bias"], t["running_mean"], t["running_var"])
    call = kernels.cudnn_fused(t["weight"], *vectors, kernels.EPS, [n["stride"]] * 2, [n["padding"]] * 2, n["groups"])
    assert relative_rms(call(t["input"], t["residual"]), work.reference()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_is_checked_and_timed(dtype):
    row = kernels.time_layer(LAST, 3, dtype, "cpu")
    assert set(row["ms"]) == {"torch", "torch convolution alone", "ours", "ours, cpu"}
    assert set(row["error"]) == set(row["ms"]) - {"torch convolution alone"}
    assert row["flops"] == 2 * 3 * 25 * 16 * 16 and row["fraction_of_bound"] > 0


def test_a_wrong_way_is_not_timed(monkeypatch):
    right, right_sum = kernels.conv_bn_relu, kernels.add_relu
    monkeypatch.setattr(kernels, "conv_bn_relu", lambda **arguments: right(**arguments) * 1.01)
    row = kernels.time_layer(LAST, 2, torch.float32, "cpu")
    assert set(row["ms"]) == {"torch", "torch convolution alone"} and row["error"]["ours"] > 1e-3
    assert "fraction_of_bound" not in row
    monkeypatch.setattr(kernels, "add_relu", lambda a, b: right_sum(a, b) + 1)
    row = kernels.time_add_relu(8, 5, 2, torch.float32, "cpu")
    assert set(row["ms"]) == {"torch"} and row["error"]["ours"] == float("inf")


def test_a_way_that_fails_is_told(monkeypatch):
    def fails(**arguments):
        raise RuntimeError("no kernel for this\nmore")

    monkeypatch.setattr(kernels, "conv_bn_relu", fails)
    row = kernels.time_layer(PLAIN, 2, torch.float32, "cpu")
    assert row["error"]["ours"] == "RuntimeError: no kernel for this" and "ours" not in row["ms"]
