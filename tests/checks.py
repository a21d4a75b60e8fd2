"""What "right" means: error against float64, compared with stock torch's own error in the same dtype."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fast.backends import CPU_LEVELS, cpu_level
from resnet_fast.measure import relative_rms

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}


def assert_accurate(out: Tensor, ref: Tensor, stock: list[Tensor]) -> None:
    """``out`` is as near to the float64 result as twice the worse of stock torch's results, plus one rounding."""
    assert out.shape == ref.shape and out.dtype == stock[0].dtype
    assert torch.isfinite(out).all() and torch.isfinite(ref).all()
    assert ref.numel() < 2 or ref.double().std() > 0, "a constant result proves nothing"
    bound = 2 * max(relative_rms(s, ref) for s in stock) + UNIT_ROUNDOFF[out.dtype]
    error = relative_rms(out, ref)
    assert error <= bound, f"relative error {error:.3g} above {bound:.3g}"


def assert_same_special_values(out: Tensor, ref: Tensor) -> None:
    """NaN and infinities stand where ``ref`` has them, with the same signs."""
    assert torch.equal(out.isnan(), ref.isnan())
    assert torch.equal(out.isposinf(), ref.isposinf())
    assert torch.equal(out.isneginf(), ref.isneginf())


def rounded_to_tf32(t: Tensor) -> Tensor:
    """Finite float32 as TF32 keeps it."""
    return ((t.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


class NoConvolution(TorchDispatchMode):
    """Forbids torch's own convolution, in any form, and what else has one of the ``others`` in its name."""

    def __init__(self, *others: str):
        super().__init__()
        self.words = ("convolution", "conv2d", *others)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(word in func.__name__ for word in self.words), f"{func} was called"
        return func(*args, **(kwargs or {}))


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


# The levels of the CPU's kernels that a test has to start a process for: all but the one that this process runs at.
OTHER_LEVELS = tuple(level for level in CPU_LEVELS if level != cpu_level())


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
