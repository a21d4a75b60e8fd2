"""The Triton kernels of batch normalisation in training, through the public operators: tests/batch_norm.py's rules."""

from collections import Counter

import pytest
import torch
from batch_norm import (
    CHANNELS,
    DTYPES,
    MODES,
    Case,
    assert_exact,
    assert_right,
    assert_statistics_are_right,
    integer_case,
    random_case,
    random_map,
)
from checks import LAYOUTS, assert_same_special_values

from resnet_fast import use_backend
from resnet_fast.kernels import batch_norm_relu as module
from resnet_fast.ops import batch_norm_relu, batch_norm_statistics
from resnet_fast.ops.arguments import unpack_bits
from resnet_fast.ops.batch_norm_relu import Norm, apply_kernel, backward_kernel

from .kernels import launches

pytestmark = [
    pytest.mark.usefixtures("triton_backend", "poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy on the special values that are asked for here
]

# Of 64 channels a tile of the statistics has 128 pixels, one of anything else 64 or 32, and a chunk here 128.
SIZES = ((2, 1, 1), (1, 1, 3), (1, 31, 1), (3, 5, 7), (1, 8, 16), (1, 129, 1), (2, 11, 12))


def unaligned(t: torch.Tensor) -> torch.Tensor:
    """In channels_last, beginning where no vector of 16 bytes may."""
    n, c, h, w = t.shape
    return torch.empty(t.numel() + 3, dtype=t.dtype)[3:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(t)


LAYOUTS = {
    **LAYOUTS,
    "unaligned": unaligned,
    "inside a map": lambda t: LAYOUTS["channels_last"](torch.nn.functional.pad(t, (1, 2, 3, 1)))[:, :, 3:-1, 1:-2],
}
NAN, INF = float("nan"), float("inf")


def assert_same(ours: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == other.keys()
    for name, t in ours.items():
        assert torch.equal(t, other[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, dtype):
    """Of 24 channels 32 lanes of 16 bits, or 16 of float32, have 8 pixels each: more than one chunk."""
    assert_right(random_case(mode, (3, 24, 9, 11), dtype, affine=dtype != torch.bfloat16))
    assert_exact(integer_case(mode, dtype=dtype))


@pytest.mark.parametrize("mode", ("norm and relu", "projection"))
@pytest.mark.parametrize("c", CHANNELS)
def test_channels(c, mode):
    assert_right(random_case(mode, (2, c, 5, 7), DTYPES[CHANNELS.index(c) % 3]))


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    mode, dtype = MODES[SIZES.index(size) % len(MODES)], DTYPES[SIZES.index(size) % len(DTYPES)]
    n, h, w = size
    assert_right(random_case(mode, (n, 64, h, w), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", (0.0, 100.0))
def test_statistics(mean, dtype):
    """One pixel more than a chunk; and a first pixel that is far from all others."""
    x = random_map(1, 72, 129, 1, dtype=dtype, mean=mean)
    assert_statistics_are_right(x)
    x[0, :, 0, 0] = mean - 4.0
    assert_statistics_are_right(x)


@pytest.mark.parametrize(("programs", "dtype"), [(1, torch.bfloat16), (2, torch.float32), (1024, torch.float16)])
def test_chunks(programs, dtype, monkeypatch):
    """Many tiles of one chunk, and many chunks."""
    monkeypatch.setattr(module, "_PROGRAMS", programs)
    x = random_map(2, 24, 29, 17, dtype=dtype, mean=30.0)
    assert module._Cut.of(x).chunks == min(programs, 4)
    assert_statistics_are_right(x)


def test_twice_the_same(monkeypatch):
    monkeypatch.setattr(module, "_PROGRAMS", 2)
    case = random_case("residual", (2, 24, 29, 11), torch.bfloat16)
    assert_right(case)
    assert_same(case.run(reference=False), case.run(reference=False))


def test_large_mean():
    """Of a mean that is 100 times the deviation nothing is left in result and gradients."""
    assert_right(random_case("norm and relu", (2, 33, 9, 8), torch.float32, mean=100.0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    """The same bits as from maps in channels_last, in maps of exactly these strides."""
    maps = [LAYOUTS[layout](random_map(2, 20, 5, 6, dtype=torch.bfloat16)) for _ in range(3)]

    def run(input: torch.Tensor, shortcut: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
        norms = [Norm(*batch_norm_statistics(t), None, None, 1e-5) for t in (input, shortcut)]
        out, mask = apply_kernel("triton", input, norms[0], shortcut, norms[1], with_mask=True)
        of_projection = backward_kernel("triton", grad, input, norms[0], mask, shortcut, norms[1])
        return [out, mask, *of_projection, *backward_kernel("triton", grad, input, norms[0], needs_residual=True)]

    found, expected = run(*maps), run(*(t.contiguous(memory_format=torch.channels_last) for t in maps))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    strides = torch.empty(2, 20, 5, 6, memory_format=torch.channels_last).stride()
    assert all(t.stride() == strides for t in found if t.shape == maps[0].shape)


@pytest.mark.parametrize("mode", ("norm and relu", "residual", "projection"))
def test_special_values(mode):
    """NaN and infinities stand where the reference has them: those of input in the whole channel."""
    case = random_case(mode, (2, 20, 4, 5))
    case.input[1, 3, 2, 2], case.input[0, 5, 0, 0], case.input[1, 7, 3, 4] = NAN, INF, -INF
    for i, value in enumerate((NAN, INF, -INF)):
        case.grad[0, 8 + i, 1, 1] = value
        if case.residual is not None:
            case.residual[1, 11 + i, 2, 0] = value
    ours = case.run(reference=False)
    with use_backend("reference"):
        expected = case.run(reference=False)
    assert expected["out"].isnan().any() and expected["input"].isnan().any()
    for name, out in ours.items():
        assert_same_special_values(out, expected[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", (1, 12, 65))
def test_result_and_mask_are_the_references(c, dtype):
    """Bit for bit from the same statistics, and with values that the dtype rounds to zero."""
    maps = [random_map(2, c, 5, 7, dtype=dtype) for _ in range(2)]
    norm = Norm(torch.randn(c), torch.rand(c) + 0.5, torch.randn(c) * 10.0 ** -torch.arange(c).fmod(9), None, 1e-5)
    other = Norm(torch.randn(c), torch.rand(c) + 0.5, None, torch.randn(c), 1e-3)
    small = maps[1] * 2.0**-24
    for args in ((None, None), (maps[1], None), (small, None), (maps[1], other)):
        ours, expected = (apply_kernel(b, maps[0], norm, *args, True, True) for b in ("triton", "reference"))
        assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    assert torch.equal(unpack_bits(ours[1], c), ours[0] > 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sign_is_computed_again(dtype):
    """Without a mask the gradient is that with the mask of the same values, rounded to zero or not."""
    x, grad = random_map(2, 20, 9, 8, dtype=dtype), random_map(2, 20, 9, 8, dtype=dtype)
    norm = Norm(torch.randn(20), torch.rand(20) + 0.5, torch.randn(20) * 10.0 ** -torch.arange(20).fmod(9), None, 1e-5)
    out, mask = apply_kernel("triton", x, norm, with_mask=True)
    assert ((out == 0) & (norm.apply(x) > 0)).any() == (dtype == torch.float16)
    found = [backward_kernel("triton", grad, x, norm, m) for m in (None, mask)]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
def test_vectors_of_any_dtype_and_strides(dtype):
    case = random_case("projection", (2, 20, 3, 5))
    wide = {name: t.to(dtype).repeat_interleave(2)[::2] for name, t in case.vectors.items()}
    found = Case(case.mode, case.input, case.grad, case.residual, wide).run(reference=False)
    rounded = {name: t.to(dtype).float() for name, t in case.vectors.items()}
    expected = Case(case.mode, case.input, case.grad, case.residual, rounded).run(reference=False)
    assert_same(found, {name: t.to(found[name].dtype) for name, t in expected.items()})


@pytest.mark.parametrize("mode", MODES)
def test_passes_over_memory(mode):
    """The statistics take one read, the result one, the gradient two; what combines chunks reads no map."""
    case = random_case(mode)
    with launches() as found:
        case.run(reference=False)
    maps = 2 if mode == "projection" else 1
    assert found == Counter(
        batch_norm_moments_kernel=maps, batch_norm_statistics_kernel=maps, batch_norm_relu_kernel=1,
        batch_norm_grad_sums_kernel=1, batch_norm_grad_vectors_kernel=1, batch_norm_grad_kernel=1,
    )  # fmt: skip


@pytest.mark.parametrize("batch", (32, 256))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_programs(dtype, batch):
    """Every map of ResNet-50 keeps an H100's 132 multiprocessors busy, and chunks are all but equally long."""
    for c, size in ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)):
        x = torch.empty(batch, c, size, size, dtype=dtype, device="meta", memory_format=torch.channels_last)
        cut = module._Cut.of(x)
        tile = module._RUN_OF_MOMENTS * cut.lanes
        assert cut.grid[0] <= module._PROGRAMS and cut.chunk % tile == 0
        assert cut.grid[0] >= min(4 * 132, cut.pixels // tile * (c // cut.block_c))
        assert cut.sizes["UNIT"] == cut.block_c and cut.sizes["WHOLE"]  # one kernel for all of them


def test_statistics_alone_and_nothing_asked_for():
    x = random_map(2, 9, 4, 4)
    mean, var = batch_norm_statistics(x)
    out, mask, *statistics = batch_norm_relu(x, None, None, relu=False)
    assert mask.numel() == 0 and torch.equal(statistics[0], mean) and torch.equal(statistics[1], var)
    found = backward_kernel("triton", x, x, Norm(mean, var, None, None, 1e-5), relu=False)
    assert found[3].shape == found[4].shape == (0,) and out.shape == x.shape
