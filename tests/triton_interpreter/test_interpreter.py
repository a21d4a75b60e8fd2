"""The memory checker must catch, and the repaired bfloat16 must round; else a pass of the other files means little."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def copy_kernel(
    x, out, n,
    LOAD_MASK: tl.constexpr, STORE_MASK: tl.constexpr, OTHER: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    if LOAD_MASK:
        if OTHER:
            value = tl.load(x + offsets, mask=offsets < n, other=0.0)
        else:
            value = tl.load(x + offsets, mask=offsets < n)
    else:
        value = tl.load(x + offsets)
    if STORE_MASK:
        tl.store(out + offsets, value, mask=offsets < n)
    else:
        tl.store(out + offsets, value)


def copy(x, out, load_mask=True, store_mask=True, other=True, step=8):
    copy_kernel[(triton.cdiv(len(x), step),)](x, out, len(x), load_mask, store_mask, other, step, BLOCK=8)
    return out


def test_accepts_a_right_kernel():
    x = torch.randn(19)
    assert torch.equal(copy(x, torch.empty(19)), x)


def test_catches_a_load_past_the_end():
    # Room for the whole block in both storages: what counts is the view that the kernel was given.
    x = torch.randn(64)[:19]
    with pytest.raises(InterpreterError, match="load out of bounds: 5 of 8 lanes"):
        copy(x, torch.empty(19), load_mask=False)


def test_catches_a_store_past_the_end():
    with pytest.raises(InterpreterError, match="store out of bounds: 5 of 8 lanes"):
        copy(torch.randn(19), torch.empty(64)[:19], store_mask=False)


def test_catches_any_access_where_every_tensor_is_empty():
    with pytest.raises(InterpreterError, match="load out of bounds"):
        copy_kernel[(1,)](torch.empty(0), torch.empty(0), 8, True, True, True, 8, BLOCK=8)


def test_catches_programs_that_overlap():
    with pytest.raises(InterpreterError, match="two programs write one address"):
        copy(torch.randn(19), torch.empty(19), step=6)


@triton.jit
def scatter_kernel(x, out, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(out + lane // 2, tl.load(x + lane))


def test_catches_lanes_that_overlap():
    with pytest.raises(InterpreterError, match="two lanes write one address"):
        scatter_kernel[(1,)](torch.randn(8), torch.empty(8), BLOCK=8)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_masked_lanes_without_other_are_poisoned(dtype):
    x = torch.randn(11).to(dtype)
    out = torch.zeros(16, dtype=dtype)
    copy_kernel[(2,)](x, out, 11, True, False, False, 8, BLOCK=8)
    assert torch.equal(out[:11], x) and out[11:].isnan().all()
    copy_kernel[(2,)](x, out, 11, True, False, True, 8, BLOCK=8)
    assert torch.equal(out[11:], torch.zeros(5, dtype=dtype))


@triton.jit
def cast_kernel(x, out, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + lane, tl.load(x + lane).to(out.dtype.element_ty))


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_casts_round_to_nearest_even(dtype):
    """Every 16-bit value, the float32 values around it, and the ties between neighbours."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    exact = bits.to(torch.int16).view(torch.bfloat16).float()
    dropped = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    if dtype == torch.float16:
        exact, dropped = bits.to(torch.int16).view(dtype).float(), dropped >> 3  # float16 keeps 3 bits more
    x = (exact.view(torch.int32)[:, None] + dropped).view(torch.float32).flatten()
    out = torch.empty(len(x), dtype=dtype)
    cast_kernel[(len(x) // 2**15,)](x, out, BLOCK=2**15)
    assert torch.equal(out.isnan(), x.to(dtype).isnan())
    assert torch.equal(out.nan_to_num(), x.to(dtype).nan_to_num())

    back = torch.empty(len(x))
    cast_kernel[(len(x) // 2**15,)](out, back, BLOCK=2**15)
    assert torch.equal(back.nan_to_num(), out.float().nan_to_num())


@triton.jit
def dot_kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m * K + k[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(out + m * N + n[None, :], tl.dot(x, y))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_products_accumulate_in_float32(dtype):
    a, b, out = torch.randn(16, 32).to(dtype), torch.randn(32, 16).to(dtype), torch.empty(16, 16)
    dot_kernel[(1,)](a, b, out, 16, 16, 32)
    torch.testing.assert_close(out, a.float() @ b.float())


def test_refuses_products_that_no_gpu_takes():
    a, b, out = torch.randn(16, 8).half(), torch.randn(8, 16).half(), torch.empty(16, 16)
    with pytest.raises(InterpreterError, match="shape"):
        dot_kernel[(1,)](a, b, out, 16, 16, 8)


@triton.jit
def double_kernel(x, out, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    value = tl.load(x + lane)
    tl.store(out + lane, value + value)


def test_refuses_arithmetic_on_bfloat16():
    x = torch.randn(8).bfloat16()
    with pytest.raises(InterpreterError, match="cast to float32 first"):
        double_kernel[(1,)](x, torch.empty_like(x), BLOCK=8)
