"""What the launchers of the training operators ask for compiles without a spill, and moves 128 bits at a time.

The maps of all stages of ResNet-50 get the same kernels of batch normalisation, which know of the channels no more than
what divides them (tests/triton_interpreter/test_batch_norm_relu.py says so).
"""

from __future__ import annotations

import pytest
import torch
from compiled import ARCHITECTURES, Usage, usages_of
from test_pooling import channels_last, past_int32

from resnet_fast.kernels import batch_norm_relu as module
from resnet_fast.kernels import max_pool as max_pool_module

pytestmark = pytest.mark.parametrize("arch", ARCHITECTURES)


def compile_step(arch: int, mode: str, dtype: torch.dtype, channels: int) -> dict[str, Usage]:
    """All kernels of a training step of 56 x 56 pixels. Those of one block of channels are cut into as many chunks, so
    that they share the kernels that combine these."""
    input, grad, other = (channels_last(256, channels, 56, 56, dtype=dtype) for _ in range(3))
    vector = torch.empty(channels, device="meta")
    norm, none = (vector,) * 4, (None,) * 4
    with_mask = mode != "norm and relu"
    residual = other if with_mask else None
    shortcut_norm = norm if mode == "projection" else none

    def step() -> None:
        module.batch_norm_statistics_triton(input)
        _, mask = module.batch_norm_relu_triton(
            input, *norm, 1e-5, residual, *shortcut_norm, 1e-5, True, with_mask
        )  # fmt: skip
        module.batch_norm_relu_backward_triton(
            grad, input, *norm, 1e-5, mask if with_mask else None, other if mode == "projection" else None,
            *shortcut_norm[:3], 1e-5, True, mode == "residual",
        )  # fmt: skip

    return usages_of(step, arch, module)


def spilling(found: dict[str, Usage]) -> dict[str, Usage]:
    return {name: u for name, u in found.items() if u.stack > 0}


def assert_wide(u: Usage, run: int, loads: int, stores: int) -> None:
    """Of every map that is read or written a run at a time; what is narrow beside that are the bytes of a mask."""
    assert Usage.wide(u.loads) >= loads * run and Usage.wide(u.stores) == stores * run
    assert u.loads.total() - Usage.wide(u.loads) <= run and u.stores.total() - Usage.wide(u.stores) <= run


# Maps that batch_norm_relu_kernel, batch_norm_grad_sums_kernel and batch_norm_grad_kernel load and store.
MAPS = {"norm and relu": ((1, 1), (2, 0), (2, 1)), "projection": ((2, 1), (3, 0), (3, 2))}
SIXTEEN = {80: torch.float16, 90: torch.bfloat16, 100: torch.bfloat16}


@pytest.mark.parametrize(("mode", "bits"), [("norm and relu", 16), ("projection", 16), ("projection", 32)])
def test_batch_norm_relu(mode, bits, arch):
    found = compile_step(arch, mode, torch.float32 if bits == 32 else SIXTEEN[arch], channels=1024 // bits)
    assert len(found) == 6 and not spilling(found)
    assert_wide(found["batch_norm_moments_kernel"], module._RUN_OF_MOMENTS, 1, 0)
    forward, sums, backward = MAPS[mode]
    last_run = module._RUN_OF_FIVE_MAPS if mode == "projection" else module._RUN
    assert_wide(found["batch_norm_relu_kernel"], module._RUN, *forward)
    assert_wide(found["batch_norm_grad_sums_kernel"], module._RUN, *sums)
    assert_wide(found["batch_norm_grad_kernel"], last_run, *backward)


def test_batch_norm_relu_of_other_channels(arch):
    """Whose block is not full; of 63 each value has an address and a mask of its own."""
    channels = 24 if arch == 90 else 63
    found = compile_step(arch, "projection", torch.bfloat16, channels)
    assert not spilling(found)
    assert (Usage.wide(found["batch_norm_grad_kernel"].stores) > 0) == (channels == 24)


# By name: dtype, channels and images of 56 x 56; whether 16 bytes are moved at a time.
POOLS = {
    "stem in float32": (torch.float32, 64, 8, True),
    "stem in bfloat16": (torch.bfloat16, 64, 8, True),
    "64-bit, odd channels": (torch.float32, 65, past_int32(65), False),
}


@pytest.mark.parametrize("name", POOLS)
def test_max_pool_with_indices(name, arch):
    dtype, channels, batch, vectors = POOLS[name]
    x = channels_last(batch, channels, 56, 56, dtype=dtype)
    out, indices = (channels_last(batch, channels, 28, 28, dtype=t) for t in (dtype, torch.uint8))
    geometry = ([3, 3], [2, 2], [1, 1], [1, 1])

    def step() -> None:
        max_pool_module.max_pool_with_indices_triton(x, *geometry, out, indices)
        max_pool_module.max_pool_backward_triton(out, indices, *geometry, x)

    found = usages_of(step, arch, max_pool_module)
    assert len(found) == 2 and not spilling(found)
    if vectors:
        words = 8 * dtype.itemsize // 16
        forward, backward = found.values()
        assert Usage.wide(forward.loads) == forward.loads.total() == 9 * words
        assert Usage.wide(backward.loads) == 4 * words  # beside 8 indices at a time
        assert Usage.wide(forward.stores) == Usage.wide(backward.stores) == words
