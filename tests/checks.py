"""What "right" means: error against float64, compared with stock torch's own error in the same dtype."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

import pytest
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


@cache
def _reason_at(level: str) -> str:
    """What `backends` says of the CPU's kernels where they are forced to be of one level."""
    env = {**os.environ, "RESNET_FAST_CPU_LEVEL": level}
    command = [sys.executable, "-c", "import resnet_fast; print(resnet_fast.backends()['cpu'].reason)"]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def assert_passes_at_level(files: str | list[str], level: str, tests: str) -> None:
    """The tests of ``files`` that ``-k tests`` selects pass in a process whose CPU kernels are of one level."""
    if os.environ.get("RESNET_FAST_CPU_LEVEL"):
        pytest.skip("already inside a forced level")
    env = {**os.environ, "RESNET_FAST_CPU_LEVEL": level}
    files = [files] if isinstance(files, str) else files
    reason = _reason_at(level)
    if "does not have that level" in reason:
        pytest.skip(reason.strip())
    assert f"level {level}" in reason
    run = [sys.executable, "-m", "pytest", *files, "-q", "-k", tests, "-p", "no:cacheprovider"]
    result = subprocess.run(run, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]


# Ways a map or weight [A, B, C, D] may lie in memory, as functions that make such a copy (or view).
LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": lambda t: t.new_empty(t.shape[0], 2 * t.shape[1], *t.shape[2:])[:, ::2].copy_(t),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda t: t[:, :, :1].expand_as(t),
}
