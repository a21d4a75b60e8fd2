"""max_pool_with_indices on the CPU: torch's result, place and gradient."""

import os

import pytest
import torch
from checks import LAYOUTS, OTHER_LEVELS, assert_passes_at_level, assert_same_special_values
from test_max_pool import CHANNELS, DTYPES, GEOMETRIES, STEM

import resnet_fast
from resnet_fast.ops import max_pool, max_pool_with_indices, max_pool_with_indices_ref

GEOMETRIES = {name: how for name, how in GEOMETRIES.items() if name != "nothing but padding"}
GEOMETRIES["overlapping"] = dict(shape=(2, 18, 11, 13), kernel_size=(5, 4), stride=(1, 2), padding=(2, 1))


def assert_equals_torch(x, **how):
    """Values, places and gradient, bit for bit; 16-bit gradients that torch adds in 16 bits within one rounding."""
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    (out, indices), (ref, places) = max_pool_with_indices(leaves[0], **how), max_pool_with_indices_ref(leaves[1], **how)
    assert torch.equal(out.nan_to_num(), ref.nan_to_num())
    assert_same_special_values(out, ref)
    assert indices.dtype == torch.uint8 and torch.equal(indices, places)
    assert out.stride() == indices.stride() == torch.empty(out.shape, memory_format=torch.channels_last).stride()
    grad = torch.randn(out.shape).to(x.dtype)
    out.backward(grad)
    ref.backward(grad)
    exact = x.double().requires_grad_()
    max_pool_with_indices_ref(exact, **how)[0].backward(grad.double())
    if x.dtype in (torch.float32, torch.float64):
        assert torch.equal(leaves[0].grad, leaves[1].grad)
    else:
        assert torch.equal(leaves[0].grad, exact.grad.to(x.dtype))  # one rounding, of a sum in float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", CHANNELS)
def test_kernels_channels(c, dtype):
    assert_equals_torch(torch.randn(2, c, 9, 7).to(dtype), **STEM)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
@pytest.mark.parametrize("case", GEOMETRIES)
def test_kernels_geometries(case, dtype):
    how = dict(GEOMETRIES[case])
    assert_equals_torch(torch.randn(how.pop("shape")).to(dtype), **how)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    assert_equals_torch(LAYOUTS[layout](torch.randn(2, 20, 9, 10)), **STEM)


@pytest.mark.parametrize("c", (3, 21, 64))
def test_kernels_ties_and_special_values(c):
    """Of equal values the first counts, of NaNs the last; windows of -inf have a place too."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan")])
    x = values[torch.randint(len(values), (4, c, 24, 23))]
    x[:, :, :5] = float("-inf")
    assert_equals_torch(x, **STEM)
    assert_equals_torch(torch.zeros(2, c, 9, 9), **STEM)


def test_what_is_kept():
    """8 bits an output."""
    x, kept = torch.randn(2, 8, 12, 12, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        max_pool_with_indices(x, **STEM)
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.uint8, 2 * 8 * 6 * 6)]


def test_gradient_can_be_differentiated():
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64, requires_grad=True)

    def pool(x):
        return max_pool_with_indices(x, **STEM)[0]

    assert torch.autograd.gradcheck(pool, x) and torch.autograd.gradgradcheck(pool, x)


def test_opcheck_and_transforms():
    x = torch.randn(2, 16, 9, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.resnet_fast.max_pool_with_indices, (x, [3, 3], [2, 2], [1, 1], [1, 1], False))
    tangent = torch.randn_like(x)
    found = [torch.func.jvp(lambda t, f=f: f(t, **STEM)[0], (x,), (tangent,)) for f in (max_pool_with_indices, _plain)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _plain(x, **how):
    return max_pool(x, **how), None


def test_errors_name_the_argument():
    x = torch.randn(1, 3, 20, 20)
    for how, words in (
        (dict(kernel_size=17), r"kernel_size must have at most 256 places, got \(17, 17\)"),
        (dict(kernel_size=3, padding=2), "padding must be at most half of kernel_size"),
        (
            dict(kernel_size=2, stride=1, padding=1, dilation=25, ceil_mode=True),
            r"kernel_size, dilated \(26\), must not be larger than the padded map",
        ),
    ):
        with pytest.raises(RuntimeError, match=f"max_pool_with_indices: {words}"):
            max_pool_with_indices(x, **how)
    with pytest.raises(RuntimeError, match="every kernel must meet the map"):
        max_pool_with_indices(torch.randn(1, 18, 4, 4), 2, 1, 1, 5)


def test_reference_backend_is_the_same_operator():
    x = torch.randn(2, 20, 9, 8)
    ours = max_pool_with_indices(x, **STEM)
    with resnet_fast.use_backend("reference"):
        plain = max_pool_with_indices(x, **STEM)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("level", OTHER_LEVELS)
def test_every_other_level(level):
    assert_passes_at_level(os.path.abspath(__file__), level, "kernels")
