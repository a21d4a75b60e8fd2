"""conv2d and batch_norm_relu_conv on the CPU: results and gradients, whichever kernel computes them."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from checks import LAYOUTS, OTHER_LEVELS, UNIT_ROUNDOFF, assert_passes_at_level
from torch._subclasses.fake_tensor import FakeTensorMode
from winograd import winograd, winograd_weight_gradient

import resnet_fast
from resnet_fast import ops
from resnet_fast.choose import choose_conv_on_cpu, choose_weight_gradient_on_cpu
from resnet_fast.measure import relative_rms

ops_ = torch.ops.resnet_fast
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# input [N, C, H, W], filters, kernel, stride, padding, dilation, groups
SHAPES = {
    "3x3": ((2, 32, 28, 28), 48, 3, 1, 1, 1, 1),
    "3x3 odd": ((2, 33, 27, 26), 70, 3, 1, 1, 1, 1),
    "3x3 on few pixels": ((3, 33, 9, 7), 70, 3, 1, 1, 1, 1),
    "3x3 without padding": ((2, 20, 9, 10), 17, 3, 1, 0, 1, 1),
    "3x3 padded twice": ((1, 18, 6, 5), 16, 3, 1, 2, 1, 1),
    "3x3 on one pixel": ((4, 32, 1, 1), 32, 3, 1, 1, 1, 1),
    "3x3 dilated": ((2, 24, 9, 9), 24, 3, 1, 2, 2, 1),
    "3x3 stride 2": ((2, 32, 14, 14), 48, 3, 2, 1, 1, 1),
    "3x3 stride 2 odd": ((2, 33, 13, 15), 17, 3, 2, 1, 1, 1),
    "1x1": ((2, 64, 7, 7), 130, 1, 1, 0, 1, 1),
    "1x1 padded": ((2, 32, 5, 5), 32, 1, 1, 1, 1, 1),
    "1x1 stride 2": ((2, 64, 14, 14), 70, 1, 2, 0, 1, 1),
    "1x1 stride 2 odd": ((2, 32, 7, 9), 32, 1, 2, 0, 1, 1),
    "groups": ((2, 32, 8, 8), 32, 3, 1, 1, 1, 8),
    "depthwise": ((2, 32, 8, 8), 32, 3, 1, 1, 1, 32),
    "few channels": ((2, 3, 32, 32), 16, 3, 1, 1, 1, 1),
    "stem": ((2, 3, 120, 120), 32, 7, 2, 3, 1, 1),
    "few filters": ((2, 40, 6, 6), 5, 3, 1, 1, 1, 1),
    "5x5": ((2, 16, 9, 9), 16, 5, 1, 2, 1, 1),
    "uneven": ((2, 16, 9, 12), 16, (3, 1), (2, 1), (1, 0), 1, 1),
}
# Where Winograd's algorithm may compute a map or a gradient, of whose error see assert_gradients.
WINOGRAD = {
    name for name, (_, _, kernel, stride, _, dilation, _) in SHAPES.items() if (kernel, stride, dilation) == (3, 1, 1)
}
WINOGRAD |= {"stem"}


def make(name, dtype=torch.float32, bias=True, normalised=False):
    """Tensors by name, and the geometry."""
    size, filters, kernel, stride, padding, dilation, groups = SHAPES[name]
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    x = (torch.randn(size) * 2 + 1).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(filters, size[1] // groups, *kernel) / math.sqrt(size[1] // groups * kernel[0] * kernel[1])
    tensors = {"input": x, "weight": weight.to(dtype), "bias": torch.randn(filters).to(dtype) if bias else None}
    if normalised:
        tensors |= {"bn_weight": torch.rand(size[1]) + 0.5, "bn_bias": torch.randn(size[1])}
    return {n: t for n, t in tensors.items() if t is not None}, (stride, padding, dilation, groups)


def call(t, geometry, reference):
    conv = t["weight"], t.get("bias"), *geometry
    if "bn_weight" in t:
        affine = t["bn_weight"], t["bn_bias"]
        if reference:
            return ops.batch_norm_relu_conv_ref(t["input"], *affine, *conv)
        with torch.no_grad():
            statistics = ops.batch_norm_statistics(t["input"])
        return ops.batch_norm_relu_conv(t["input"], *statistics, *affine, *conv)
    return (ops.conv2d_ref if reference else ops.conv2d)(t["input"], *conv)


def run(tensors, geometry, grad, reference, dtype=None):
    leaves = {
        n: t.clone(memory_format=torch.preserve_format).to(dtype or t.dtype).requires_grad_()
        for n, t in tensors.items()
    }
    out = call(leaves, geometry, reference)
    out.backward(grad.to(out.dtype))
    return {"out": out.detach(), **{n: t.grad for n, t in leaves.items()}}


def assert_right(name, tensors, geometry):
    """As near to float64 as twice torch's in either layout, plus one rounding; by Winograd's algorithm, within the
    error that it may have. Gradients through batch statistics: a few roundings of what is taken away from them."""
    dtype = tensors["input"].dtype
    grad = torch.randn_like(call(tensors, geometry, True))
    before = {n: t.clone() for n, t in tensors.items()}
    exact, ours = (
        run(tensors, geometry, grad, reference, d) for reference, d in ((True, torch.float64), (False, None))
    )
    plain = tensors | {"input": tensors["input"].contiguous()}
    stock = [run(t, geometry, grad, True) for t in (tensors, plain)]
    assert all(torch.equal(t, before[n]) for n, t in tensors.items()), "an argument was changed"
    assert ours["out"].is_contiguous(memory_format=torch.channels_last)
    least = (5e-6 if name in WINOGRAD else 4e-7) + 4 * UNIT_ROUNDOFF[dtype] * ("bn_weight" in tensors)
    for n, out in ours.items():
        assert out.dtype == tensors.get(n, tensors["input"]).dtype and out.shape == exact[n].shape
        assert n == "out" or out.stride() == tensors[n].stride() or n == "input"
        assert exact[n].isfinite().all() and exact[n].abs().max() > 0
        bound = max(2 * max(relative_rms(s[n], exact[n]) for s in stock) + UNIT_ROUNDOFF[dtype], least)
        error = relative_rms(out, exact[n])
        assert error <= bound, f"{n}: relative error {error:.3g} above {bound:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_conv2d(name, dtype):
    assert_right(name, *make(name, dtype, bias=dtype == torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [n for n in SHAPES if n not in ("stem", "3x3 on one pixel")])
def test_kernels_batch_norm_relu_conv(name, dtype):
    assert_right(name, *make(name, dtype, bias=dtype == torch.float32, normalised=True))


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("name", ("3x3", "1x1", "3x3 stride 2", "groups"))
def test_kernels_layouts_of_the_weight(name, channels_last):
    tensors, geometry = make(name, normalised=True)
    if channels_last:
        tensors["weight"] = tensors["weight"].contiguous(memory_format=torch.channels_last)
    assert_right(name, tensors, geometry)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ("3x3 odd", "1x1", "1x1 stride 2"))
def test_layouts_of_maps(name, layout):
    tensors, geometry = make(name)
    tensors["input"] = LAYOUTS[layout](tensors["input"])
    grad = LAYOUTS[layout](torch.randn_like(call(tensors, geometry, True)))
    exact, ours = run(tensors, geometry, grad, True, torch.float64), run(tensors, geometry, grad, False)
    assert all(relative_rms(t, exact[n]) < 1e-5 for n, t in ours.items())


@pytest.mark.parametrize("name", ("3x3", "3x3 odd", "3x3 without padding", "1x1", "3x3 stride 2", "stem"))
def test_kernels_exact_on_integers(name):
    """Where no algorithm rounds: small integers, and for Winograd's F(2,3) alone. Which one runs, is asked."""
    tensors, geometry = make(name)
    tensors = {n: torch.randint(-2, 3, t.shape).float().contiguous(memory_format=torch.channels_last)
               if t.dim() == 4 else torch.randint(-2, 3, t.shape).float() for n, t in tensors.items()}  # fmt: skip
    grad = torch.randint(-2, 3, call(tensors, geometry, True).shape).float()
    exact, ours = run(tensors, geometry, grad, True, torch.float64), run(tensors, geometry, grad, False)
    for n, out in ours.items():
        if name in WINOGRAD and n != "bias":
            assert relative_rms(out, exact[n]) < 5e-6
        else:
            assert torch.equal(out.double(), exact[n]), n


@pytest.mark.parametrize("size", ((2, 64, 14, 14), (1, 33, 9, 7), (3, 16, 4, 4), (2, 128, 7, 7)))
def test_kernels_winograd_weight_gradient_error(size):
    """At most 1.5 times that of the same algorithm in plain torch."""
    x, grad = torch.randn(size), torch.randn(size[0], 40, *size[2:])
    weight = torch.zeros(40, size[1], 3, 3)
    arguments = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
    exact = torch.ops.aten.convolution_backward(grad.double(), x.double(), weight.double(), *arguments)[1]
    assert relative_rms(winograd_weight_gradient(grad.double(), x.double(), 1), exact) < 1e-13
    found, finite = ops_._conv_weight_grad(grad, x, weight, [1, 1], [1, 1], [1, 1], True)
    assert finite and relative_rms(found, exact) <= 1.5 * relative_rms(winograd_weight_gradient(grad, x, 1), exact)
    assert relative_rms(found, exact) <= 2e-6


@pytest.mark.parametrize("turned", (False, True))
@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("size", ((2, 11, 10), (1, 3, 3), (30, 14, 14), (9, 7, 7)))
@pytest.mark.parametrize("tile", (2, 4, 5))
def test_kernels_winograd_of_weights_that_change(tile, size, channels_last, turned):
    """The weight as it lies there, however the threads share the work: the bits of the packed weight's kernel. Turned:
    the convolution that computes the input's gradient."""
    n, h, w = size
    filters, channels = 130, 33
    x, bias = torch.randn(n, channels, h, w), torch.randn(filters)
    weight = torch.randn(filters, channels, 3, 3)
    given = weight.transpose(0, 1).flip(2, 3).contiguous() if turned else weight
    if channels_last:
        given = given.contiguous(memory_format=torch.channels_last)
    out, finite = ops_._conv_winograd_packing(x, given, bias, [1, 1], tile, False, turned)
    expected, _ = ops_._conv_winograd(x, ops_._pack_winograd(weight, tile), bias, None, [1, 1], False)
    assert finite and torch.equal(out, expected)


def test_kernels_winograd_error_of_weights_that_change():
    x, weight = torch.randn(2, 40, 11, 10), torch.randn(40, 33, 3, 3)
    turned = weight.transpose(0, 1).flip(2, 3).contiguous()
    exact = F.conv2d(x.double(), turned.double(), padding=1)
    for tile in (2, 4, 5):
        out, _ = ops_._conv_winograd_packing(x, weight, torch.zeros(33), [1, 1], tile, False, True)
        assert relative_rms(out, exact) <= 1.5 * relative_rms(winograd(x, turned, tile, 1), exact)


@pytest.mark.parametrize("size", ((40, 33, 3, 3), (70, 130, 1, 1), (16, 5, 3, 2)))
def test_kernels_gemm_turned(size):
    weight = torch.randn(size)
    turned = weight.transpose(0, 1).flip(2, 3).contiguous()
    for bfloat16 in {False, ops_._multiplies_bf16()}:
        packed = ops_._pack_gemm(weight, 1, bfloat16, True)
        assert torch.equal(packed, ops_._pack_gemm(turned, 1, bfloat16))


@pytest.mark.parametrize("winograd", (True, False))
@pytest.mark.parametrize("norm", (False, True))
def test_kernels_weight_gradient_of_many_blocks(norm, winograd):
    """More tiles and pixels than are summed at a time, panels that end within a vector."""
    x, grad = torch.randn(3, 70, 41, 37), torch.randn(3, 67, 41, 37)
    like, vectors = torch.zeros(67, 70, 3, 3), torch.rand(3, 70) + 0.1 if norm else None
    args = ([1, 1], [1, 1], [1, 1], winograd, vectors)
    out, _ = ops_._conv_weight_grad(grad, x, like, *args)
    if norm:
        mean, scale, shift = (v.double().view(1, -1, 1, 1) for v in vectors)
        x = torch.relu((x.double() - mean) * scale + shift)
    arguments = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
    exact = torch.ops.aten.convolution_backward(grad.double(), x.double(), like.double(), *arguments)[1]
    assert relative_rms(out, exact) < (2e-6 if winograd else 3e-7)


@pytest.mark.parametrize("value", (math.nan, math.inf))
@pytest.mark.parametrize("where", ("input", "weight", "grad"))
@pytest.mark.parametrize("name", ("3x3", "1x1", "stem"))
def test_kernels_special_values(name, where, value):
    """NaN and infinities land where torch puts them, and not in the whole of a Winograd tile."""
    tensors, geometry = make(name)
    grad = torch.randn_like(call(tensors, geometry, True))
    changed = grad if where == "grad" else tensors[where]
    changed[0, 1, 0, 0] = value
    ours, stock = (run(tensors, geometry, grad, reference) for reference in (False, True))
    for n, out in ours.items():
        assert torch.equal(out.isfinite(), stock[n].isfinite()), n


def test_kernels_special_values_behind_a_norm():
    """A NaN makes its whole channel NaN, and so all results; an infinite weight only those of its filter."""
    tensors, geometry = make("3x3", normalised=True)
    tensors["weight"][3, 2, 1, 1] = math.inf
    grad = torch.randn_like(call(tensors, geometry, True))
    ours, stock = (run(tensors, geometry, grad, reference) for reference in (False, True))
    assert torch.equal(ours["out"].isfinite(), stock["out"].isfinite()) and not ours["out"].isfinite().all()
    assert ours["weight"].isfinite().all()


def test_kernels_same_bits_for_any_number_of_threads():
    threads, runs = torch.get_num_threads(), []
    cases = [make(name, normalised=True) for name in ("3x3", "1x1", "3x3 stride 2")]
    grads = [torch.randn_like(call(*case, True)) for case in cases]
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found = [run(*case, grad, False) for case, grad in zip(cases, grads, strict=True)]
            # Other gradients of weights, and that of a strided convolution's input, are oneDNN's.
            runs.append([*found[0].values(), found[1]["out"], found[1]["input"], found[2]["out"]])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_kernels_winograd_same_bits_however_the_weight_is_packed():
    """As a whole, or a panel's channels by the thread that multiplies them: that depends on the number of threads."""
    x, weight, bias = torch.randn(4, 300, 14, 14), torch.randn(264, 300, 3, 3), torch.zeros(264)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 4, 16):
            torch.set_num_threads(n)
            found.append([ops_._conv_winograd_packing(x, weight, bias, [1, 1], tile)[0] for tile in (2, 4, 5)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


# Pixels (or tiles) in 16 parts, of which the last ones may be shorter or empty, and as before where there are few.
WEIGHT_GRADIENTS = {
    "1x1": dict(n=3, c=70, k=33, h=14, w=13, kernel=1),
    "a part more than there are pixels": dict(n=1, c=16, k=16, h=19, w=27, kernel=1),
    "strided": dict(n=2, c=33, k=65, h=35, w=33, kernel=3, stride=2),
    "several blocks a part": dict(n=8, c=200, k=17, h=28, w=28, kernel=1),
    "Winograd": dict(n=3, c=17, k=40, h=60, w=57, kernel=3, winograd=True),
    "few pixels": dict(n=1, c=40, k=40, h=11, w=10, kernel=1),
}


@pytest.mark.parametrize("normalised", (False, True))
@pytest.mark.parametrize("case", WEIGHT_GRADIENTS)
def test_kernels_weight_gradient_of_many_pixels(case, normalised):
    """Right, and the same bits for any number of threads."""
    how = dict(stride=1, winograd=False) | WEIGHT_GRADIENTS[case]
    n, c, k, h, w, size, stride = (how[name] for name in ("n", "c", "k", "h", "w", "kernel", "stride"))
    x, weight = torch.randn(n, c, h, w), torch.randn(k, c, size, size)
    norm = torch.stack([torch.randn(c), torch.rand(c) + 0.5, torch.randn(c)]) if normalised else None
    grad = torch.randn_like(F.conv2d(x, weight, None, stride, size // 2))
    pairs, threads, found = ([stride] * 2, [size // 2] * 2, [1, 1]), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5, 20):
            torch.set_num_threads(count)
            found.append(ops_._conv_weight_grad(grad, x, weight, *pairs, how["winograd"], norm)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])
    x = x.double()
    if normalised:
        mean, scale, shift = (v.double().view(1, -1, 1, 1) for v in norm)
        x = torch.relu((x - mean) * scale + shift)
    double = weight.double().requires_grad_()
    (exact,) = torch.autograd.grad(F.conv2d(x, double, None, stride, size // 2), double, grad.double())
    assert relative_rms(found[0], exact) <= (3e-6 if how["winograd"] else 1e-6)


def test_which_kernels_run():
    """Otherwise the tests above would say nothing of Winograd's algorithm and of products of matrices."""
    sizes, geometry = ((2, 32, 28, 28), (48, 32, 3, 3), (2, 48, 28, 28)), ([1, 1], [1, 1], [1, 1], 1)
    assert choose_conv_on_cpu(*sizes, *geometry, False, torch.float32, True).name == "winograd"
    for n, kernel in ((1, "onednn"), (4, "gemm"), (16, "winograd")):
        few = ((n, 512, 7, 7), (512, 512, 3, 3), (n, 512, 7, 7))
        assert choose_conv_on_cpu(*few, *geometry, False, torch.float32, True).name == kernel
    for size, kernel in ((1, "products"), (2, "products"), (3, "winograd")):
        few = ((512, 512, 3, 3), (16, 512, size, size))
        assert choose_weight_gradient_on_cpu(*few, [1, 1], [1, 1], 1, True, torch.float32) == kernel
    chosen = choose_weight_gradient_on_cpu(*sizes[1:], [1, 1], [1, 1], 1, False, torch.float32)
    assert chosen == "winograd"
    tensors, geometry = make("3x3")
    with torch.profiler.profile() as profile:
        run(tensors, geometry, torch.randn(2, 48, 28, 28), False)
    names = {event.key for event in profile.key_averages()}
    assert {"resnet_fast::_conv_winograd_packing", "resnet_fast::_conv_weight_grad"} <= names
    assert not any("mkldnn" in n or n == "aten::convolution_backward" for n in names)


@pytest.mark.parametrize("normalised", (False, True))
def test_only_the_raw_map_is_kept(normalised):
    tensors, geometry = make("3x3", normalised=normalised, bias=False)
    leaves, kept = {n: t.clone().requires_grad_() for n, t in tensors.items()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(leaves, geometry, False)
    assert [t.data_ptr() for t in kept if t.shape == leaves["input"].shape] == [leaves["input"].data_ptr()]


@pytest.mark.parametrize("name", ("input", "weight", "bias", "bn_weight", "bn_bias"))
def test_single_gradients(name):
    tensors, geometry = make("3x3", normalised=True)
    all_of_them = run(tensors, geometry, torch.ones(2, 48, 28, 28), False)
    leaf = tensors[name].clone().requires_grad_()
    call(tensors | {name: leaf}, geometry, False).backward(torch.ones(2, 48, 28, 28))
    assert torch.equal(leaf.grad, all_of_them[name])


@pytest.mark.parametrize("normalised", (False, True))
def test_gradient_can_be_differentiated(normalised):
    size, geometry = (2, 3, 4, 4), ([1, 1], [1, 1], [1, 1], 1)
    tensors = {"input": torch.randn(size), "weight": torch.randn(4, 3, 3, 3), "bias": torch.randn(4)}
    if normalised:
        tensors |= {"bn_weight": torch.rand(3) + 0.5, "bn_bias": torch.randn(3) + 1}
    names, values = zip(*tensors.items(), strict=True)
    values = [v.double().requires_grad_() for v in values]

    def function(*args):
        return call(dict(zip(names, args, strict=True)), geometry, False)

    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values)


def test_transforms_give_torchs_result():
    for normalised in (False, True):
        tensors, geometry = make("3x3", normalised=normalised)
        names, values = zip(*tensors.items(), strict=True)
        tangents = tuple(torch.randn_like(t) for t in values)
        found = [
            torch.func.jvp(
                lambda *a, r=r, n=names, g=geometry: call(dict(zip(n, a, strict=True)), g, r), values, tangents
            )
            for r in (False, True)
        ]
        assert all(relative_rms(a, b) < 1e-5 for a, b in zip(*found, strict=True))


def test_empty_batch():
    weight = torch.randn(8, 4, 3, 3, requires_grad=True)
    x = torch.randn(0, 4, 5, 5, requires_grad=True)
    out = ops.conv2d(x, weight, None, 1, 1)
    out.sum().backward()
    assert out.shape == (0, 8, 5, 5) and x.grad.shape == x.shape and not weight.grad.any()


def test_autocast():
    tensors, geometry = make("3x3", normalised=True)
    for t in tensors.values():
        t.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        raw = ops.conv2d(tensors["input"], torch.randn(32, 32, 1, 1))
        out = ops.batch_norm_relu_conv(
            raw,
            *ops.batch_norm_statistics(raw),
            tensors["bn_weight"],
            tensors["bn_bias"],
            tensors["weight"],
            None,
            *geometry,
        )
    assert raw.dtype == out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert tensors["weight"].grad.dtype == tensors["bn_weight"].grad.dtype == torch.float32


def test_opcheck():
    tensors, geometry = make("3x3", normalised=True)
    x, weight, bias, *affine = (t.requires_grad_() for t in tensors.values())
    pairs = [[g, g] if i < 3 else g for i, g in enumerate(geometry)]
    torch.library.opcheck(torch.ops.resnet_fast.conv2d, (x, weight, bias, *pairs))
    torch.library.opcheck(torch.ops.resnet_fast.conv2d, (x, weight, None, *pairs))
    mean, var = ops.batch_norm_statistics(x.detach())
    torch.library.opcheck(
        torch.ops.resnet_fast.batch_norm_relu_conv, (x, mean, var, *affine, weight, bias, *pairs, 1e-5)
    )


def test_compiled():
    tensors, geometry = make("3x3", normalised=True)
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    grad = torch.randn(2, 48, 28, 28)
    torch.compile(lambda t: call(t, geometry, False), backend="aot_eager", fullgraph=True)(leaves).backward(grad)
    eager = run(tensors, geometry, grad, False)
    assert all(torch.equal(t.grad, eager[n]) for n, t in leaves.items() if n != "bias")
    assert torch.allclose(leaves["bias"].grad, eager["bias"], rtol=1e-4)  # whose sum goes through another layout


@pytest.mark.parametrize("normalised", (False, True))
def test_errors_name_the_argument(normalised):
    name = "batch_norm_relu_conv" if normalised else "conv2d"
    x, weight, v = torch.randn(2, 6, 5, 5), torch.randn(4, 6, 3, 3), torch.ones(6)
    head = (v, v, v, v) if normalised else ()
    function = getattr(ops, name)
    wrong = {
        r"weight must have 4 dimensions": (x, *head, weight[0]),
        r"input must have 3 channels": (x, *head, weight[:, :3]),
        r"stride must be at least 1, got \(0, 0\)": (x, *head, weight, None, 0),
        r"bias must have shape \(4,\)": (x, *head, weight, torch.ones(3)),
        r"weight must have input's dtype torch.float32, got torch.float64": (x, *head, weight.double()),
        r"the dilated kernel \(13\) must not be larger": (x, *head, weight, None, 1, 0, 6),
    }
    if normalised:
        wrong[r"mean must have shape \(6,\), one value per channel"] = (x, v[:5], *head[1:], weight)
        wrong[r"bn_bias must be floating point"] = (x, v, v, v, v.long(), weight)
    for words, args in wrong.items():
        with pytest.raises(RuntimeError, match=f"{name}: {words}"):
            function(*args)
        with FakeTensorMode() as mode, pytest.raises(RuntimeError, match=f"{name}: {words}"):
            function(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in args))


def test_reference_backend_is_the_same_operator():
    tensors, geometry = make("3x3", normalised=True)
    grad = torch.randn(2, 48, 28, 28)
    ours = run(tensors, geometry, grad, False)
    with resnet_fast.use_backend("reference"):
        plain = run(tensors, geometry, grad, False)
    assert all(relative_rms(t, plain[n]) < 1e-5 for n, t in ours.items() if n != "bias")


@pytest.mark.parametrize("level", OTHER_LEVELS)
def test_every_other_level(level):
    assert_passes_at_level(os.path.abspath(__file__), level, "kernels")
