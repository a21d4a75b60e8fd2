"""The parts of optimize_for_inference: places in memory, what is fused, capturing without side effects, the list of
steps that C++ runs, and random networks at every level of instructions."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
import torchvision
from checks import OTHER_LEVELS, UNIT_ROUNDOFF, assert_passes_at_level
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Module, conv
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from resnet_fast import optimize_for_inference
from resnet_fast.choose import multiplies_bfloat16, onednn_runs
from resnet_fast.inference import fuse, memory, plan, program
from resnet_fast.inference.capture import capture
from resnet_fast.inference.weights import fold, is_usable
from resnet_fast.measure import random_model, relative_rms

# Places


def overlap(a, b):
    """Whether two maps live at a time and share a byte."""
    at_a_time = a.first <= b.last and b.first <= a.last
    return at_a_time and a.at < b.at + b.size and b.at < a.at + a.size


LIVES = st.lists(
    st.tuples(st.integers(1, 5000), st.integers(0, 20), st.integers(0, 6)).map(lambda t: (t[0], t[1], t[1] + t[2])),
    max_size=25,
)


@given(LIVES)
@settings(max_examples=200, deadline=None)
def test_maps_that_live_at_a_time_lie_apart(lives):
    maps = [memory.Map(*life) for life in lives]
    total = memory.place(maps)
    for i, m in enumerate(maps):
        assert m.at >= 0 and m.at % memory.ALIGNMENT == 0 and m.at + m.size <= total
        assert not any(overlap(m, other) for other in maps[:i])
    at_most = sum(memory._aligned(m.size) for m in maps)
    at_a_time = max((sum(m.size for m in maps if m.first <= i <= m.last) for i in range(30)), default=0)
    assert at_a_time <= total <= at_most and total % memory.ALIGNMENT == 0


def test_a_chain_needs_its_two_largest_neighbours():
    maps = [memory.Map(size, i, i + 1) for i, size in enumerate([640, 320, 320, 192, 64])]
    assert memory.place(maps) == 960


def test_no_maps():
    assert memory.place([]) == 0


# Fusing


def norm(k=16, **how):
    m = nn.BatchNorm2d(k, **how)
    with torch.no_grad():
        for t in (m.weight, m.running_var):
            t.uniform_(0.5, 2)
        for t in (m.bias, m.running_mean):
            t.normal_()
    return m


def steps_of(model, *sizes, usable=is_usable):
    captured = capture(model.eval(), tuple(torch.ones(size) for size in sizes or [(2, 16, 8, 8)]), None)
    return fuse.fuse(captured, usable)


def kinds(model, *sizes):
    return [type(step).__name__ for step in steps_of(model, *sizes)]


def test_a_block_is_two_steps():
    model = Module(
        lambda s, x: F.relu(s.b2(s.c2(F.relu(s.b1(s.c1(x))))) + x), c1=conv(), b1=norm(), c2=conv(), b2=norm()
    )
    first, second = steps_of(model)
    assert (first.name, second.name) == ("c1", "c2") and first.relu and second.relu
    assert second.inputs == [first.output, first.inputs[0]]
    assert [len(first.parts), len(second.parts)] == [3, 4]


def test_folding_is_the_layers_after_the_convolution():
    model = Module(
        lambda s, x: (s.b(s.c(x)) - 2) * s.p / 4 + 1, c=conv(), b=norm(), p=nn.Parameter(torch.rand(16, 1, 1))
    )
    (step,) = steps_of(model)
    weight, bias = fold(model.c.weight, step.affine)
    x = torch.randn(2, 16, 8, 8)
    assert weight.dtype == bias.dtype == torch.float32
    with torch.no_grad():
        ref = copy.deepcopy(model).double()(x.double())
        assert relative_rms(F.conv2d(x, weight, bias, padding=1), ref) < 5e-7


def test_folding_is_exact_in_powers_of_two():
    model = nn.Sequential(conv(bias=False), nn.BatchNorm2d(16, eps=0.125)).eval()
    model[1].running_var.fill_(0.125)
    (step,) = steps_of(model)
    weight, bias = fold(model[0].weight.detach(), step.affine)
    assert torch.equal(weight, 2 * model[0].weight) and not bias.any()


def frozen_norm():
    m = FrozenBatchNorm2d(16)
    m.running_var.uniform_(0.5, 2)
    return m


FUSED = {
    "frozen BatchNorm": (lambda: nn.Sequential(conv(), frozen_norm(), nn.ReLU()), ["Conv"]),
    "scalars": (lambda: Module(lambda s, x: (s.c(x) * 2 + 1).relu_(), c=conv()), ["Conv"]),
    "both sides": (lambda: Module(lambda s, x: F.relu(s.c(x) + s.d(x)), c=conv(), d=conv()), ["Conv", "Conv"]),
    "shared": (lambda: Module(lambda s, x: s.c(s.c(x)), c=conv()), ["Conv", "Conv"]),
    "the sum of one": (lambda: Module(lambda s, x: F.relu(s.c(x) * 2 + x), c=conv()), ["Conv"]),
    "twice the same": (lambda: Module(lambda s, x: (lambda y: y + y)(s.c(x)), c=conv()), ["Conv", "Torch"]),
    "read by two": (lambda: Module(lambda s, x: (lambda y: F.relu(y) * y)(s.c(x)), c=conv()), ["Conv", "Torch", "Torch"]),
    "an output": (lambda: Module(lambda s, x: (lambda y: (y, F.relu(y)))(s.c(x)), c=conv()), ["Conv", "Torch"]),
    "ReLU, then BatchNorm": (lambda: nn.Sequential(conv(), nn.ReLU(), norm()), ["Conv", "Torch"]),
    "ReLU, then a sum": (lambda: Module(lambda s, x: F.relu(s.c(x)) + x, c=conv()), ["Conv", "Torch"]),
    "sum and ReLU alone": (lambda: Module(lambda s, x: F.relu(x + x.sigmoid())), ["Torch", "AddRelu"]),
    "BatchNorm of the batch": (
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(16, track_running_stats=False)),
        ["Conv", "Torch"],
    ),
    "along the width": (lambda: Module(lambda s, x: s.c(x) * s.p, c=conv(), p=nn.Parameter(torch.rand(8))), ["Conv", "Torch"]),
    "a residual of one channel": (
        lambda: Module(lambda s, x: s.c(x) + x[:, :1], c=conv()),
        ["Conv", "Torch", "Torch"],
    ),
    "head": (
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5), nn.ReLU()),
        ["AvgPool", "Conv"],
    ),
    "head of a whole map": (lambda: nn.Sequential(conv(), nn.Flatten(), nn.Linear(16 * 64, 5)), ["Conv", "Conv"]),
    "mean": (lambda: Module(lambda s, x: s.l(x.mean([2, 3])), l=nn.Linear(16, 5)), ["AvgPool", "Conv"]),
    "dropout": (lambda: nn.Sequential(conv(), nn.Dropout(), nn.ReLU()), ["Conv"]),
    "what nobody needs": (lambda: Module(lambda s, x: (s.c(x), s.d(x))[0], c=conv(), d=conv()), ["Conv"]),
    "max-pooling": (lambda: nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2)), ["Conv", "MaxPool"]),
    "dilated max-pooling": (lambda: nn.MaxPool2d(2, dilation=2), ["Torch"]),
    "transposed": (lambda: nn.ConvTranspose2d(16, 16, 2), ["Torch"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_fused(name):
    build, expected = FUSED[name]
    assert kinds(build()) == expected


def test_not_usable_is_torchs():
    model = nn.Sequential(conv(), norm(), nn.ReLU())
    steps = steps_of(model, usable=lambda weight, affine: False)
    assert [type(step).__name__ for step in steps] == ["Torch"] * 3
    assert steps[0].reason == "a folded weight or bias is not finite"
    model[1].running_var[5] = -1
    assert kinds(model) == ["Torch"] * 3


# Capturing


def is_functional(captured):
    targets = [node.target for node in captured.graph.nodes if node.op == "call_function"]
    return not any(isinstance(t, torch._ops.OpOverload) and t._schema.is_mutable for t in targets)


IN_PLACE = {
    "relu": lambda s, x: F.relu(s.c(x), inplace=True),
    "chain": lambda s, x: s.c(x).mul_(2).add_(1).relu_(),
    "sum": lambda s, x: (lambda y: (y.add_(x), y.relu_())[1])(s.c(x)),
    "both names": lambda s, x: (lambda y: (y.relu_(), y)[1])(s.c(x)),
    "value before": lambda s, x: (lambda y: (y * 3, y.relu_()))(s.c(x)),
    "view before": lambda s, x: (lambda y: (y.flatten(1), y.relu_())[0])(s.c(x)),
    "view written": lambda s, x: (lambda y: (y.flatten(1).mul_(2), y)[1])(s.c(x)),
    "slice written": lambda s, x: (lambda y: (y[:, :3].zero_(), y)[1])(s.c(x)),
    "relu, then slice written": lambda s, x: (lambda y: (y.relu_(), y[:, 1:3].add_(1), y)[2])(s.c(x)),
    "input": lambda s, x: (x.mul_(2), s.c(x))[1],
    "copy of the input": lambda s, x: s.c(x.clone().relu_()) + x,
    "out of another": lambda s, x: (lambda y: (y.copy_(x), s.c(y))[1])(torch.empty_like(x)),
    "sum of both": lambda s, x: (lambda y: y.add_(y.relu_()))(s.c(x)),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_graphs_write_nothing(name):
    model = Module(IN_PLACE[name], c=conv()).eval()
    x = torch.randn(2, 16, 8, 8)
    assert is_functional(capture(model, (x,), None))
    before, optimized = x.clone(), optimize_for_inference(model, x)
    out = optimized(x)
    assert torch.equal(x, before), "the input was changed"
    with torch.no_grad():
        ref = model(x.clone())
    pairs = zip(out, ref, strict=True) if isinstance(ref, tuple) else [(out, ref)]
    assert all(relative_rms(o, r) < 2e-6 for o, r in pairs)


def test_constants_are_computed_once_and_in_the_models_precision():
    model = Module(lambda s, x: F.conv2d(x, s.w * s.scale.exp()), w=nn.Parameter(torch.rand(16, 16, 1, 1)))
    model.register_buffer("scale", torch.rand(16, 1, 1, 1))
    captured = capture(model.eval(), (torch.ones(1, 16, 4, 4, dtype=torch.bfloat16),), torch.bfloat16)
    (step,) = fuse.fuse(captured, is_usable)
    weight = captured.constants[step.weight]
    assert weight.dtype == torch.float32 and torch.equal(weight, model.w * model.scale.exp())


def test_names_are_the_modules():
    names = {step.name for step in steps_of(torchvision.models.resnet18(), (1, 3, 64, 64))}
    convs = {n for n, m in torchvision.models.resnet18().named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert convs <= names


# The list of steps


def test_rows():
    row = program.Row("conv_gemm", n=3, relu=1)
    table = program.to_tensor([row, program.Row("max_pool")])
    assert table.dtype == torch.int64 and table.shape == (2, len(program._FIELDS))
    assert [table[0, program._FIELDS[name]] for name in ("n", "relu", "residual")] == [3, 1, -1]
    assert table[0, 0] == program._KINDS["conv_gemm"] != table[1, 0]
    with pytest.raises(KeyError, match="no such fields of a step: \\['colour'\\]"):
        row.update({"colour": 1})
    with pytest.raises(KeyError):
        program.Row("conv_fft")


@pytest.fixture
def segment():
    """Steps, constants and maps of a plan whose only kernel is a 1x1 convolution with a residual."""
    model = Module(lambda s, x, y: F.relu(s.c(x) + y), c=conv(16, 32, 1)).eval()
    inputs = (torch.randn(2, 16, 5, 7), torch.randn(2, 32, 5, 7))
    optimized = optimize_for_inference(model, inputs)
    names = next(iter(optimized._plans.values()))._builder.names
    steps, constants = names["steps0"][:1].clone(), names["constants0"]
    x, y = (t.contiguous(memory_format=torch.channels_last) for t in inputs)
    maps = [x, y, torch.full_like(y, 9.0)]
    for name, value in dict(n=2, input=0, input_at=0, residual=1, residual_at=0, output=2, output_at=0).items():
        steps[0, program._FIELDS[name]] = value
    return steps, constants, maps


def test_segment_runs(segment):
    steps, constants, maps = segment
    seconds = torch.zeros(1, dtype=torch.float64)
    assert program.run_plan(steps, constants, maps, seconds) == -1 and seconds.item() > 0
    assert not (maps[2] == 9).any()


WRONG_FIELDS = {
    "output behind the end": dict(output_at=4),
    "output before the start": dict(output_at=-4),
    "input behind the end": dict(input_at=64),
    "input before the start": dict(input_at=-64),
    "residual behind the end": dict(residual_at=4),
    "more images": dict(n=3),
    "more rows": dict(h=6),
    "more filters": dict(k=33),
    "tensor 3 of 3": dict(output=3),
    "tensor -1": dict(input=-1),
    "constant 100": dict(weight=100),
    "bias -1": dict(bias=-1),
    "type 3": dict(input_type=3),
    "kind 99": dict(kind=99),
    "kind -1": dict(kind=-1),
    "far behind": dict(output_at=2**62),
    "sizes that overflow": dict(n=2**62, h=2**2),
    "negative size": dict(n=-1),
}


@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_steps_that_reach_outside_are_refused(segment, name):
    steps, constants, maps = segment
    for field, value in WRONG_FIELDS[name].items():
        steps[0, program._FIELDS[field]] = value
    with pytest.raises(RuntimeError, match=r"steps (reach|name|must|want)"):
        program.run_plan(steps, constants, maps, None)
    assert (maps[2] == 9).all()


def test_constants_that_are_too_small_are_refused(segment):
    steps, constants, maps = segment
    weight, bias = (steps[0, program._FIELDS[name]].item() for name in ("weight", "bias"))
    for number in (0, weight, bias):  # zeros for the padding, the packed weight, the bias and what is behind it
        small = list(constants)
        small[number] = small[number].flatten()[:8].clone()
        with pytest.raises(RuntimeError):
            program.run_plan(steps, small, maps, None)


def test_tables_of_another_form_are_refused(segment):
    steps, constants, maps = segment
    for wrong in (steps[0], steps[:, :-1].contiguous(), steps.int(), steps.T.contiguous().T[:, ::1].repeat(2, 2)):
        with pytest.raises(RuntimeError, match="steps must be"):
            program.run_plan(wrong, constants, maps, None)
    for seconds in (torch.zeros(2, dtype=torch.float64), torch.zeros(1)):
        with pytest.raises(RuntimeError, match="seconds must be"):
            program.run_plan(steps, constants, maps, seconds)


# Random networks


class RandomNetwork(nn.Module):
    """A graph of operators, each on one or two maps made before; always the same one for a seed."""

    def __init__(self, seed, size):
        super().__init__()
        self.random = random.Random(seed)
        self.convs, self.todo, self.sizes = nn.ModuleList(), [], [tuple(size[1:])]
        for _ in range(self.random.randint(3, 14)):
            recent = self.random.random() < 0.6
            i = len(self.sizes) - 1 if recent else self.random.randrange(len(self.sizes))
            kind = self.random.choice(["conv"] * 6 + ["add"] * 3 + [*UNARY, "cat"])
            getattr(self, f"_{kind}", self._unary)(i, kind)
        some = [self.random.randrange(len(self.sizes)) for _ in range(self.random.choice([0, 0, 1, 2]))]
        self.outputs = sorted({len(self.sizes) - 1, *some} - {0})
        del self.random

    def _append(self, kind, *operands):
        """What makes it, unless a map would vanish."""
        size = OPERATORS[kind](self, *(torch.empty(1, *self.sizes[i]) for i in operands[:2])).shape[1:]
        if 0 < size[1] * size[2] <= 600 and size[0] <= 64:
            self.todo.append((kind, operands))
            self.sizes.append(tuple(size))

    def _unary(self, i, kind):
        c, h, w = self.sizes[i]
        if (kind in ("max_pool", "ceil", "avg_pool") and min(h, w) < 3) or (kind == "slice" and c < 16):
            return
        self._append(kind, i)

    def _pair(self, i, kind, same):
        others = [j for j, size in enumerate(self.sizes) if same(size) == same(self.sizes[i])]
        self._append(kind, i, self.random.choice(others))

    def _add(self, i, kind):
        self._pair(i, kind, lambda size: size)
        if self.random.random() < 0.6:
            self._append("relu", len(self.sizes) - 1)

    def _cat(self, i, kind):
        self._pair(i, kind, lambda size: size[1:])

    def _conv(self, i, kind):
        c, h, w = self.sizes[i]
        r = self.random
        size, stride, dilation, k = (
            r.choice([1, 3, 3, 5]),
            r.choice([1, 1, 1, 2]),
            r.choice([1, 1, 1, 2]),
            r.choice([3, 8, 16, 24]),
        )
        padding, groups = r.choice([size // 2, size // 2, 0]), 1
        if r.random() < 0.3:
            k, groups = c, r.choice([c, c // 4 if c % 4 == 0 else c])
        if dilation * (size - 1) + 1 > min(h, w) + 2 * padding:
            return
        layers = [nn.Conv2d(c, k, size, stride, padding, dilation, groups, bias=r.random() < 0.5)]
        layers += [norm(k)] if r.random() < 0.6 else []
        layers += [nn.ReLU(inplace=r.random() < 0.5)] if r.random() < 0.5 else []
        self.convs.append(nn.Sequential(*layers).eval())
        out = self.convs[-1](torch.empty(1, c, h, w)).shape[1:]
        self.todo.append(("conv", (i, len(self.convs) - 1)))
        self.sizes.append(tuple(out))
        if r.random() < 0.4:
            self._add(len(self.sizes) - 1, "add")

    def forward(self, x):
        maps = [x]
        for kind, (i, *rest) in self.todo:
            if kind == "conv":
                maps.append(self.convs[rest[0]](maps[i]))
            else:
                maps.append(OPERATORS[kind](self, maps[i], *(maps[j] for j in rest)))
        return [maps[i] for i in self.outputs]


OPERATORS = {
    "add": lambda s, x, y: x + y,
    "cat": lambda s, x, y: torch.cat([x, y], 1),
    "relu": lambda s, x: F.relu(x),
    "in_place": lambda s, x: (x + 1).relu_(),
    "sigmoid": lambda s, x: torch.sigmoid(x),
    "scale": lambda s, x: x * 0.75 - 0.5,
    "max_pool": lambda s, x: F.max_pool2d(x, 3, 2, 1),
    "ceil": lambda s, x: F.max_pool2d(x, 2, 2, ceil_mode=True),
    "avg_pool": lambda s, x: F.avg_pool2d(x, 2),
    "mean": lambda s, x: F.adaptive_avg_pool2d(x, 1),
    "gate": lambda s, x: x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1)),
    "upsample": lambda s, x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "slice": lambda s, x: x[:, : x.shape[1] // 2],
}
UNARY = [name for name in OPERATORS if name not in ("add", "cat")]


def random_network(seed):
    """A network and an input for it."""
    r = random.Random(seed)
    size = (r.choice([1, 2, 3]), r.choice([3, 16]), r.choice([7, 12, 17]), r.choice([7, 12, 16]))
    torch.manual_seed(seed)
    return RandomNetwork(seed, size).eval(), torch.randn(size)


@torch.no_grad()
def assert_random_network_is_right(seed, dtype):
    model, x = random_network(seed)
    if not model.outputs:
        return
    exact = copy.deepcopy(model).double()(x.double())
    cast = copy.deepcopy(model).to(dtype)
    stock = (
        cast(x.to(dtype)),
        cast.to(memory_format=torch.channels_last)(x.to(dtype, memory_format=torch.channels_last)),
    )
    optimized = optimize_for_inference(model, torch.randn(x.shape), dtype)
    out = optimized(x)
    kept = [o.clone() for o in out]
    optimized(torch.randn(x.shape))  # which overwrites nothing
    for o, k, e, *theirs in zip(out, kept, exact, *stock, strict=True):
        assert torch.equal(o, k) and o.shape == e.shape and o.dtype == dtype
        if e.isfinite().all() and e.any():
            # Winograd's algorithm rounds more than torch does; see checks.LOOSE. In 16 bits small maps have few
            # values, so that their errors scatter.
            least = 1e-5 if dtype == torch.float32 else 3 * UNIT_ROUNDOFF[dtype]
            bound = max(6 * max(relative_rms(t, e) for t in theirs), least)
            assert relative_rms(o, e) <= bound, f"seed {seed}, {dtype}: {relative_rms(o, e):.3g} above {bound:.3g}"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("start", (0, 150, 230, 530, 600, 720))
def test_random_networks(start, dtype):
    for seed in range(start, start + 10):
        assert_random_network_is_right(seed, dtype)


# Every level of instructions


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_resnet18_here(dtype):
    images = torch.randn(4, 3, 64, 64)
    model = random_model(torchvision.models.resnet18, images)
    x = images[:2, :, :48]
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        stock = copy.deepcopy(model).to(dtype)(x.to(dtype))
    assert exact.isfinite().all() and exact.std() > 0
    error = relative_rms(optimize_for_inference(model, x, dtype)(x), exact)
    assert error <= max(2 * relative_rms(stock, exact) + UNIT_ROUNDOFF[dtype], 5e-6)


@pytest.mark.parametrize("seeds", (range(200, 206), range(206, 212)))
def test_more_random_networks_here(seeds):
    for seed in seeds:
        assert_random_network_is_right(seed, torch.float32)
        assert_random_network_is_right(seed, torch.bfloat16)


@pytest.mark.parametrize("channels", (17, 24, 40))
@pytest.mark.parametrize("groups", ("depthwise", "4 channels", "none"))
def test_residual_in_place_here(channels, groups):
    """The sum overwrites its residual: no kernel may read it twice."""

    def forward(self, x):
        y = F.relu(self.b(x))
        return F.relu(self.c(self.a(x)) + y) + 1.5

    groups = {"depthwise": channels, "4 channels": channels // 4 if channels % 4 == 0 else 1, "none": 1}[groups]
    parts = dict(a=conv(16, channels, 1), b=conv(16, channels, 1), c=conv(channels, channels, groups=groups))
    model, x = Module(forward, **parts).eval(), torch.randn(2, 16, 9, 7)
    optimized = optimize_for_inference(model, x)
    with torch.no_grad():
        assert relative_rms(optimized(x), copy.deepcopy(model).double()(x.double())) < 5e-6


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("batch", (2, 3, 5, 8))
def test_some_images_at_a_time(batch, dtype, monkeypatch):
    """The first steps, two images at a time, make the same bits; what later ones read is there for the whole batch."""
    model, x = random_model(torchvision.models.resnet18, torch.randn(4, 3, 64, 64)), torch.randn(batch, 3, 64, 64)
    expected = optimize_for_inference(model, x, dtype)(x)
    in_16_bit = dtype == torch.bfloat16 and (multiplies_bfloat16() or onednn_runs(dtype))  # else some map is widened
    image_bytes = 64 * 16 * 16 * (2 if in_16_bit else 4)
    monkeypatch.setattr(plan, "_MAP_BYTES", 2 * image_bytes // torch.get_num_threads())
    optimized = optimize_for_inference(model, x, dtype)
    first, last, images = next(iter(optimized._plans.values()))._builder.prefix
    assert first == 0 and images == 2 and (last >= 7 or batch == 2)
    assert torch.equal(optimized(x), expected)


@pytest.mark.parametrize("level", OTHER_LEVELS)
def test_every_other_level(level):
    assert_passes_at_level(__file__, level, "here")
