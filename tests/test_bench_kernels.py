"""Single operators at a model's shapes: every way is checked before it is timed."""

import pytest
import torch
import torch.nn.functional as F

from resnet_fast.bench import kernels
from resnet_fast.bench.layers import Block, Layer
from resnet_fast.measure import relative_rms

PLAIN = Layer("b", "conv1", 8, 16, 3, 2, 2, 9, residual=False, relu=True)
LAST = Layer("b", "conv2", 16, 16, 1, 1, 1, 5, residual=True, relu=True)
SHORTCUT = Layer("b", "downsample", 8, 16, 1, 2, 1, 9, residual=False, relu=False)
STEM = Layer("stem", "conv1", 3, 16, 7, 2, 1, 20, residual=False, relu=True)
END = kernels.Case("end", kernels.projection, Block("b", (PLAIN, LAST), SHORTCUT))
FIRST = kernels.Case("first", kernels.max_pooled, STEM)


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
    call = kernels.cudnn_fused(*work.folded(), [n["stride"]] * 2, [n["padding"]] * 2, n["groups"])
    assert relative_rms(call(t["input"], t["residual"]), work.reference()) < 1e-6


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("case", [END, FIRST], ids=str)
def test_every_way_computes_the_same(case):
    work = case(2, torch.float32, "cpu")
    main = work.main if case is END else work.stem
    shortcut = [work.shortcut.cudnn()(work.shortcut.tensors["input"])] if case is END else []
    fused = main.cudnn()(main.tensors["input"], *shortcut)
    outs = [work.ours(), work.in_two_calls(), work.others()["torch"]()]
    outs.append(fused if case is END else F.max_pool2d(fused, *kernels.POOL))
    assert all(relative_rms(out, work.reference()) < 1e-6 for out in outs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [END, FIRST], ids=str)
def test_what_is_more_than_a_convolution_is_checked_and_timed(case, dtype):
    row = kernels.time_case(case, 3, dtype, "cpu")
    assert set(row["ms"]) == set(row["error"]) == {"torch", "ours", "ours, cpu"}
    flops = {"end": 25 * (16 * 16 + 16 * 8), "first": 100 * 16 * 3 * 49}[case.name]
    assert row["flops"] == 2 * 3 * flops and row["fraction_of_bound"] > 0


@pytest.mark.parametrize("time", [kernels.time_max_pool, kernels.time_avg_pool])
def test_poolings_are_checked_and_timed(time, monkeypatch):
    row = time(8, 6, 3, torch.float32, "cpu")
    assert set(row["ms"]) == set(row["error"]) == {"torch", "ours", "ours, cpu"}
    assert row["flops"] == 0 and row["bytes"] == 4 * 3 * 8 * (36 + (9 if time is kernels.time_max_pool else 1))
    for name in ("max_pool", "avg_pool_flatten"):
        right = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, right=right: right(*a) + 1)
    assert set(time(8, 6, 3, torch.float32, "cpu")["ms"]) == {"torch"}


def test_the_cases_of_a_network_are_what_it_runs():
    cases = [str(case) for case in kernels.cases_of("resnet18")]
    assert len(cases) == 17  # of 20 convolutions 3 are projections
    assert cases[0] == "7x7 3->64 s2 @224+relu with max_pool"
    assert cases[6] == "3x3 128->128 s1 @28+relu with projection 1x1 64->128 s2 @56"
    assert len(kernels.fused_cases(["resnet18", "resnet50"])) == 1 + 3 + 4
    assert kernels.pooled_maps(["resnet18", "resnet50"]) == ([(64, 112)], [(512, 7), (2048, 7)])


def test_the_last_images_are_checked_too():
    batch = torch.arange(20.0)
    assert kernels.checked(batch).tolist() == [0, 1, 2, 3, 16, 17, 18, 19] and kernels.checked(batch[:5]).numel() == 5


def test_the_product_by_cublas_is_the_convolution():
    for layer, is_product in ((LAST, True), (PLAIN, False), (SHORTCUT, False)):
        work = kernels.problem(layer, 2, torch.float32, "cpu")
        product = work.product()
        assert (product is not None) == is_product
        if product:
            ref = work.convolution(work.in_double())
            assert relative_rms(product(), ref.permute(0, 2, 3, 1).reshape(-1, layer.filters)) < 1e-6
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_copy_beside_add_relu_moves_as_many_bytes(monkeypatch):
    moved = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda a, b: moved.append(2 * b.nbytes) or copy(a, b))
    row = kernels.time_add_relu(8, 6, 3, torch.float32, "cpu")
    assert row["bytes"] in moved and kernels.COPY in row["ms"] and kernels.COPY not in row["error"]


def test_a_racer_takes_part(monkeypatch):
    monkeypatch.setattr(kernels, "RACERS", [lambda work: {"racer": work.ours, "wrong": lambda: work.ours() + 1}])
    row = kernels.time_layer(LAST, 2, torch.float32, "cpu")
    assert "racer" in row["ms"] and "wrong" not in row["ms"] and row["error"]["wrong"] > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_is_checked_and_timed(dtype):
    row = kernels.time_layer(LAST, 3, dtype, "cpu")
    assert set(row["ms"]) == {"torch", kernels.CONVOLUTION, "ours", "ours, cpu"}
    assert set(row["error"]) == set(row["ms"]) - {kernels.CONVOLUTION}
    assert row["flops"] == 2 * 3 * 25 * 16 * 16 and row["fraction_of_bound"] > 0


def test_a_wrong_way_is_not_timed(monkeypatch):
    right, right_sum = kernels.conv_bn_relu, kernels.add_relu
    monkeypatch.setattr(kernels, "conv_bn_relu", lambda **arguments: right(**arguments) * 1.01)
    row = kernels.time_layer(LAST, 2, torch.float32, "cpu")
    assert set(row["ms"]) == {"torch", kernels.CONVOLUTION} and row["error"]["ours"] > 1e-3
    assert "fraction_of_bound" not in row
    monkeypatch.setattr(kernels, "add_relu", lambda a, b: right_sum(a, b) + 1)
    row = kernels.time_add_relu(8, 5, 2, torch.float32, "cpu")
    assert set(row["ms"]) == {"torch", kernels.COPY} and row["error"]["ours"] == float("inf")


def test_a_way_that_fails_is_told(monkeypatch):
    def fails(**arguments):
        raise RuntimeError("no kernel for this\nmore")

    monkeypatch.setattr(kernels, "conv_bn_relu", fails)
    row = kernels.time_layer(PLAIN, 2, torch.float32, "cpu")
    assert row["error"]["ours"] == "RuntimeError: no kernel for this" and "ours" not in row["ms"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_rows(dtype):
    """Every way is timed, as a CUDA graph; Triton's by path where it has both."""
    from resnet_fast.kernels import configs, shared

    end, first, layer = (kernels.time_case(case, 16, dtype, "cuda") for case in (END, FIRST, kernels.layer_case(LAST)))
    paths = ["ours, triton descriptors", "ours, triton pointers"]
    if not configs.has_descriptors(shared.target_of(torch.empty(1, device="cuda"))):
        paths = ["ours, triton"]
    stock, ours = ["torch", "cudnn fused"], ["ours", "ours, cuda", "ours, cudnn"]
    assert set(layer["ms"]) == {*stock, kernels.CONVOLUTION, kernels.PRODUCT, *ours, *paths}
    # The shortcut of this end has 8 channels, fewer than a step through a descriptor.
    assert set(end["ms"]) == {*stock, *ours, "ours, triton", "ours, triton in two calls"}
    assert set(first["ms"]) == {*stock, "ours", "ours, cuda", "ours, triton", "ours, triton in two calls"}
    rows = [time(64, 14, 16, dtype, "cuda") for time in (kernels.time_max_pool, kernels.time_avg_pool)]
    assert all(set(row["ms"]) == {"torch", "ours", "ours, cuda", "ours, triton"} for row in rows)
    added = kernels.time_add_relu(64, 14, 16, dtype, "cuda")
    assert set(added["ms"]) == {"torch", kernels.COPY, "ours", "ours, cuda", "ours, triton"}
    assert all(0 < ms < 5 for row in (*rows, added, end, first, layer) for ms in row["ms"].values())
