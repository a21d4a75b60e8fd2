"""Faults planted into the kernels' own source: every one must be seen by the tests or by the memory checker."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from batch_norm import assert_exact, assert_statistics_are_right, integer_case, random_map
from test_conv_bn_relu import in_double, problem
from test_conv_bn_relu_projection import block
from triton.runtime.errors import InterpreterError

from resnet_fast.kernels import (
    add_relu,
    avg_pool_flatten,
    batch_norm_relu,
    conv_few_channels,
    conv_pointers,
    conv_tma,
    max_pool,
    shared,
)
from resnet_fast.ops import add_relu as add_relu_op
from resnet_fast.ops import (
    add_relu_ref,
    avg_pool_flatten_ref,
    conv_bn_relu,
    conv_bn_relu_max_pool,
    conv_bn_relu_max_pool_ref,
    conv_bn_relu_projection,
    conv_bn_relu_projection_ref,
    conv_bn_relu_ref,
    max_pool_ref,
    max_pool_with_indices,
    max_pool_with_indices_ref,
)
from resnet_fast.ops import avg_pool_flatten as avg_pool_flatten_op
from resnet_fast.ops import max_pool as max_pool_op
from resnet_fast.ops.batch_norm_relu import Norm, apply_kernel, backward_kernel

from .kernels import fault

pytestmark = [
    pytest.mark.usefixtures("triton_backend", "poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy on what is asked for here
]

BFLOAT16 = dict(integers=True, eps=0.0, dtype=torch.bfloat16)
FLOAT32 = dict(integers=True, eps=0.0)


def assert_equal(out: torch.Tensor, exact: torch.Tensor) -> None:
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out.nan_to_num(), exact.to(out.dtype).nan_to_num())


def conv(**how) -> Callable[[], None]:
    def check() -> None:
        tensors, geometry = problem(**how)
        assert_equal(conv_bn_relu(**tensors, **geometry), conv_bn_relu_ref(**in_double(tensors), **geometry))

    return check


def projection(**how) -> Callable[[], None]:
    def check() -> None:
        tensors, geometry = block(**how)
        exact = conv_bn_relu_projection_ref(**in_double(tensors), **geometry)
        assert_equal(conv_bn_relu_projection(**tensors, **geometry), exact)

    return check


def stem(**how) -> Callable[[], None]:
    def check() -> None:
        tensors, geometry = problem(c=3, k=16, h=12, w=13, kernel=(3, 3), stride=(2, 2), **how)
        del tensors["residual"], geometry["relu"]
        exact = conv_bn_relu_max_pool_ref(**in_double(tensors), **geometry)
        assert_equal(conv_bn_relu_max_pool(**tensors, **geometry), exact)

    return check


def nan_through_relu() -> None:
    tensors, geometry = problem(c=32, k=16, integers=True, eps=0.0, dtype=torch.bfloat16)
    tensors["input"][0, 3, 4, 4] = float("nan")
    assert_equal(conv_bn_relu(**tensors, **geometry), conv_bn_relu_ref(**in_double(tensors), **geometry))


def large_eps() -> None:
    tensors, geometry = problem(c=6, k=10, integers=True, eps=0.75)
    tensors["running_var"].fill_(0.25)
    assert_equal(conv_bn_relu(**tensors, **geometry), conv_bn_relu_ref(**in_double(tensors), **geometry))


def beside_the_window() -> None:
    """A NaN in a column that the kernel's row of 16 elements reaches, and its window of 3 pixels does not."""
    tensors, geometry = problem(n=1, c=3, k=5, h=7, w=33, stride=(2, 2), relu=False, **BFLOAT16)
    tensors["input"][0, 2, 3, 20] = float("nan")
    assert_equal(conv_bn_relu(**tensors, **geometry), conv_bn_relu_ref(**in_double(tensors), **geometry))


def tail_of_add_relu() -> None:
    a, b = torch.randn(2, 1030).unbind()
    assert_equal(add_relu_op(a, b), add_relu_ref(a, b))


def pooled() -> None:
    x = -1 - torch.rand(2, 17, 7, 9)
    assert_equal(max_pool_op(x, 3, 2, 1), max_pool_ref(x, 3, 2, 1))


def averaged() -> None:
    x = torch.randint(-3, 4, (2, 17, 4, 4)).float()
    assert_equal(avg_pool_flatten_op(x), avg_pool_flatten_ref(x))


def statistics() -> None:
    """More than a chunk, and several tiles of one."""
    assert_statistics_are_right(random_map(2, 24, 23, 13, dtype=torch.bfloat16, mean=10.0))


def normalised(mode: str, dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    return lambda: assert_exact(integer_case(mode, (2, 20, 4, 4), dtype))


def rounded_to_zero() -> None:
    """Result, mask and gradient, some values of which float16 cannot hold."""
    maps = [random_map(2, 20, 3, 5, dtype=torch.float16) for _ in range(2)]
    norm = Norm(torch.randn(20), torch.rand(20) + 0.5, torch.randn(20) * 1e-8, None, 1e-5)
    (out, mask), (ref, ref_mask) = (apply_kernel(b, maps[0], norm, with_mask=True) for b in ("triton", "reference"))
    assert torch.equal(out, ref) and torch.equal(mask, ref_mask)
    found = [backward_kernel("triton", maps[1], maps[0], norm, m)[2] for m in (None, mask)]
    assert torch.equal(*found)


def pooled_with_indices() -> None:
    x = torch.randint(-2, 3, (2, 17, 7, 10)).float()
    x[:, :, :3] = float("-inf")
    x.requires_grad_()
    found = []
    for function in (max_pool_with_indices, max_pool_with_indices_ref):
        out, indices = function(x, 3, 2, 1)
        (grad,) = torch.autograd.grad(out, x, torch.arange(out.numel()).view_as(out).float())
        found.append((out, indices, grad))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


POINTERS = conv(c=6, k=10, residual=True, **FLOAT32)
DEEP = conv(c=70, k=40, residual=True, **FLOAT32)
BOXES = conv(c=48, k=72, h=18, w=18, residual=True, **BFLOAT16)
BOXES_APART = conv(c=32, k=40, h=10, w=14, stride=(2, 2), **BFLOAT16)
BLOCK = projection(k=72, main=dict(c=32), shortcut=dict(c=16), **BFLOAT16)
STEM = stem(**BFLOAT16)

# Name: the module, its text, what is put there instead, and the check that must see it.
FAULTS = {
    "missing mask": (conv_pointers, "tl.load(corner[:, None] + x_offset[None, :], mask=inside, other=0.0)",
                     "tl.load(corner[:, None] + x_offset[None, :])", POINTERS),
    "missing other": (conv_pointers, "mask=y_ok, other=0.0)", "mask=y_ok)", DEEP),
    "mask of rows alone": (conv_pointers, "(h >= 0) & (h < H) & (w >= 0) & (w < W)", "(h >= 0) & (h < H)", POINTERS),
    "overlapping stores": (conv_pointers, "offs_m = tile_m * BLOCK_M", "offs_m = tile_m * (BLOCK_M - 16)", DEEP),
    "tap of the input": (conv_pointers, "x_offset = (r * DIL_H * W + s * DIL_W)",
                         "x_offset = (s * DIL_H * W + r * DIL_W)", DEEP),
    "group of the first": (conv_pointers, "columns = group * K + offs_n", "columns = offs_n",
                           conv(c=8, k=16, groups=2, **FLOAT32)),
    "truncating cast": (shared, "tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=ok)",
                        "acc = (acc.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)\n"
                        "    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=ok)",
                        conv(c=70, k=17, **BFLOAT16)),
    "rounded before BatchNorm": (conv_tma, "        acc = batch_norm(acc, columns,",
                                 "        acc = batch_norm(acc.to(out.dtype).to(tl.float32), columns,", BOXES),
    "rounded before the residual": (conv_tma, "            acc += r.to(tl.float32)",
                                    "            acc = acc.to(out.dtype).to(tl.float32) + r.to(tl.float32)", BOXES),
    "ReLU without NaN": (shared, "tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)", "tl.where(x > 0, x, 0.0)",
                         nan_through_relu),
    "eps forgotten": (shared, "tl.sqrt_rn(var + eps)", "tl.sqrt_rn(var)", large_eps),
    "bias with the wrong sign": (shared, "mean -= tl.load(bias", "mean += tl.load(bias",
                                 conv(c=6, k=10, bias=True, **FLOAT32)),
    "wrong tap": (conv_tma, "w = tap % S * DIL_W - PAD_W", "w = tap // S * DIL_W - PAD_W", BOXES),
    "depth of another tap": (conv_tma, "b = weight.load([k0, step * BLOCK_K])",
                             "b = weight.load([k0, step % STEPS * BLOCK_K])", BOXES),
    "parity of the column": (conv_tma, "q0 + (w >> 1), (w & 1) * C + c]", "q0 + (w >> 1), c]", BOXES_APART),
    "rounding towards zero": (conv_tma, "p0 + (h >> 1)", "p0 + h // 2", BOXES_APART),
    "tile left out": (conv_tma, "range(tl.program_id(0), tiles,", "range(tl.program_id(0), tiles - 1,", BOXES),
    "tile made twice": (conv_tma, "range(tl.program_id(0), tiles,", "range(tl.program_id(0) // 2, tiles,", BOXES),
    "images and rows exchanged": (conv_tma, "out.store([n0, p0, q0, k0]", "out.store([p0, n0, q0, k0]", BOXES),
    "BatchNorm of the other branch": (conv_tma, "batch_norm(acc2, columns, column_ok, bias2, bn_weight2,",
                                      "batch_norm(acc2, columns, column_ok, bias2, bn_weight,", BLOCK),
    "shortcut before its BatchNorm": (
        conv_pointers,
        "acc += batch_norm(acc2, columns, column_ok, bias2, bn_weight2, bn_bias2, running_mean2, running_var2, eps2)",
        "acc += acc2", projection(k=17, main=dict(c=6), shortcut=dict(c=6), **FLOAT32)),
    "pooled row not kept": (conv_few_channels, "            largest = of_row",
                            "            largest = tl.zeros((BLOCK_Q, BLOCK_N), dtype=tl.float32)", STEM),
    "column left of the map": (conv_few_channels, "tl.where(exists[:, None], relu(", "tl.where(True, relu(", STEM),
    "beside the window": (conv_few_channels, "if WINDOW == DEPTH:", "if True:",
                          beside_the_window),
    "tail without a mask": (add_relu, "tl.store(out + start + lane, x.to(out.dtype.element_ty), mask=tail)",
                            "tl.store(out + start + lane, x.to(out.dtype.element_ty))", tail_of_add_relu),
    "padding that counts": (max_pool, 'mask=inside, other=float("-inf")', "mask=inside, other=0.0", pooled),
    "mean of a tile": (avg_pool_flatten, "tl.div_rn(tl.sum(total, axis=0), pixels.to(tl.float32))",
                       "tl.sum(total, axis=0) / BLOCK_P - 1.0", averaged),
    "weight of a run": (batch_norm_relu, "share = count / tl.maximum(before + count, 1.0)", "share = 0.5", statistics),
    "weight of a chunk": (batch_norm_relu, "tl.minimum(pixels - i.to(tl.int64) * chunk, chunk)",
                          "chunk - 0 * i.to(tl.int64)", statistics),
    "run with pixels that are not there": (batch_norm_relu, "if left >= RUN * LANES:", "if left > 0:", statistics),
    "tail left out": (batch_norm_relu, "range(begin, end, RUN * LANES)",
                      "range(begin, end - RUN * LANES + 1, RUN * LANES)", normalised("norm")),
    "last tile not normalised": (batch_norm_relu, "range(begin, end, BLOCK_P)",
                                 "range(begin, end - BLOCK_P + 1, BLOCK_P)", normalised("norm")),
    "pixels of the next chunk": (batch_norm_relu, "tl.minimum(begin + chunk, pixels)", "begin + chunk", statistics),
    "mean of the distances": (batch_norm_relu, "first.to(tl.float64) + rounded", "rounded.to(tl.float64)", statistics),
    "bytes of the next pixel": (batch_norm_relu, "& (byte < bytes)[None, :]", "", normalised("residual")),
    "sign before rounding": (batch_norm_relu, "(x.to(dtype).to(tl.float32) <= 0.0)", "(x <= 0.0)", rounded_to_zero),
    "sign without the shift": (batch_norm_relu, "not_below(tl.fma(centred, scale[None, :], shift[None, :]), dtype)",
                               "not_below(centred * scale[None, :], dtype)", normalised("norm and relu")),
    "slope of the other branch": (batch_norm_relu, "slope_and_offset(slopes + 2 * C, c, C)",
                                  "slope_and_offset(slopes, c, C)", normalised("projection", torch.bfloat16)),
    "gradient past the ReLU": (batch_norm_relu, "tl.where(unpacked(tl.load(at, mask=ok, other=0)), grad, 0.0)", "grad",
                               normalised("residual", torch.float16)),
    "of equal values the last": (max_pool, "(x > largest) | (x != x)", "(x >= largest) | (x != x)",
                                 pooled_with_indices),
    "place in the padding": (max_pool, "first.to(tl.int32)[:, None]", "(0 * first).to(tl.int32)[:, None]",
                             pooled_with_indices),
    "output of the next row": (max_pool, "& (q >= 0) & (q < Q) &", "&", pooled_with_indices),
    "tap of the other direction": (max_pool, "tap = down // DIL_H * S + across // DIL_W",
                                   "tap = across // DIL_W * S + down // DIL_H", pooled_with_indices),
}  # fmt: skip


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """A GPU's tiles: several of them, and several programs."""
    from resnet_fast.kernels import configs

    monkeypatch.setitem(configs.CONFIGS, "interpreter", configs.CONFIGS["sm_90"])
    conv_tma._plan.cache_clear()
    yield
    conv_tma._plan.cache_clear()


@pytest.mark.parametrize("name", FAULTS)
def test_is_seen(name):
    module, text, wrong, check = FAULTS[name]
    torch.manual_seed(0)
    check()  # which passes as things are
    torch.manual_seed(0)
    with fault(module, text, wrong), pytest.raises((AssertionError, InterpreterError)):
        check()


def test_a_text_that_is_gone_is_an_error():
    with pytest.raises(AssertionError, match="any more"), fault(shared, "no such text", ""):
        pass
