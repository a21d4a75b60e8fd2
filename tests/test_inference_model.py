"""What an optimized model does beside its results: copies, threads, what it refuses, what it keeps and says of itself."""

import copy
import io
import json
import pickle
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from checks import LOOSE, RESNET, assert_like_torch, tensors
from networks import OTHER, SMALL, Module, conv, conv_bn_relu, feature_extractor, images, resnet, tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fast import optimize_for_inference
from resnet_fast.inference import model as inference_model

# Results, copies and threads


def storages(*values):
    return [t.untyped_storage().data_ptr() for t in tensors(values) if t.numel()]


def test_results_are_never_overwritten():
    model = feature_extractor()
    optimized = optimize_for_inference(model, images(*SMALL))
    x = images(2, 3, 64, 64)
    first = optimized(x)
    kept = {name: t.clone() for name, t in first.items()}
    for i in range(3):
        second = optimized(images(2, 3, 64, 64) + i)
    assert all(torch.equal(first[name], t) for name, t in kept.items())
    addresses = storages(x, first, second)
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize("c", (3, 16))
def test_results_share_no_memory(c):
    """Not with the input either, where torch would return it or a view."""

    def forward(self, x):
        y = self.c(x)
        pooled = F.adaptive_avg_pool2d(y, 1)
        return {"x": x, "y": y, "same": y.view(len(y), -1), "first": y[:1], "pooled": pooled, "row": x[:1], "w": self.p}

    model = Module(forward, c=conv(c), p=nn.Parameter(torch.rand(3))).eval()
    x = images(2, c, 8, 8)
    optimized = optimize_for_inference(model, x)
    addresses = storages(x, optimized(x), optimized(x))
    assert len(set(addresses)) == len(addresses)


def test_8_threads_at_a_time():
    model = resnet()
    inputs = [images(1 + i % 2, 3, 64, 64 - 16 * (i % 2)) + i / 10 for i in range(16)]
    expected = [optimize_for_inference(model, images(*SMALL))(x) for x in inputs[:2]]
    optimized = optimize_for_inference(model, images(*SMALL))
    with ThreadPoolExecutor(8) as pool:  # the second shape is planned here
        found = list(pool.map(optimized, inputs * 3))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=False))
    alone = [optimized(x) for x in inputs]
    assert all(torch.equal(found[i], alone[i % 16]) for i in range(48))


def saved_and_loaded(optimized):
    file = io.BytesIO()
    torch.save(optimized, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "copy": copy.deepcopy,
    "pickle": lambda optimized: pickle.loads(pickle.dumps(optimized)),
    "file": saved_and_loaded,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ("resnet18", "feature extractor"))
@pytest.mark.parametrize("dtype", (None, torch.bfloat16))
def test_copies(how, name, dtype):
    model = resnet() if name == "resnet18" else feature_extractor()
    optimized = optimize_for_inference(model, images(*SMALL), dtype=dtype)
    x = images(2, 3, 48, 64)
    expected = optimized(x)
    copied = COPIES[how](optimized)
    assert all(torch.equal(a, b) for a, b in zip(tensors(copied(x)), tensors(expected), strict=True))
    assert str(copied) == str(optimized)


def test_the_original_stays_as_it_is():
    model = resnet()
    model.fc.weight.requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    wanted = [p.requires_grad for p in model.parameters()]
    optimized = optimize_for_inference(model, images(*SMALL), dtype=torch.bfloat16)
    expected = optimized(images(*SMALL))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(t, before[name]) and t.dtype == before[name].dtype for name, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == wanted and not model.training
    model.train()(images(2, 3, 64, 64)).sum().backward()  # trainable, and trained
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert torch.equal(optimized(images(*SMALL)), expected)
    assert torch.isfinite(optimized(images(2, 3, 48, 48))).all(), "planned after the original has changed"
    assert not list(optimized.parameters()) and not optimized.training


def test_hooks_run_while_it_is_followed():
    model = tiny()
    model[1].register_forward_hook(lambda module, inputs, output: output * 2)
    optimized = optimize_for_inference(model, images(*SMALL))
    assert_like_torch(model, optimized, images(*SMALL), **LOOSE)


@pytest.mark.parametrize("mode", (torch.inference_mode, torch.no_grad, torch.enable_grad))
def test_grad_modes(mode):
    model = tiny()
    expected = [optimize_for_inference(model, images(*SMALL))(images(*size)) for size in (SMALL, OTHER)]
    with mode():
        optimized = optimize_for_inference(model, images(*SMALL))
        assert torch.equal(optimized(images(*SMALL)), expected[0])
    optimized = optimize_for_inference(model, images(*SMALL))
    with mode():
        results = [optimized(images(*size)) for size in (SMALL, OTHER)]
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(results, expected, strict=True))
    assert torch.equal(optimized(images(*OTHER)), expected[1])


@pytest.mark.parametrize("where", ("call", "first call of a shape", "making"))
def test_autocast_changes_nothing(where):
    model = tiny()
    expected = optimize_for_inference(model, images(*SMALL))(images(*OTHER))
    if where != "making":
        optimized = optimize_for_inference(model, images(*SMALL))
    if where == "call":
        optimized(images(*OTHER))
    with torch.autocast("cpu", torch.bfloat16):
        if where == "making":
            optimized = optimize_for_inference(model, images(*OTHER))
        out = optimized(images(*OTHER))
    assert out.dtype == torch.float32 and torch.equal(out, expected)


def test_default_dtype_changes_nothing():
    model = tiny()
    expected = optimize_for_inference(model, images(*SMALL))(images(*OTHER))
    x, before = images(*OTHER), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        out = optimize_for_inference(model, x)(x)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(out, expected)


def test_inside_torch_compile():
    optimized = optimize_for_inference(tiny(), images(*SMALL))
    expected = [optimized(images(*size)) for size in (SMALL, OTHER)]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: optimized(x) * 2, backend="eager")
    with torch.no_grad():
        for size, e in zip((SMALL, OTHER), expected, strict=True):
            assert torch.equal(compiled(images(*size)), e * 2)
            assert torch.equal(torch.compile(optimized, backend="eager")(images(*size)), e)


# What it refuses


@pytest.mark.parametrize("which", ("it", "1.1"))
def test_refuses_training_mode(which):
    model = nn.Sequential(conv(3, 16), conv_bn_relu()).eval()
    (model if which == "it" else model[1][1]).train()
    with pytest.raises(ValueError, match=f"must be in eval mode, but {which} is in training mode"):
        optimize_for_inference(model, images(*SMALL))


X = torch.ones(2, 3, 8, 8)
REFUSED_TO_MAKE = {
    "no module": (TypeError, "must be an nn.Module, got builtin", lambda: optimize_for_inference(torch.relu, X)),
    "no tensor": (TypeError, "must be a tensor, got list", lambda: optimize_for_inference(conv(3).eval(), [X])),
    "integers": (TypeError, "must be floating point, got", lambda: optimize_for_inference(conv(3).eval(), X.int())),
    "no input": (ValueError, "empty tuple", lambda: optimize_for_inference(conv(3).eval(), ())),
    "device": (ValueError, "on the CPU, got meta", lambda: optimize_for_inference(conv(3).eval(), X.to("meta"))),
    "model's device": (
        ValueError, "must be on the CPU, but weight is on meta",
        lambda: optimize_for_inference(conv(3).eval().to("meta"), X),
    ),
    "channels": (RuntimeError, "to have 3 channels", lambda: optimize_for_inference(conv(3).eval(), X[:, :2])),
    "float64": (ValueError, "float32, bfloat16, float16 or None", lambda: optimize_for_inference(conv(3).eval(), X, torch.float64)),
    "dtype's name": (ValueError, "got float32", lambda: optimize_for_inference(conv(3).eval(), X, "float32")),
    "negative memory": (ValueError, "got -1", lambda: optimize_for_inference(conv(3).eval(), X, weight_memory=-1)),
    "memory yes": (ValueError, "got True", lambda: optimize_for_inference(conv(3).eval(), X, weight_memory=True)),
    "part of a byte": (ValueError, "got 1.5", lambda: optimize_for_inference(conv(3).eval(), X, weight_memory=1.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_TO_MAKE)
def test_refuses_to_make(name):
    error, message, function = REFUSED_TO_MAKE[name]
    with pytest.raises(error, match=message):
        function()


REFUSED_CALLS = {
    "rank": (ValueError, r"4 dimensions, as the example, got shape \(3, 8, 8\)", lambda o: o(X[0])),
    "channels": (ValueError, r"3 channels, as the example, got shape \(2, 2, 8, 8\)", lambda o: o(X[:, :2])),
    "integers": (TypeError, "must be floating point, got torch.int32", lambda o: o(X.int())),
    "device": (ValueError, "must be on the CPU, got meta", lambda o: o(X.to("meta"))),
    "no tensor": (TypeError, "must be a tensor, got ndarray", lambda o: o(X.numpy())),
    "two inputs": (TypeError, "takes 1 inputs, as the example had, got 2", lambda o: o(X, X)),
    "none": (TypeError, "takes 1 inputs, as the example had, got 0", lambda o: o()),
    "gradient": (RuntimeError, "requires a gradient", lambda o: o(X.clone().requires_grad_())),
    "training": (RuntimeError, "frozen and cannot be trained", lambda o: o.train()),
    "casting": (RuntimeError, "frozen and cannot be moved or cast", lambda o: o.to(torch.bfloat16)),
    "moving": (RuntimeError, "frozen and cannot be moved or cast", lambda o: nn.Sequential(o).to("cpu")),
    "loading": (RuntimeError, "cannot load other weights", lambda o: o.load_state_dict({})),
    "rounds": (ValueError, "rounds must be at least 1", lambda o: o.explain(rounds=0)),
}


@pytest.mark.parametrize("name", REFUSED_CALLS)
def test_refuses_calls(name):
    error, message, function = REFUSED_CALLS[name]
    optimized = optimize_for_inference(conv(3).eval(), X)
    expected = optimized(X)
    with pytest.raises(error, match=message):
        function(optimized)
    assert torch.equal(optimized(X), expected), "still works"
    with torch.no_grad():
        assert torch.equal(optimized(X.clone().requires_grad_()), expected)
    assert optimized.eval() is optimized


def test_refuses_models_that_change_their_buffers():
    def forward(self, x):
        self.calls.add_(1)
        return self.c(x) * self.calls

    model = Module(forward, c=conv(3))
    model.register_buffer("calls", torch.zeros(1))
    with pytest.raises(RuntimeError, match="must not change while it runs, but it writes into 'calls'"):
        optimize_for_inference(model.eval(), X)
    assert model.calls == 0


def test_refuses_code_that_depends_on_values():
    model = Module(lambda s, x: s.c(x) if x.sum() > 0 else x, c=conv(3)).eval()
    with pytest.raises(RuntimeError, match="cannot capture Module for inputs of") as caught:
        optimize_for_inference(model, X)
    assert len(str(caught.value)) < 600, "what is wrong, not pages of advice"


def test_other_shapes_that_the_model_cannot_take():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)).eval()
    optimized = optimize_for_inference(model, X)
    expected = optimized(X)
    with pytest.raises(RuntimeError, match="cannot capture Sequential"):
        optimized(torch.ones(2, 3, 9, 9))
    assert torch.equal(optimized(X), expected)


# Plans and packed weights


def test_most_plans():
    model = tiny()
    optimized = optimize_for_inference(model, images(1, 3, 32, 32))
    sizes = [(1, 3, 32 + 4 * i, 32) for i in range(inference_model.MOST_PLANS + 3)]
    for size in sizes:
        optimized(images(*size))
        used = {key for plan in optimized._plans.values() for key in plan.keys}
        assert optimized._weights._packed.keys() == used, "weights that no plan uses"
    assert [shapes[0] for shapes in optimized._plans] == sizes[-inference_model.MOST_PLANS :]
    for size in (*sizes[:2], sizes[-1]):
        assert_like_torch(model, optimized, images(*size), **LOOSE)


def test_the_plan_not_used_for_longest_is_dropped():
    optimized = optimize_for_inference(conv(3).eval(), images(1, 3, 8, 8))
    for i in range(1, inference_model.MOST_PLANS):
        optimized(images(1, 3, 8 + i, 8))
    optimized(images(1, 3, 8, 8))
    optimized(images(1, 3, 40, 8))
    kept = [shapes[0][2] for shapes in optimized._plans]
    assert 8 in kept and 9 not in kept and len(kept) == inference_model.MOST_PLANS


def test_weight_memory():
    model, x = resnet(), images(2, 3, 64, 64)
    full = optimize_for_inference(model, x)._weights.winograd_bytes()
    assert full > 2**20
    found = []
    for cap in (0, full // 20, full // 4, full // 2, full, 2 * full):
        optimized = optimize_for_inference(model, x, weight_memory=cap)
        used = optimized._weights.winograd_bytes()
        assert used <= cap
        found.append(used)
        assert_like_torch(model, optimized, x, **RESNET)
    assert found == sorted(found) and found[0] == 0 and found[2] > 0 and found[-1] == found[-2] == full


def test_weight_memory_of_all_shapes_together():
    model = resnet()
    cap = optimize_for_inference(model, images(*SMALL))._weights.winograd_bytes() // 2
    optimized = optimize_for_inference(model, images(*SMALL), weight_memory=cap)
    for size in ((1, 3, 96, 96), (4, 3, 32, 32), (1, 3, 160, 96)):
        optimized(images(*size))
        assert optimized._weights.winograd_bytes() <= cap


def test_shapes_share_packed_weights():
    optimized = optimize_for_inference(resnet(), images(1, 3, 64, 64), weight_memory=0)
    before = optimized.memory().packed_weights
    optimized(images(1, 3, 96, 96))
    assert optimized.memory().packed_weights == before


# What it says of itself


def flops_of(model, x):
    """Of every convolution and linear layer by name, from the sizes that torch sees."""
    found, hooks = {}, []
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d | nn.Linear):

            def hook(m, inputs, output, name=name):
                found[name] = 2 * output.numel() * m.weight[0].numel()

            hooks.append(m.register_forward_hook(hook))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def test_explain():
    model = resnet()
    optimized = optimize_for_inference(model, images(*SMALL))
    for inputs in ((), (images(*OTHER),)):
        table = optimized.explain(*inputs, rounds=2)
        rows = {row.name: row for row in table.layers}
        for name, flops in flops_of(model, *inputs or (images(*SMALL),)).items():
            assert rows[name].flops == flops and rows[name].ours and not rows[name].reason
            assert name in str(table) and rows[name].kernel in str(table)
        assert sum(row.share for row in table.layers) == pytest.approx(1)
        assert all(row.microseconds > 0 and row.size[0] == (3 if inputs else 1) for row in table.layers)
        assert table.own_share == 1 and table.threads == torch.get_num_threads()
        assert rows["conv1"].kernel.endswith("max-pooling in the same pass") and rows["conv1"].size[1] == 64
        assert len(table.layers) == 22  # 20 convolutions, average pooling, the linear layer
        read = json.loads(json.dumps(table.to_dict()))
        assert read["own_share"] == 1 and len(read["layers"]) == 22 and "FrozenBatch" not in str(table)


def test_explain_gives_reasons():
    def forward(self, x):
        y = self.c(x)
        kernel = F.adaptive_avg_pool2d(y, 3).mean(0, keepdim=True)
        return torch.sigmoid(F.conv2d(y, kernel.expand(16, 16, 3, 3))) + self.d(y).mean()

    model = Module(forward, c=conv(3), d=nn.Conv2d(16, 16, (3, 4), padding="same")).eval()
    table = optimize_for_inference(model, X).explain(rounds=1)
    reasons = {row.reason for row in table.layers}
    assert {"its weight depends on the input", "pads one side more than the other", "no kernel of our own"} <= reasons
    assert 0 < table.own_share < 1 and any(row.kernel == "torch sigmoid" for row in table.layers)


def test_explain_changes_nothing():
    optimized = optimize_for_inference(tiny(), images(*SMALL))
    expected = optimized(images(*SMALL))
    torch.manual_seed(1)
    a = torch.rand(1)
    torch.manual_seed(1)
    optimized.explain(rounds=1)
    assert torch.equal(torch.rand(1), a), "explain has drawn from torch's generator"
    assert torch.equal(optimized(images(*SMALL)), expected)


def test_memory():
    model = resnet()
    optimized = optimize_for_inference(model, images(*SMALL))
    state = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    planned = optimized.memory()
    assert planned.parameters == state and planned.packed_weights == optimized._weights.bytes()
    assert planned.buffers == 0 and planned.peak > state + planned.packed_weights
    optimized(images(*SMALL))
    optimized(images(*OTHER))
    called = optimized.memory()
    assert called.buffers == sum(plan.arena_bytes for plan in optimized._plans.values()) > 0
    assert called.peak == called.parameters + called.packed_weights + called.buffers
    assert str(called).count("MiB") == 4


def test_repr():
    text = repr(optimize_for_inference(resnet(), images(*SMALL), dtype=torch.bfloat16))
    assert "OptimizedModel(ResNet" in text and "(1, 3, 64, 64)" in text and "bfloat16" in text


# The steady state


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_call_allocates_its_output_alone():
    optimized = optimize_for_inference(resnet(), images(4, 3, 96, 96))
    x = images(4, 3, 96, 96)
    optimized(x)
    with Names() as seen:
        optimized(x)
    assert seen.names.count("aten.empty_strided.default") == 1
    assert set(seen.names) == {"aten.empty_strided.default", "resnet_fast._run_plan.default"}


def test_calls_fault_no_pages():
    optimized = optimize_for_inference(resnet(), images(4, 3, 96, 96))
    x = images(4, 3, 96, 96)
    for _ in range(3):
        optimized(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        optimized(x)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 50
