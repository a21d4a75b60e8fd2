"""optimize_for_inference: whole models and small ones against themselves in float64."""

import copy
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
import torchvision
from checks import LAYOUTS, LOOSE, RESNET, assert_like_torch, assert_same_special_values, stock_results, tensors
from networks import OTHER, SMALL, Module, conv, conv_bn_relu, feature_extractor, images, resnet
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torchvision.models import segmentation
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from resnet_fast import models, optimize_for_inference
from resnet_fast.backends import cpu_level
from resnet_fast.measure import calibrate, random_model, relative_rms

RESNETS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip
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
    "feature extractor": (feature_extractor, 0.99),
}


def vgg():
    """With a head of one layer, as its own is 120 million random numbers."""
    model = calibrated(torchvision.models.vgg11_bn, init_weights=False)
    model.classifier = nn.Linear(512 * 7 * 7, 10)
    return model.eval()


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


def stem(c=3):
    return nn.Sequential(conv(c, 16, 7, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))


# First layers that Winograd's algorithm takes from images of 112x112 on.
STEMS = {
    "pooled": lambda: nn.Sequential(stem(), nn.MaxPool2d(3, 2, 1), conv()),
    "alone": lambda: nn.Sequential(stem(), conv()),
    "no ReLU before the pooling": lambda: nn.Sequential(conv(3, 16, 7, stride=2), nn.MaxPool2d(2), nn.ReLU()),
    "read before the pooling too": lambda: Module(lambda s, x: (y := s.a(x), F.max_pool2d(y, 3, 2, 1)), a=stem()),
    "after others": lambda: nn.Sequential(conv(3, 2, 3), nn.ReLU(), stem(2), nn.MaxPool2d(2)),
}


@pytest.mark.parametrize("name", STEMS)
def test_stem_by_winograd(name):
    model = calibrate(STEMS[name](), images(4, 3, 64, 64))
    x, other = images(1, 3, 112, 114), images(3, 3, 115, 121)
    optimized = optimize_for_inference(model, x)
    assert any("2x2 phases" in layer.kernel for layer in optimized.explain(rounds=1).layers)
    for size in (x, other):
        assert_like_torch(model, optimized, size, **LOOSE)
    assert_like_torch(model, optimized, LAYOUTS["channels_last"](other), **LOOSE, same_strides=False)
    lean = optimize_for_inference(model, x, weight_memory=0)
    assert not any("2x2 phases" in layer.kernel for layer in lean.explain(rounds=1).layers)
    assert_like_torch(model, lean, x, **LOOSE)
    bad = other.clone()
    bad[2, 1, 60, 57] = float("nan")
    with torch.no_grad():
        pairs = zip(tensors(optimized(bad)), tensors(model(bad)), strict=True)
    for out, ref in pairs:
        assert_same_special_values(out, ref)


@torch.no_grad()
@pytest.mark.parametrize("name", ("resnet18", "resnet50", "resnet101"))
def test_logits_in_float32(name):
    """What the first layer errs goes through all others: Winograd's algorithm must not add more than torch errs."""
    model, x = random_model(getattr(torchvision.models, name), images(4, 3, 224, 224)), images(2, 3, 224, 224)
    exact = copy.deepcopy(model).double()(x.double())
    stock = relative_rms(model.to(memory_format=torch.channels_last)(x), exact)
    assert relative_rms(optimize_for_inference(model, x)(x), exact) <= min(2 * stock, 5e-6)


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
