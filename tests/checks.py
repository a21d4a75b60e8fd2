"""What "right" means: error against float64, compared with stock torch's own error in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}


def relative_error(out: Tensor, ref: Tensor) -> float:
    """RMS(out - ref) / RMS(ref), in float64."""
    out, ref = out.double(), ref.double()
    return ((out - ref).square().mean().sqrt() / ref.square().mean().sqrt()).item()


def assert_accurate(out: Tensor, ref: Tensor, stock: list[Tensor]) -> None:
    """``out`` is as near to the float64 result as twice the worse of stock torch's results, plus one rounding."""
    assert out.shape == ref.shape and out.dtype == stock[0].dtype
    assert torch.isfinite(out).all() and torch.isfinite(ref).all()
    assert ref.numel() < 2 or ref.double().std() > 0, "a constant result proves nothing"
    bound = 2 * max(relative_error(s, ref) for s in stock) + UNIT_ROUNDOFF[out.dtype]
    error = relative_error(out, ref)
    assert error <= bound, f"relative error {error:.3g} above {bound:.3g}"


def assert_same_special_values(out: Tensor, ref: Tensor) -> None:
    """NaN and infinities stand where ``ref`` has them, with the same signs."""
    assert torch.equal(out.isnan(), ref.isnan())
    assert torch.equal(out.isposinf(), ref.isposinf())
    assert torch.equal(out.isneginf(), ref.isneginf())
