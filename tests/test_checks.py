"""The assertions themselves must be able to fail."""

import pytest
import torch
from checks import assert_accurate, assert_same_special_values

from resnet_fast.measure import relative_rms


def test_relative_rms_is_exact():
    assert relative_rms(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])) == pytest.approx((0.5 / 9) ** 0.5)


def test_accurate_accepts_stock_and_refuses_worse():
    ref = torch.randn(1000, dtype=torch.float64)
    stock = ref.float()
    assert_accurate(stock, ref, [stock])
    with pytest.raises(AssertionError, match="relative error"):
        assert_accurate(stock * (1 + 1e-6), ref, [stock])


def test_accurate_refuses_what_is_not_finite_or_constant():
    ref = torch.randn(10, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_accurate(ref.float() * torch.nan, ref, [ref.float()])
    with pytest.raises(AssertionError, match="constant"):
        assert_accurate(torch.ones(4), torch.ones(4).double(), [torch.ones(4)])


def test_special_values_compare_signs():
    inf = torch.tensor([float("inf"), float("nan"), 1.0])
    assert_same_special_values(inf, inf.clone())
    with pytest.raises(AssertionError):
        assert_same_special_values(inf, torch.tensor([float("-inf"), float("nan"), 1.0]))
