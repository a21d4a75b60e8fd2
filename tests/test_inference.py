"""optimize_for_inference: whole models against themselves in float64, and what an optimized model does and refuses."""

import copy
import io
import json
import pickle
import resource
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
import torch.nn.functional as F
import torchvision
from checks import UNIT_ROUNDOFF, assert_same_special_values
from networks import Module, conv
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import feature_extraction, segmentation
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from resnet_fast import models, optimize_for_inference
from resnet_fast.backends import cpu_level
from resnet_fast.inference import model as inference_model
from resnet_fast.measure import calibrate, random_model, relative_rms

RESNETS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip
SMALL, OTHER = (1, 3, 64, 64), (3, 3, 96, 80)  # the example's size, and one with another batch and image


def images(*size):
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


@cache
def resnet18():
    return random_model(torchvision.models.resnet18, images(4, 3, 64, 64))


def resnet(build=None):
    return random_model(build, images(4, 3, 64, 64)) if build else copy.deepcopy(resnet18())


def conv_bn_relu(c=16, k=16, size=3, **how):
    return nn.Sequential(conv(c, k, size, bias=False, **how), nn.BatchNorm2d(k), nn.ReLU(inplace=True))


def tiny():
    """Every kind of kernel but grouped and depthwise ones, in 5 layers."""
    stem = nn.Sequential(conv(3, 16, 7, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    net = nn.Sequential(stem, conv_bn_relu(16, 32), conv_bn_relu(32, 32), conv(32, 32, 1), head)
    return calibrate(net, images(4, 3, 64, 64))


def tensors(outputs):
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


@torch.no_grad()
def stock_results(model, inputs, dtype=None):
    """What torch makes of it: float64, and (in dtype) contiguous and channels_last."""
    model(*(x.clone() for x in inputs))  # without gradients, so that what a weight is computed from can be copied
    exact = copy.deepcopy(model).eval().double()(*(x.double() for x in inputs))
    cast = copy.deepcopy(model).eval().to(dtype or torch.float32) if dtype else model
    inputs = [x.to(dtype or x.dtype) for x in inputs]
    plain = cast(*(x.clone() for x in inputs))
    last = copy.deepcopy(cast).eval().to(memory_format=torch.channels_last)
    layout = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs]
    return exact, plain, last(*(x.clone() for x in layout))


def strides(t):
    """Where they mean something."""
    return [s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1]


def assert_like_torch(model, optimized, *inputs, dtype=None, times=2.0, least=0.0, same_strides=True):
    """Containers, dtypes, sizes and strides are the original's; the error is at most ``times`` that of torch plus one
    rounding, or ``least``."""
    exact, plain, last = stock_results(model, inputs, dtype)
    before = [x.clone() for x in inputs]
    out = optimized(*inputs)
    assert all(torch.equal(x, b) for x, b in zip(inputs, before, strict=True)), "an input was changed"
    assert pytree.tree_structure(out) == pytree.tree_structure(plain)
    for o, p, c, e in zip(*map(tensors, (out, plain, last, exact)), strict=True):
        assert (o.dtype, o.shape) == (p.dtype, p.shape)
        assert strides(o) == strides(p) or not same_strides
        assert e.isfinite().all() and (e.numel() < 2 or e.std() > 0), "such a reference proves nothing"
        bound = max(times * max(relative_rms(p, e), relative_rms(c, e)) + UNIT_ROUNDOFF[o.dtype], least)
        error = relative_rms(o, e)
        assert error <= bound, f"relative error {error:.3g} above {bound:.3g}"
    return out


# In float32 some layers run on Winograd's algorithm, which rounds more than a direct convolution does: at most 5e-6 in
# a ResNet's logits is what the package promises (RESNET); networks that amplify rounding in every layer, as random ones
# without weak branches do, get by with a few times torch's own error (LOOSE).
RESNET, LOOSE = dict(least=5e-6), dict(times=6.0, least=1e-5)


# Families


def timm_model(name):
    import timm

    return resnet(lambda weights: timm.create_model(name))


def calibrated(build, **how):
    return calibrate(build(weights=None, **how), images(4, 3, 64, 64))


# How each is made, and the least share of its convolutions' operations that our kernels must compute with AVX-512.
FAMILIES = {
    "timm resnet50": (lambda: timm_model("resnet50"), 0.99),
    "timm resnet50d": (lambda: timm_model("resnet50d"), 0.99),
    "timm seresnet50": (lambda: timm_model("seresnet50"), 0.99),
    "densenet121": (lambda: calibrated(torchvision.models.densenet121), 0.99),
    "mobilenet_v2": (lambda: calibrated(torchvision.models.mobilenet_v2), 0.97),
    "mobilenet_v3_small": (lambda: calibrated(torchvision.models.mobilenet_v3_small), 0.88),  # 5x5 depthwise: oneDNN
    "vgg11_bn": (lambda: vgg(), 0.99),
    "googlenet": (
        lambda: calibrated(torchvision.models.googlenet, init_weights=False, aux_logits=False),
        0.99,
    ),
    "regnet_y_400mf": (lambda: calibrated(torchvision.models.regnet_y_400mf), 0.98),
    "resnet18 with a pyramid": (
        lambda: resnet_fpn_backbone(backbone_name="resnet18", weights=None).eval(),  # FrozenBatchNorm2d
        0.99,
    ),
    "fcn_resnet50": (
        lambda: calibrated(segmentation.fcn_resnet50, weights_backbone=None, aux_loss=True),
        0.99,
    ),
    "deeplabv3_resnet50": (lambda: calibrated(segmentation.deeplabv3_resnet50, weights_backbone=None), 0.99),
    "feature extractor": (lambda: feature_extractor(), 0.99),
}


def vgg():
    """With a head of one layer, as its own is 120 million random numbers."""
    model = calibrated(torchvision.models.vgg11_bn, init_weights=False)
    model.classifier = nn.Linear(512 * 7 * 7, 10)
    return model.eval()


def feature_extractor():
    nodes = {"layer2": "a", "layer4.1.relu_1": "b", "fc": "c"}
    return feature_extraction.create_feature_extractor(resnet(), nodes).eval()


@pytest.mark.parametrize("name", RESNETS)
def test_resnets(name):
    model = resnet(getattr(torchvision.models, name))
    is_large = "101" in name or "152" in name
    example, other = ((1, 3, 32, 32), (2, 3, 64, 48)) if is_large else (SMALL, OTHER)
    optimized = optimize_for_inference(model, images(*example))
    for size in (other,) if is_large else (example, other):
        assert_like_torch(model, optimized, images(*size), **RESNET)
    if "resnext" not in name or cpu_level().startswith("avx512"):  # oneDNN has the groups of less
        assert optimized.explain(rounds=1).own_share >= 0.95


@pytest.mark.parametrize("name", ("resnet18", "resnet50"))
def test_resnets_of_this_package(name):
    model = resnet(getattr(models, name))
    optimized = optimize_for_inference(model, images(*SMALL))
    for size in (SMALL, OTHER):
        assert_like_torch(model, optimized, images(*size), **RESNET)
    assert optimized.explain(rounds=1).own_share >= 0.95


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    build, least_share = FAMILIES[name]
    model = build()
    optimized = optimize_for_inference(model, images(*SMALL))
    for size in (SMALL, OTHER):
        assert_like_torch(model, optimized, images(*size), **LOOSE)
    if cpu_level().startswith("avx512"):
        assert optimized.explain(rounds=1).own_share >= least_share


def test_batch_and_image_size_other_than_the_examples():
    model = resnet()
    optimized = optimize_for_inference(model, images(1, 3, 224, 224))
    for size in ((4, 3, 160, 160), (1, 3, 224, 224)):
        assert_like_torch(model, optimized, images(*size), **RESNET)


Pair = namedtuple("Pair", "left right")


def everything(self, x):
    """What people write in a forward()."""
    y = F.relu(self.shared(self.stem(x)), inplace=True)
    y = self.shared(y) + y
    y = F.relu(F.conv2d(y, self.weight, padding=1), inplace=True) * 0.5 + 0.25
    y = F.max_pool2d(y, 3, 2, 1, ceil_mode=True)
    z = self.shared(y) * 2 + 1
    z = z + z
    z = F.avg_pool2d(F.relu(z), 3, 2, 1, ceil_mode=True)
    w = self.small(z)
    w += z
    w = torch.cat([w, torch.sigmoid(self.small(w))], 1)
    pooled = F.adaptive_avg_pool2d(w, 1)
    return {"maps": [y, (z, w.relu_())], "pair": Pair(self.linear(pooled.flatten(1)), None), "number": 3}


def test_users_own_module():
    parts = dict(stem=conv_bn_relu(3, 16), shared=conv(), weight=nn.Parameter(torch.randn(16, 16, 3, 3) / 12))
    model = Module(everything, **parts, small=conv(size=1), linear=nn.Linear(32, 5))
    model = calibrate(model, images(4, 3, 33, 35))
    optimized = optimize_for_inference(model, images(1, 3, 33, 35))
    for size in ((1, 3, 33, 35), (3, 3, 40, 32)):
        out = assert_like_torch(model, optimized, images(*size), **LOOSE)
    assert isinstance(out["pair"], Pair) and out["pair"].right is None and out["number"] == 3


def prune_weight(module):
    return prune.l1_unstructured(module, "weight", 0.5)


def attention(self, x):
    tokens = self.c(x).flatten(2).mT.contiguous()
    return self.a(tokens, tokens, tokens)[0]


BLOCKS = {
    "input is the residual": lambda: Module(lambda s, x: F.relu(s.c(x) + x), c=conv()),
    "input is the residual of two": lambda: Module(lambda s, x: F.relu(s.d(F.relu(s.c(x))) + x), c=conv(), d=conv()),
    "sum of one": lambda: Module(lambda s, x: (lambda y: F.relu(y + y))(s.c(x)), c=conv()),
    "both sides convolutions": lambda: Module(lambda s, x: F.relu(s.c(x) + s.d(x)), c=conv(), d=conv()),
    "residual of one channel": lambda: Module(lambda s, x: F.relu(s.c(x) + s.d(x)), c=conv(), d=conv(16, 1)),
    "subtracted from": lambda: Module(lambda s, x: F.relu(1 - s.c(x)), c=conv()),
    "divided": lambda: Module(lambda s, x: (s.c(x) - 1) / 3, c=conv()),
    "scaled by a parameter": lambda: Module(
        lambda s, x: F.relu(s.c(x) * s.p + s.p), c=conv(), p=nn.Parameter(torch.rand(16, 1, 1))
    ),
    "scaled along the width": lambda: Module(lambda s, x: s.c(x) * s.p, c=conv(), p=nn.Parameter(torch.rand(12))),
    "BatchNorm first": lambda: nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), conv()),
    "BatchNorm without statistics": lambda: nn.Sequential(conv(), nn.BatchNorm2d(16, track_running_stats=False)),
    "BatchNorm without affine": lambda: nn.Sequential(conv(), nn.BatchNorm2d(16, affine=False), nn.ReLU()),
    "GroupNorm": lambda: nn.Sequential(conv(), nn.GroupNorm(4, 16), nn.ReLU(), conv()),
    "padding of one side": lambda: nn.Conv2d(16, 16, (3, 4), padding="same"),
    "circular padding": lambda: nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"),
    "transposed convolution": lambda: nn.Sequential(nn.ConvTranspose2d(16, 16, 2, 2), nn.ReLU(), conv()),
    "pixel shuffle": lambda: nn.Sequential(conv(), nn.PixelShuffle(2), conv(4, 16)),
    "dropout": lambda: nn.Sequential(conv(), nn.Dropout2d(), nn.ReLU(), nn.Dropout(), conv()),
    "few channels after others": lambda: nn.Sequential(conv(16, 3), nn.ReLU(), nn.MaxPool2d(2), conv(3, 16), conv()),
    "few channels at the end": lambda: nn.Sequential(conv(), nn.MaxPool2d(2), conv(16, 3)),
    "relu first": lambda: nn.Sequential(nn.ReLU(inplace=True), conv()),
    "pruned": lambda: nn.Sequential(prune_weight(conv()), nn.ReLU()),
    "weight_norm": lambda: nn.Sequential(weight_norm(conv()), nn.ReLU()),
    "parametrized": lambda: nn.Sequential(parametrizations.weight_norm(conv()), nn.ReLU()),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(conv()), nn.ReLU()),
    "attention": lambda: Module(attention, c=conv(), a=nn.MultiheadAttention(16, 4, batch_first=True)),
    "gate": lambda: Module(lambda s, x: x * torch.sigmoid(s.c(F.adaptive_avg_pool2d(x, 1))), c=conv(size=1)),
    "pooled and one dimension more": lambda: Module(
        lambda s, x: torch.sigmoid(F.adaptive_avg_pool2d(s.c(x), 1).unsqueeze(-1)), c=conv()
    ),
    "pooled and one dimension less": lambda: Module(
        lambda s, x: torch.sigmoid(F.adaptive_avg_pool2d(s.c(x), 1).squeeze(-1)), c=conv()
    ),
    "two sizes at a time": lambda: Module(lambda s, x: [s.c(x), s.c(x[:, :, ::2]), s.c(x[:1])], c=conv()),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name):
    model = BLOCKS[name]()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d) and m.track_running_stats:
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2)
    model.eval()
    optimized = optimize_for_inference(model, images(1, 16, 10, 12))
    for size in ((1, 16, 10, 12), (3, 16, 16, 12)):
        # torch's fused attention, which no export follows, has strides of its own
        assert_like_torch(model, optimized, images(*size), **LOOSE, same_strides=name != "attention")


DEPTHWISE_AND_GROUPS = [(24, 24), (17, 17), (40, 40), (24, 6), (40, 10), (17, 1), (40, 1)]


@pytest.mark.parametrize(("filters", "groups"), DEPTHWISE_AND_GROUPS)
def test_residual_that_the_sum_overwrites(filters, groups):
    """Where the last vector of channels overlaps the one before, the sum must not be read as the residual."""

    def forward(self, x):
        y = F.relu(self.b(x))
        return F.relu(self.grouped(self.a(x)) + y) * 1.5

    parts = dict(a=conv(16, filters, 1), b=conv(16, filters, 1), grouped=conv(filters, filters, groups=groups))
    model = Module(forward, **parts).eval()
    for size in ((1, 16, 5, 7), (3, 16, 13, 9)):
        assert_like_torch(model, optimize_for_inference(model, images(*size)), images(*size), **LOOSE)


OUTPUTS = {
    "permuted": lambda s, x: s.c(x).permute(0, 2, 3, 1),
    "transposed": lambda s, x: s.c(x).flatten(2).transpose(1, 2),
    "in channels_last": lambda s, x: s.c(x).contiguous(memory_format=torch.channels_last),
    "before and after ReLU": lambda s, x: (lambda y: (y, F.relu(y)))(s.c(x)),
    "one pixel": lambda s, x: F.adaptive_avg_pool2d(s.c(x), 1),
    "pooled and flattened": lambda s, x: (lambda y: (y, y.flatten(1)))(F.adaptive_avg_pool2d(s.c(x), 1)),
    "flattened and pooled": lambda s, x: (lambda y: (y.flatten(1), y))(F.adaptive_avg_pool2d(s.c(x), 1)),
    "a parameter": lambda s, x: (s.c(x), s.c.weight),
    "written in place": lambda s, x: (lambda y: (y, F.relu(y, inplace=True)))(s.c(x)),
    "written through a view": lambda s, x: (lambda y: (y.flatten(1), y.relu_())[0])(s.c(x)),
    "nothing of it": lambda s, x: (s.c(x), x * 2, None, 1.5),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(name):
    model = Module(OUTPUTS[name], c=conv()).eval()
    optimized = optimize_for_inference(model, images(1, 16, 8, 9))
    for size in ((1, 16, 8, 9), (3, 16, 10, 9)):
        assert_like_torch(model, optimized, images(*size), **LOOSE)


@pytest.mark.parametrize("name", ("sliced", "expanded", "transposed", "permuted"))
@pytest.mark.parametrize("first", (conv(3, 16), nn.MaxPool2d(2)), ids=("conv", "pool"))
def test_strides_of_inputs(name, first):
    model = nn.Sequential(copy.deepcopy(first), conv(16 if name and isinstance(first, nn.Conv2d) else 3, 16)).eval()
    optimized = optimize_for_inference(model, images(2, 3, 16, 16))
    x = {
        "sliced": images(2, 6, 16, 32)[:, ::2, :, ::2],
        "expanded": images(2, 1, 16, 16).expand(2, 3, 16, 16),
        "transposed": images(2, 3, 16, 16).transpose(2, 3),
        "permuted": images(2, 16, 16, 3).permute(0, 3, 1, 2),
    }[name]
    with torch.no_grad():
        assert relative_rms(optimized(x), model.double()(x.double())) < 2e-6


def test_channels_last_model():
    model = resnet().to(memory_format=torch.channels_last)
    body = Module(lambda s, x: s.m.layer1(s.m.maxpool(s.m.relu(s.m.bn1(s.m.conv1(x))))), m=model).eval()
    x = images(2, 3, 48, 40).to(memory_format=torch.channels_last)
    assert optimize_for_inference(body, x)(x).is_contiguous(memory_format=torch.channels_last)
    assert_like_torch(body, optimize_for_inference(body, x), x, **RESNET)


def test_several_inputs():
    model = Module(lambda s, x, y: F.relu(s.c(x) + y), c=conv(3, 16)).eval()
    optimized = optimize_for_inference(model, (images(1, 3, 8, 8), images(1, 16, 8, 8)))
    for n, h in ((1, 8), (3, 9)):
        assert_like_torch(model, optimized, images(n, 3, h, 8), images(n, 16, h, 8), **LOOSE)


# Precision


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", ("resnet18", "resnet50", "mobilenet_v2", "feature extractor"))
def test_16_bits(name, dtype):
    model = FAMILIES[name][0]() if name in FAMILIES else resnet(getattr(torchvision.models, name))
    optimized = optimize_for_inference(model, images(*SMALL), dtype=dtype)
    x = images(2, 3, 64, 48)
    out = assert_like_torch(model, optimized, x, dtype=dtype)
    again = optimized(x.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(tensors(out), tensors(again), strict=True))


def test_model_that_is_in_16_bits_already():
    model = resnet()
    ref = optimize_for_inference(model, images(*SMALL), dtype=torch.bfloat16)(images(*SMALL))
    cast = copy.deepcopy(model).bfloat16()
    out = optimize_for_inference(cast, images(*SMALL).bfloat16())(images(*SMALL).bfloat16())
    assert out.dtype == torch.bfloat16 and relative_rms(out, ref) < 0.02


def test_batch_norm_is_folded_in_float32():
    model, x = resnet(), images(4, 3, 64, 64)
    exact, plain, _ = stock_results(model, [x], torch.bfloat16)
    out = optimize_for_inference(model, x, dtype=torch.bfloat16)(x)
    assert exact.isfinite().all() and exact.std() > 0
    assert relative_rms(out, exact) <= 1.1 * relative_rms(plain, exact)


def test_integers_bit_for_bit():
    """Without Winograd's algorithm and with sums below 2^24, every order of summation gives the same."""
    layers = [
        conv(3, 16, 7, stride=2), nn.BatchNorm2d(16, eps=0.5), nn.ReLU(), nn.MaxPool2d(3, 2, 1), conv(16, 32, 1),
        nn.BatchNorm2d(32, eps=0.5), conv(32, 32, groups=32), nn.ReLU(), conv(32, 32, groups=8), conv(32, 16, stride=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(16 * 4 * 4, 7),
    ]  # fmt: skip
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-1, 2, p.shape))
        for norm in (model[1], model[5]):
            norm.running_var.fill_(0.5)  # and eps: exactly 1
    x = torch.randint(-2, 3, (3, 3, 32, 32)).float()
    ref = copy.deepcopy(model).double()(x.double()).detach()
    assert 0 < ref.abs().max() < 2**24 and ref.std() > 0
    assert torch.equal(optimize_for_inference(model, x)(x).double(), ref)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_special_values(value):
    model = feature_extractor()
    optimized = optimize_for_inference(model, images(2, 3, 64, 64))
    good = images(2, 3, 64, 64)
    expected = {name: t.clone() for name, t in optimized(good).items()}
    bad = good.clone()
    bad[1, 1, 30, 20] = value
    with torch.no_grad():
        ref = model(bad)
    assert not ref["c"][1].isfinite().all() and ref["c"][0].isfinite().all()
    out = optimized(bad)
    for name in ref:
        assert_same_special_values(out[name], ref[name])
        assert relative_rms(out[name][0], ref[name][0]) < 1e-5
    assert all(torch.equal(t, expected[name]) for name, t in optimized(good).items())


def test_folded_weights_that_are_not_finite():
    model = nn.Sequential(conv_bn_relu(3, 16), conv()).eval()
    model[0][1].eps = 0.5
    model[0][1].running_var[3] = -0.5
    x = images(2, 3, 12, 12)
    with torch.no_grad():
        ref = model(x)
    assert not ref.isfinite().all()
    assert_same_special_values(optimize_for_inference(model, x)(x), ref)


def test_float64_is_torchs():
    model = resnet().double()
    optimized = optimize_for_inference(model, images(*SMALL).double())
    x = images(*OTHER).double()
    with torch.no_grad():
        assert torch.equal(optimized(x), model(x))
    assert optimized.explain(rounds=1).own_share == 0


@pytest.mark.parametrize("dtype", (None, torch.bfloat16))
def test_batch_0(dtype):
    model = resnet()
    out = optimize_for_inference(model, images(*SMALL), dtype=dtype)(torch.empty(0, 3, 64, 64))
    assert out.shape == (0, 1000) and out.dtype == (dtype or torch.float32)


def test_threads_change_no_bit():
    optimized = optimize_for_inference(resnet(), images(*SMALL))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(optimized(images(*OTHER)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results)


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


def test_timm_model_with_hooks_and_pruned_weights():
    import timm

    model = random_model(lambda weights: timm.create_model("resnet18"), images(4, 3, 64, 64))
    model.layer1.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5,))
    prune.l1_unstructured(model.layer2[0].conv1, "weight", 0.3)
    with torch.no_grad():
        model(images(*SMALL))  # a pruned weight without a graph behind it, as after any call in no_grad
    optimized = optimize_for_inference(model, images(*SMALL))
    x = images(2, 3, 64, 48)
    with torch.no_grad():
        ref = model(x)
    assert ref.isfinite().all() and ref.std() > 0
    assert relative_rms(optimized(x), ref) < 1e-5
