"""The CUDA convolutions, through the public operator and tile by tile."""

import pytest
import torch
from checks import LAYOUTS, assert_accurate, assert_same_special_values, rounded_to_tf32
from test_conv_bn_relu import FIRST_LAYERS, GEOMETRIES, TAILS, in_channels_last, in_double, problem

import resnet_fast
from resnet_fast.bench import layers
from resnet_fast.choose import CUDA_TILES
from resnet_fast.ops import conv_bn_relu, conv_bn_relu_ref

from . import emulated

pytestmark = pytest.mark.usefixtures("cuda_backend")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Around a chunk of 16 bytes of either width, around the 4 channels that a first layer is padded to, around a step of the
# reduction (32 and 16 channels) and around the narrowest and the widest tile.
CHANNELS = (1, 3, 4, 5, 8, 12, 16, 17, 24, 32, 40)
FILTERS = (1, 7, 8, 9, 33, 64, 72, 136)


def as_multiplied(tensors):
    """The operands as tensor cores see them."""
    if tensors["input"].dtype != torch.float32:
        return tensors
    return {**tensors, "input": rounded_to_tf32(tensors["input"]), "weight": rounded_to_tf32(tensors["weight"])}


def assert_right(tensors, how):
    before = {name: None if t is None else t.clone() for name, t in tensors.items()}
    with emulated.launches() as found:
        out = conv_bn_relu(**tensors, **how)
    assert found.total() == 1
    exact = conv_bn_relu_ref(**in_double(as_multiplied(tensors)), **how)
    stock = [conv_bn_relu_ref(**t, **how) for t in (tensors, in_channels_last(tensors))]
    assert_accurate(out, exact, stock)
    assert out.stride() == torch.empty(out.shape, memory_format=torch.channels_last).stride()
    assert all(t is None or torch.equal(t, before[name]) for name, t in tensors.items()), "an input was changed"


def run_tile(tensors, how, tile):
    """The operator below the public one, which takes a tile; pairs must be pairs."""
    pairs = [list(how[name]) for name in ("stride", "padding", "dilation")]
    index = -1 if tile is None else CUDA_TILES.index(tile)
    op = torch.ops.resnet_fast._conv_bn_relu_cuda
    return op(*tensors.values(), *pairs, how["groups"], how["eps"], how["relu"], index)


def assert_exact(tensors, how, tile=None):
    """Bit for bit on integers, on whose sums no rounding falls before the last one."""
    ref = conv_bn_relu_ref(**in_double(tensors), **how)
    assert torch.equal(run_tile(tensors, how, tile), ref.to(tensors["input"].dtype))


def integers(**how):
    return problem(**{"eps": 0.0, **how}, integers=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", FILTERS)
@pytest.mark.parametrize("c", CHANNELS)
def test_channels(c, k, dtype):
    assert_exact(*integers(c=c, k=k, h=6, w=5, bias=True, residual=True, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", {**GEOMETRIES, **FIRST_LAYERS})
def test_geometries(geometry, dtype):
    how = {**{**GEOMETRIES, **FIRST_LAYERS}[geometry]}
    assert_right(*problem(**how, residual=True, dtype=dtype))
    assert_exact(*integers(**how, residual=True, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", TAILS)
def test_tails(tail, dtype):
    assert_right(*problem(c=24, k=40, **TAILS[tail], dtype=dtype))
    assert_right(*problem(c=6, k=5, **TAILS[tail], dtype=dtype))


# More than one tile in each direction; images that begin and end inside a tile; slices of channels that are not full.
SEVERAL_TILES = {
    "3x3": dict(c=40, k=136, h=13, w=11),
    "3x3 of 7 pixels": dict(n=7, c=32, k=72, h=7, w=7),
    "3x3 wide": dict(n=1, c=16, k=8, h=3, w=150),
    "3x3 tall": dict(n=1, c=16, k=8, h=140, w=2),
    "dilated": dict(c=16, k=16, h=15, w=13, dilation=(2, 3), padding=(2, 3)),
    "no padding": dict(c=48, k=16, h=12, w=11, padding=(0, 0)),
    "more padding than window": dict(n=1, c=16, k=16, h=5, w=4, padding=(4, 3)),
    "5x1": dict(c=16, k=16, h=12, w=13, kernel=(5, 1), padding=(2, 0)),
    "1x3": dict(c=16, k=16, h=12, w=13, kernel=(1, 3), padding=(0, 1)),
    "groups": dict(c=48, k=80, groups=2, h=9, w=9),
    "groups of 8": dict(c=32, k=32, groups=4, h=9, w=9),
}
NO_HALO = {
    "1x1": dict(c=72, k=136, h=13, w=11, kernel=(1, 1), padding=(0, 0)),
    "1x1 stride 2": dict(c=40, k=72, h=19, w=21, kernel=(1, 1), padding=(0, 0), stride=(2, 2)),
    "3x3 stride 2": dict(c=40, k=72, h=19, w=22, stride=(2, 2)),
    "one pixel": dict(n=140, c=16, k=16, h=1, w=1),  # its window takes nine positions
    "3x3 of wide images": dict(n=2, c=16, k=8, h=1, w=200),
    "stride by column": dict(c=16, k=8, h=9, w=40, stride=(1, 3), padding=(2, 0), dilation=(2, 1)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", CUDA_TILES)
@pytest.mark.parametrize("case", {**SEVERAL_TILES, **NO_HALO})
def test_every_tile(case, tile, dtype):
    tensors, how = integers(**{**SEVERAL_TILES, **NO_HALO}[case], bias=True, residual=True, dtype=dtype)
    if tile.startswith("halo") and case in NO_HALO:
        with pytest.raises(RuntimeError, match="does not take this convolution"):
            run_tile(tensors, how, tile)
    else:
        assert_exact(tensors, how, tile)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", CUDA_TILES)
@pytest.mark.usefixtures("order")
def test_in_any_order(tile, dtype):
    """Whatever order threads run in, whenever what they copy arrives."""
    assert_exact(*integers(c=72, k=72, h=12, w=12, residual=True, dtype=dtype), tile)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ("7x7 stem", "33 filters, 7 columns"))
@pytest.mark.usefixtures("order")
def test_element_by_element_in_any_order(case, dtype):
    assert_exact(*integers(**FIRST_LAYERS[case], dtype=dtype))


@pytest.mark.parametrize("tile", CUDA_TILES)
def test_the_same_bits_in_any_order(tile):
    tensors, how = problem(c=40, k=72, residual=True, dtype=torch.float32)
    results = []
    for order in emulated.ORDERS:
        emulated.configure(*order)
        results.append(run_tile(tensors, how, tile))
    assert all(torch.equal(results[0], other) for other in results)


SMALLER_LAYERS = [x for x in layers.distinct(layers.MODELS) if x.channels // x.groups * x.filters < 2**17]


@pytest.mark.parametrize("layer", SMALLER_LAYERS, ids=str)
def test_layers_of_the_models(layer):
    """All but the largest, which differ from these in numbers of steps and tiles alone."""
    kernel, stride, padding = ((n, n) for n in (layer.kernel, layer.stride, layer.padding))
    size = dict(h=min(layer.size, 9), w=min(layer.size, 9), n=1, c=layer.channels, k=layer.filters, groups=layer.groups)
    tail = dict(residual=layer.residual, relu=layer.relu)
    assert_exact(*integers(**size, kernel=kernel, stride=stride, padding=padding, **tail, dtype=torch.bfloat16))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("c", (6, 16))
def test_any_strides(c, layout):
    tensors, how = integers(c=c, k=c, h=8, w=8, residual=True, dtype=torch.bfloat16)
    for name in ("input", "weight", "residual"):
        assert_exact({**tensors, name: LAYOUTS[layout](tensors[name])}, how)


@pytest.mark.parametrize("name", ("input", "weight", "residual"))
def test_memory_that_is_not_aligned(name):
    tensors, how = integers(c=16, k=16, h=5, w=6, residual=True, dtype=torch.float16)
    for offset in (1, 4):
        t = tensors[name]
        moved = torch.empty(t.numel() + offset, dtype=t.dtype)[offset:]
        moved = moved.view(t.shape[0], *t.shape[2:], t.shape[1]).permute(0, 3, 1, 2).copy_(t)
        assert moved.data_ptr() % 16 != 0
        assert_exact({**tensors, name: moved}, how)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_norm_of_any_dtype_and_strides(dtype):
    tensors, how = integers(c=16, k=24, bias=True, dtype=dtype)
    for of_vectors in (torch.float64, *DTYPES):
        for name in ("bn_weight", "bn_bias", "running_mean", "running_var"):
            wide = torch.zeros(48, dtype=of_vectors)
            wide[::2] = tensors[name]
            tensors[name] = wide[::2]
        assert_exact(tensors, how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", (True, False))
@pytest.mark.parametrize("where", ("input", "weight", "residual", "bias", "bn_bias", "running_mean"))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_nan_and_inf(value, where, relu, dtype):
    # Like cuDNN's, the kernel multiplies weights with the zeros of the padding.
    padding = (0, 0) if where == "weight" else (1, 1)
    for c, k in ((16, 24), (3, 5)):
        tensors, how = problem(c=c, k=k, h=5, w=5, padding=padding, bias=True, residual=True, relu=relu, dtype=dtype)
        tensors[where].view(-1)[tensors[where].numel() // 2] = value
        assert_same_special_values(conv_bn_relu(**tensors, **how), conv_bn_relu_ref(**tensors, **how))


@pytest.mark.parametrize("where", ("input", "weight"))
@pytest.mark.parametrize("bits", (0x7FFFFFFF, 0x7F800001, -1, 0x7F800000), ids=hex)  # NaN of every kind, infinity
def test_tf32_keeps_nan_and_inf(bits, where):
    for c in (3, 16):
        tensors, how = problem(c=c, k=5, h=5, w=5, padding=(0, 0), relu=False)
        tensors[where].view(-1).view(torch.int32)[tensors[where].numel() // 2] = bits
        assert_same_special_values(conv_bn_relu(**tensors, **how), conv_bn_relu_ref(**tensors, **how))


def test_nothing_goes_stale():
    tensors, how = integers(c=16, k=16, dtype=torch.bfloat16)
    for _ in range(2):
        assert_exact(tensors, how)
        tensors["weight"].data.mul_(-1)
        tensors["running_var"].data.mul_(4)


def called(tensors, how):
    """The names of torch's operators that run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run_tile(tensors, how, None)
    return {event.name for event in profile.events()}


def test_nothing_is_copied_where_channels_are_last():
    tensors, how = integers(c=16, k=24, bias=True, residual=True, dtype=torch.bfloat16)
    last = in_channels_last(tensors)
    assert not called(last, how) & {"aten::clone", "aten::copy_"}
    assert called({**last, "weight": tensors["weight"]}, how) & {"aten::clone", "aten::copy_"}


@pytest.mark.parametrize("c", (8, 7))
def test_more_elements_than_32_bits_count(c):
    """Of an input of which next to nothing is read, so that it takes no memory."""
    x = torch.empty(2, 16385, 8200 * 8 // c, c, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    tensors, how = integers(c=c, k=16, h=5, w=3, kernel=(1, 1), padding=(0, 0), dtype=torch.bfloat16)
    x[:, :, ::4096, ::4099] = tensors["input"]
    assert x[:, :, ::4096, ::4099].shape == tensors["input"].shape
    small, strided = conv_bn_relu(**tensors, **how), {**how, "stride": [4096, 4099]}
    assert torch.equal(conv_bn_relu(**{**tensors, "input": x}, **strided), small)


def test_float32_needs_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    tensors, how = problem()
    with pytest.raises(RuntimeError, match=r"multiplies as TF32: torch\.backends\.cudnn\.allow_tf32 is False"):
        conv_bn_relu(**tensors, **how)


def test_refusals():
    tensors, how = problem(c=16, k=16, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="there is no tile"):
        torch.ops.resnet_fast._conv_bn_relu_cuda(
            *tensors.values(), [1, 1], [1, 1], [1, 1], 1, how["eps"], True, len(CUDA_TILES)
        )
    with pytest.raises(RuntimeError, match="fewer than 2\\^30 rows and columns"):
        conv_bn_relu(**tensors, **{**how, "padding": [2**29, 1], "stride": [2**29, 1]})
    with pytest.raises(RuntimeError, match="weight must have 4 dimensions"):
        conv_bn_relu(**{**tensors, "weight": tensors["weight"][0]}, **how)


@pytest.mark.parametrize("tile", CUDA_TILES)
def test_bank_conflicts(tile):
    """None where operands are copied in and multiplied; the passes through the staging rows meet each bank at most
    twice in a load."""
    tensors, how = problem(n=1, c=64, k=128, h=16, w=16, dtype=torch.bfloat16)
    with emulated.shared_memory() as found:
        run_tile(tensors, how, tile)
    assert found.accesses > 1000
    assert found.wavefronts <= 1.15 * found.best, (found.wavefronts, found.best)


def test_explain_names_the_kernel():
    from resnet_fast.ops.conv_bn_relu import kernel_for

    tensors, how = problem(c=16, k=16, dtype=torch.bfloat16)
    assert kernel_for(*tensors.values(), *how.values()) == ("CUDA C++", True)
    assert resnet_fast.backends()["cuda"].devices == ("cpu",)
