"""Drop-in: every model against torchvision's with the same weights, and every way people use one."""

import copy
import io
import pickle

import pytest
import torch
import torchvision
from checks import UNIT_ROUNDOFF
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import feature_extraction, segmentation
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import backbone_utils
from torchvision.ops.misc import FrozenBatchNorm2d

import resnet_fast
from resnet_fast import models
from resnet_fast.bench import layers
from resnet_fast.measure import relative_rms

NAMES = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip


def pair(name="resnet18", **kwargs):
    """Ours and torchvision's with equal weights and BatchNorm statistics of one training pass, in eval mode.

    Branches are weak beside their shortcuts, as in trained networks: as strong, random ones amplify the last bit of
    every layer by up to 1e3, stock torch's too.
    """
    torch.manual_seed(0)
    ours = getattr(models, name)(**kwargs)
    torch.manual_seed(0)
    stock = getattr(torchvision.models, name)(**kwargs)
    for m in stock.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0
        if isinstance(m, torchvision.models.resnet.BasicBlock | torchvision.models.resnet.Bottleneck):
            nn.init.constant_((m.bn3 if hasattr(m, "bn3") else m.bn2).weight, 0.1)
    with torch.no_grad():
        stock.train()(torch.randn(8, 3, 96, 96))
    for m in stock.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.1
    ours.load_state_dict(stock.state_dict(), strict=True)
    return ours.eval(), stock.eval()


@pytest.fixture(scope="module")
def both():
    return pair()


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)


def fused(model):
    return [b.fused for b in resnet_fast.explain(model).blocks]


def assert_same(out, ref):
    assert ref.isfinite().all() and ref.std() > 0
    assert relative_rms(out, ref) < 5e-6  # the same function, not the same rounding


def assert_gradients(ours, stock, exact):
    """Each gradient points where float64's does, as nearly as stock torch's: a ReLU flips single values either way."""
    for g, h, e in zip(ours, stock, exact, strict=True):
        near = [nn.functional.cosine_similarity(t.double().flatten(), e.flatten(), dim=0) for t in (g, h)]
        assert near[0] >= near[1] - 1e-3 and near[1] > 0.99


@pytest.mark.parametrize("name", NAMES)
def test_numbers_names_and_state(name, x):
    ours, stock = pair(name)
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in stock.named_modules()]
    assert list(ours.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(ours.state_dict(), strict=True)
    assert all(fused(ours))
    with torch.no_grad():
        ref = stock.double()(x.double())
        stock.float()
        layouts = [relative_rms(stock(x), ref)]
        stock.to(memory_format=torch.channels_last)
        layouts.append(relative_rms(stock(x.contiguous(memory_format=torch.channels_last)), ref))
        stock.to(memory_format=torch.contiguous_format)
        assert ref.isfinite().all() and ref.std() > 0.01
        error = relative_rms(ours(x), ref)
        assert error <= min(2 * max(layouts) + 1e-7, 5e-6)
        with resnet_fast.use_backend("reference"):
            assert torch.equal(ours(x), stock(x))


@pytest.mark.parametrize("name", ("resnet18", "resnet50", "resnext50_32x4d"))
def test_initialisation_is_torchvisions(name):
    torch.manual_seed(3)
    ours = getattr(models, name)(zero_init_residual=True)
    torch.manual_seed(3)
    stock = getattr(torchvision.models, name)(zero_init_residual=True)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), stock.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ("resnet18", "resnet50"))
def test_training_on_the_reference_is_torchvisions_bit_for_bit(name, x):
    ours, stock = pair(name)
    results = []
    with resnet_fast.use_backend("reference"):
        for model in (ours, stock):
            loss = model.train()(x).square().mean()
            loss.backward()
            results.append([loss, *(p.grad for p in model.parameters()), *model.buffers()])
        assert not any(fused(ours))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_arguments(x):
    for kwargs in (
        dict(num_classes=7),
        dict(norm_layer=lambda c: nn.BatchNorm2d(c, eps=1e-3)),
        dict(groups=32, width_per_group=4),
        dict(replace_stride_with_dilation=[False, True, True]),
    ):
        name = "resnet50" if "num_classes" not in kwargs else "resnet18"
        ours, stock = pair(name, **kwargs)
        with torch.no_grad():
            assert_same(ours(x), stock(x))
        assert all(fused(ours))
    with pytest.raises(ValueError):
        models.resnet50(replace_stride_with_dilation=[True])
    with pytest.raises(ValueError):
        models.resnext50_32x4d(groups=3)
    with pytest.raises(ValueError):
        models.resnet18(norm_layer=None, groups=2)


def test_weights_enums_are_torchvisions(monkeypatch):
    stock = torchvision.models.resnet18()
    weights = models.ResNet18_Weights.DEFAULT
    assert weights is torchvision.models.ResNet18_Weights.DEFAULT
    calls = []
    monkeypatch.setattr(
        type(weights), "get_state_dict", lambda self, **kw: calls.append((self, kw)) or stock.state_dict()
    )
    for given in (weights, "DEFAULT", "IMAGENET1K_V1"):
        model = models.resnet18(weights=given, progress=False)
        assert torch.equal(model.fc.weight, stock.fc.weight)
    assert calls == [(weights, dict(progress=False, check_hash=True))] * 3
    with pytest.raises(ValueError):
        models.resnet18(weights=weights, num_classes=5)
    with pytest.raises(KeyError):
        models.resnet18(weights="IMAGENET1K_V9")


def test_group_norm_is_plain(x):
    model = models.resnet18(norm_layer=lambda c: nn.GroupNorm(8, c)).eval()
    assert not any(fused(model)) and "GroupNorm" in str(resnet_fast.explain(model))
    with torch.no_grad():
        assert model(x).isfinite().all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision(dtype, x):
    ours, stock = pair()
    ref = copy.deepcopy(stock).double()(x.double())
    ours, stock = ours.to(dtype), stock.to(dtype)
    with torch.no_grad():
        out, theirs = ours(x.to(dtype)), stock(x.to(dtype))
    assert out.dtype == dtype and all(fused(ours))
    assert relative_rms(out, ref) <= 2 * relative_rms(theirs, ref)


def test_double_is_torchs(x):
    ours, stock = (m.double() for m in pair())
    assert not any(fused(ours))
    with torch.no_grad():
        assert torch.equal(ours(x.double()), stock(x.double()))


def test_autocast(both, x):
    ours, stock = both
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out, theirs = ours(x), stock(x)
    assert out.dtype == theirs.dtype
    ref = copy.deepcopy(stock).double()(x.double())
    assert relative_rms(out, ref) <= 2 * relative_rms(theirs, ref)


def test_autocast_block_keeps_torchs_dtype(both):
    x = torch.randn(1, 64, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        results = [m.layer1[0](x) for m in both]
    assert results[0].dtype == results[1].dtype


def test_channels_last_and_contiguous_layouts(both, x):
    ours, stock = map(copy.deepcopy, both)
    with torch.no_grad():
        body = nn.Sequential(*list(ours.children())[:-2])
        assert_same(body(x).view(2, -1), nn.Sequential(*list(stock.children())[:-2])(x).view(2, -1))
        ours.to(memory_format=torch.channels_last)
        assert_same(ours(x.contiguous(memory_format=torch.channels_last)), stock(x))
        body = nn.Sequential(*list(ours.children())[:-2])
        assert body(x).is_contiguous(memory_format=torch.channels_last)


def test_copies_and_files(both, x):
    ours, stock = both
    with torch.no_grad():
        ours(x)
        ref = stock(x)
        assert_same(copy.deepcopy(ours)(x), ref)
        assert_same(pickle.loads(pickle.dumps(ours))(x), ref)
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        assert_same(torch.load(file, weights_only=False)(x), ref)
        file = io.BytesIO()
        torch.save(ours.state_dict(), file)
        file.seek(0)
        fresh = torchvision.models.resnet18()
        fresh.load_state_dict(torch.load(file))
        assert torch.equal(fresh.eval()(x), ref)


def test_symbolic_trace_and_feature_extractor(both, x):
    ours, stock = both
    with torch.no_grad():
        assert torch.equal(torch.fx.symbolic_trace(ours)(x), stock(x))
        nodes = {"layer2.0.relu_1": "a", "layer4.1.relu_1": "b", "flatten": "c"}
        results = [feature_extraction.create_feature_extractor(m, nodes)(x) for m in both]
    assert all(torch.equal(results[0][k], results[1][k]) for k in "abc")


@pytest.mark.parametrize("name", NAMES)
def test_graph_node_names(name):
    nodes = [feature_extraction.get_graph_node_names(getattr(m, name)()) for m in (models, torchvision.models)]
    assert nodes[0] == nodes[1]


def test_trace_and_script(both, x):
    ours, stock = both
    with torch.no_grad():
        assert_same(torch.jit.trace(ours, x)(x), stock(x))
        assert torch.equal(torch.jit.script(ours)(x), stock(x))
    assert torch.jit.script(models.resnet50()) is not None


@pytest.mark.parametrize("strict", (False, True))
def test_export_with_dynamic_batch(both, x, strict):
    ours, stock = both
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(ours, (x,), dynamic_shapes=({0: batch},), strict=strict)
        found = [str(n.target) for n in program.graph.nodes if "conv_bn_relu" in str(n.target)]
        assert len(found) + sum("projection" in target for target in found) == 20  # of two convolutions each
        more = torch.randn(5, 3, 64, 64)
        assert_same(program.module()(more), stock(more))
        with resnet_fast.use_backend("reference"):
            plain = torch.export.export(copy.deepcopy(ours), (x,), strict=strict)
        assert not any("resnet_fast" in str(n.target) for n in plain.graph.nodes)


def test_compile(both, x):
    ours, stock = both
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert_same(compiled(x), stock(x))
    assert len(graphs) == 1 and "resnet_fast" in graphs[0].code


@pytest.mark.parametrize("dynamo", (True, False))
def test_onnx_export_has_plain_nodes(both, x, tmp_path, dynamo):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    with torch.no_grad():
        torch.onnx.export(both[0], (x,), tmp_path / "model.onnx", dynamo=dynamo, verbose=False)
    model = onnx.load(tmp_path / "model.onnx")
    assert {n.domain for n in model.graph.node} <= {"", "ai.onnx"}
    assert sum(n.op_type == "Conv" for n in model.graph.node) == 20


def test_intermediate_layer_getter(both, x):
    layers = {"layer1": "a", "layer4": "b"}
    with torch.no_grad():
        results = [IntermediateLayerGetter(m, layers)(x) for m in both]
    for k in "ab":
        assert_same(results[0][k], results[1][k])


def test_detection_backbone_with_frozen_batch_norm_in_train_mode(x):
    _, stock = pair("resnet50")
    torch.manual_seed(0)
    frozen = models.resnet50(norm_layer=FrozenBatchNorm2d)
    theirs = torchvision.models.resnet50(norm_layer=FrozenBatchNorm2d)
    for m in (frozen, theirs):
        m.load_state_dict(stock.state_dict(), strict=False)
    torch.manual_seed(0)
    a = backbone_utils._resnet_fpn_extractor(frozen, trainable_layers=3).train()
    torch.manual_seed(0)
    b = backbone_utils._resnet_fpn_extractor(theirs, trainable_layers=3).train()
    assert sum(fused(a)) >= 16
    out, ref = a(x), b(x)
    for k in ref:
        assert_same(out[k], ref[k])
    exact = copy.deepcopy(b).double()
    for o in (out, ref, exact(x.double())):
        sum(v.square().mean() for v in o.values()).backward()
    grads = [[p.grad for p in m.parameters() if p.grad is not None] for m in (a, b, exact)]
    assert len(grads[0]) == len(grads[1]) > 0
    assert_gradients(*grads)


def test_segmentation_backbone(x):
    kwargs = dict(replace_stride_with_dilation=[False, True, True])
    ours, stock = pair("resnet50", **kwargs)
    heads = []
    for m in (ours, stock):
        torch.manual_seed(1)
        heads.append(
            segmentation.fcn._fcn_resnet(m, num_classes=4, aux=None).eval() if hasattr(segmentation, "fcn") else m
        )
    with torch.no_grad():
        assert_same(heads[0](x)["out"], heads[1](x)["out"])


def test_replaced_parts(both):
    ours, stock = map(copy.deepcopy, both)
    for m in (ours, stock):
        torch.manual_seed(2)
        m.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        m.maxpool = nn.Identity()
        m.layer1[0].relu = nn.LeakyReLU(0.1)
    assert "LeakyReLU" in str(resnet_fast.explain(ours)) and fused(ours).count(False) == 1
    small = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert_same(ours(small), stock(small))


def operators(model, x):
    """Names of the operators that a pass runs."""
    seen = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Note():
        model(x)
    return seen


OUR_POOLS = ("resnet_fast::conv_bn_relu_max_pool", "resnet_fast::avg_pool_flatten")


def test_pooling_is_ours_in_eval_mode_without_gradient(both, x):
    ours = copy.deepcopy(both[0])
    found = operators(ours, x)  # a gradient is asked for
    assert "resnet_fast::conv_bn_relu" in found and not any(name in found for name in OUR_POOLS)
    with torch.no_grad():
        found = operators(ours, x)
        assert all(found.count(name) == 1 for name in OUR_POOLS)
        assert not any("max_pool2d" in name or "mean" in name for name in found)
        found = operators(copy.deepcopy(ours).train(), x)
        assert "resnet_fast::max_pool" in found and not any(name in found for name in OUR_POOLS)
        conv = resnet_fast.explain(ours.eval(), x).convolutions[0]
    assert conv.name == "conv1" and conv.ours and conv.kernel.endswith("max-pooling in the same pass")
    assert "after maxpool" in resnet_fast.explain(ours).blocks[0].reason
    with resnet_fast.use_backend("reference"):
        assert not any("resnet_fast" in name for name in operators(ours, x))


OTHER_POOLS = {
    "ceil_mode": ("maxpool", lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), True),
    "dilation": ("maxpool", lambda: nn.MaxPool2d(3, 2, 1, dilation=2), True),
    "average": ("maxpool", lambda: nn.AvgPool2d(3, 2, 1), True),
    "nothing": ("maxpool", nn.Identity, True),
    "other sizes": ("maxpool", lambda: nn.MaxPool2d((2, 4), padding=(1, 2)), False),
    "global maximum": ("avgpool", lambda: nn.AdaptiveMaxPool2d(1), True),
    "fixed average": ("avgpool", lambda: nn.AvgPool2d(2), True),
    "one number": ("avgpool", lambda: nn.AdaptiveAvgPool2d(1), False),
}


@pytest.mark.parametrize("case", OTHER_POOLS)
def test_other_pooling(both, x, case):
    name, make, plain = OTHER_POOLS[case]
    ours, stock = map(copy.deepcopy, both)
    for m in (ours, stock):
        setattr(m, name, make())
    with torch.no_grad():
        assert_same(ours(x), stock(x))
        assert (OUR_POOLS[name == "avgpool"] in operators(ours, x)) != plain
        assert OUR_POOLS[name == "maxpool"] in operators(ours, x)
    assert all(fused(ours))
    if plain and name == "maxpool":
        assert "maxpool runs torch's operator: maxpool" in str(resnet_fast.explain(ours))


@pytest.mark.parametrize("name", ("maxpool", "avgpool"))
def test_hooks_on_pooling_run(both, x, name):
    ours, stock = map(copy.deepcopy, both)
    seen = []
    for m in (ours, stock):
        getattr(m, name).register_forward_hook(lambda mod, args, out: seen.append(out))
    with torch.no_grad():
        assert_same(ours(x), stock(x))
        assert OUR_POOLS[name == "avgpool"] not in operators(ours, x)
    assert_same(seen[0], seen[1])


def test_hooks_on_an_inner_layer_run(both, x):
    ours, stock = map(copy.deepcopy, both)
    seen = []
    for m in (ours, stock):
        m.layer2[0].bn1.register_forward_hook(lambda mod, args, out: seen.append(out))
        m.layer3[1].register_forward_hook(lambda mod, args, out: seen.append(out))
    assert [b.name for b in resnet_fast.explain(ours).blocks if not b.fused] == ["layer2.0"]
    with torch.no_grad():
        assert_same(ours(x), stock(x))
    assert len(seen) == 4
    assert_same(seen[0], seen[2])
    assert_same(seen[1], seen[3])


def test_global_hooks_see_every_module(both, x):
    ours, stock = both
    counts = []
    for m in (ours, stock):
        names = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda mod, args, out, names=names: names.append(type(mod))
        )
        with torch.no_grad():
            m(x)
            assert m is stock or not any(fused(ours))
        handle.remove()
        counts.append([n.__name__ for n in names])
    assert counts[0] == counts[1]


def test_pruning_parametrization_and_replaced_forward(both, x):
    from torch.nn.utils import parametrizations, prune

    ours, stock = map(copy.deepcopy, both)
    for m in (ours, stock):
        torch.manual_seed(4)
        prune.l1_unstructured(m.layer1[0].conv1, "weight", amount=0.5)
        parametrizations.weight_norm(m.layer2[1].conv2)
        conv = m.layer3[0].conv1
        conv.forward = lambda t, c=conv: 2 * type(c).forward(c, t)
    plain = [b.name for b in resnet_fast.explain(ours).blocks if not b.fused]
    assert plain == ["layer1.0", "layer2.1", "layer3.0"]
    with torch.no_grad():
        assert_same(ours(x), stock(x))


def test_one_batch_norm_in_training_mode(both, x):
    ours, stock = map(copy.deepcopy, both)
    for m in (ours, stock):
        m.layer1[1].bn2.train()
    assert "layer1.1" in [b.name for b in resnet_fast.explain(ours).blocks if not b.fused]
    with torch.no_grad():
        assert_same(ours(x), stock(x))


def test_gradients_in_eval_mode(both, x):
    ours, stock = both
    grads = []
    for m in (copy.deepcopy(ours), copy.deepcopy(stock), copy.deepcopy(stock).double()):
        leaf = x.to(m.fc.weight.dtype, copy=True).requires_grad_()
        m(leaf).square().mean().backward()
        grads.append([leaf.grad, *(p.grad for p in m.parameters())])
    assert_gradients(*grads)


def test_transforms(both, x):
    ours, stock = both
    results = []
    for m in (ours, stock):
        params = {n: p.detach() for n, p in m.named_parameters()}
        loss = lambda p, m=m: torch.func.functional_call(m, p, (x,)).square().mean()  # noqa: E731
        results.append(torch.func.grad(loss)(params)["conv1.weight"])
    assert torch.equal(*results)
    with torch.no_grad():
        assert_same(torch.func.functional_call(ours, dict(ours.named_parameters()), (x,)), stock(x))
        one = torch.randn(3, 1, 3, 32, 32)
        assert torch.allclose(torch.func.vmap(ours)(one), torch.func.vmap(stock)(one), atol=1e-4)


def test_distributed_wrapping(both, x, tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(both[0]))
        model.train()(x).square().mean().backward()
        with torch.no_grad():
            model.eval()
            assert_same(model(x), model.module(x))
    finally:
        dist.destroy_process_group()


def test_wrong_input_raises_as_torchvision(both):
    for bad in (torch.randn(2, 4, 64, 64), torch.randn(2, 3, 64, 64).half(), torch.randn(64, 64)):
        for m in both:
            with pytest.raises((RuntimeError, ValueError)):
                m(bad)


def test_explain_names_every_block(both):
    report = resnet_fast.explain(both[0])
    assert [b.name for b in report.blocks] == ["stem", *(f"layer{i}.{j}" for i in range(1, 5) for j in range(2))]
    assert "9 of 9 blocks fused" in str(report)
    assert all(b["kernel"].startswith("C++") for b in report.to_dict()["blocks"])
    assert "No block of resnet_fast" in str(resnet_fast.explain(both[1]))
    with resnet_fast.use_backend("reference"):
        assert not any(fused(both[0]))


@pytest.mark.parametrize("name", ("resnet18", "resnet50", "wide_resnet50_2"))
@pytest.mark.parametrize(("batch", "size"), ((1, 224), (8, 64)))
def test_our_kernels_compute_nearly_all(name, batch, size):
    x = torch.zeros(batch, 3, size, size)
    model = getattr(models, name)().eval()
    found = resnet_fast.explain(model, x)
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    names = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert len(found.convolutions) == len(convs) and {c.name for c in found.convolutions} == names
    assert found.own_share >= 0.95 and all(c.kernel.startswith("C++") for c in found.convolutions)
    assert "Winograd F(" in str(found) and "100.0 %" in str(found)
    with resnet_fast.use_backend("reference"):
        plain = resnet_fast.explain(model, x)
    assert plain.own_share == 0 and {c.kernel for c in plain.convolutions} == {"torch"}
    assert {c.name: c.flops for c in plain.convolutions} == {c.name: c.flops for c in found.convolutions}
    assert found.to_dict()["own_share"] == found.own_share
    if size == 224:
        table = sum(2 * layer.weights * layer.out_size**2 for layer in layers.read(name))
        assert sum(c.flops for c in found.convolutions) == table


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", ("resnet18", "resnet50", "resnext50_32x4d"))
def test_on_a_gpu(name, dtype, x):
    ours, stock = (m.cuda() for m in pair(name))
    x = x.cuda()
    with torch.no_grad():
        ref = copy.deepcopy(stock).double()(x.double())
        ours, stock, x = ours.to(dtype), stock.to(dtype), x.to(dtype)
        layouts = [relative_rms(stock(x), ref)]
        stock.to(memory_format=torch.channels_last)
        layouts.append(relative_rms(stock(x.contiguous(memory_format=torch.channels_last)), ref))
        assert ref.isfinite().all() and ref.std() > 0.01
        assert all(fused(ours))
        for backend in (None, "triton", "cuda", "cudnn"):
            with resnet_fast.use_backend(backend):
                assert relative_rms(ours(x), ref) <= 2 * max(layouts) + UNIT_ROUNDOFF[dtype]
