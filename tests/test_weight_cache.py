"""Nothing goes stale: whatever changes a weight or a BatchNorm tensor, the next result is the new one."""

import copy
import gc

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast.nn import Residual
from resnet_fast.ops import conv_bn_relu, conv_bn_relu_ref
from resnet_fast.ops.weight_cache import cast_weights, packed_weights


@pytest.fixture
def block():
    return Residual(8, 8).eval()


def plain(block, x):
    with resnet_fast.use_backend("reference"):
        return block(x)


def assert_current(block, x):
    assert resnet_fast.explain(block).blocks[0].fused
    assert torch.allclose(block(x), plain(block, x), atol=1e-5)


def scale_all(weight):
    weight.data.mul_(1.5)


def prune_a_filter(weight):
    weight.data[3] = 0


def prune_a_channel(weight):
    weight.data[:, 5] = 0


def swap_storage(weight):
    weight.data = weight.data.clone() * 2


def write_in_no_grad(weight):
    with torch.no_grad():
        weight.add_(0.25)


@pytest.mark.parametrize("write", (scale_all, prune_a_filter, prune_a_channel, swap_storage, write_in_no_grad))
@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_writes_are_seen(block, write, mode):
    x = torch.randn(2, 8, 6, 6)
    with mode():
        assert_current(block, x)
        before = block(x)
    write(block.conv2.weight)
    with mode():
        assert_current(block, x)
        assert not torch.equal(block(x), before)


@pytest.mark.parametrize("groups", (1, 2, 8))
@pytest.mark.parametrize("shape", ((16, 8, 3, 3), (8, 16, 1, 1), (24, 24, 5, 3)))
def test_every_filter_and_channel_is_sampled(shape, groups):
    k, c, r, s = shape
    weight = torch.randn(k, c // groups, r, s)
    fingerprint = torch.ops.resnet_fast._fingerprint(weight, groups, [])
    matches = torch.ops.resnet_fast._fingerprint_matches
    assert matches(fingerprint, weight, groups, [])
    for i in range(k):
        changed = weight.clone()
        changed[i] += 1
        assert not matches(fingerprint, changed, groups, [])
    for group in weight.chunk(groups) if groups > 1 else [weight]:
        for j in range(c // groups):
            saved = group[:, j].clone()
            group[:, j] += 1
            assert not matches(fingerprint, weight, groups, [])
            group[:, j] = saved
    assert matches(fingerprint, weight, groups, [])


def test_every_bit_of_the_vectors_counts():
    weight, vectors = torch.randn(4, 4, 1, 1), [torch.randn(100), torch.randn(50).double(), torch.randn(20).half()]
    fingerprint = torch.ops.resnet_fast._fingerprint(weight, 1, vectors)
    for v in vectors:
        for i in range(len(v)):
            saved = v[i].clone()
            v[i] = torch.nextafter(v[i].float(), torch.tensor(torch.inf)) if v.dtype != torch.double else v[i] + 1e-12
            if v[i] != saved:
                assert not torch.ops.resnet_fast._fingerprint_matches(fingerprint, weight, 1, vectors)
            v[i] = saved


@pytest.mark.parametrize("name", ("weight", "bias", "running_mean", "running_var"))
def test_batch_norm_writes_are_seen(block, name):
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        before = block(x)
        getattr(block.bn1, name).data[2] += 0.5
        assert_current(block, x)
        assert not torch.equal(block(x), before)


def test_another_reading_of_the_same_bytes_is_seen():
    x, weight, var = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 1, 1), torch.rand(4).half() + 0.5
    mean = torch.rand(4).half()
    with torch.no_grad():
        for dtype in (torch.half, torch.bfloat16, torch.half):
            args = (x, weight, None, None, None, mean.view(dtype), var.view(dtype))
            assert torch.allclose(conv_bn_relu(*args), conv_bn_relu_ref(*args), rtol=1e-4, atol=1e-4)
        square = weight.view(4, 4)
        for view in (square, square.t()):
            args = (x, view.unflatten(1, (4, 1, 1)), None, None, None, mean, var)
            assert torch.allclose(conv_bn_relu(*args), conv_bn_relu_ref(*args), rtol=1e-4, atol=1e-4)


def test_eps_is_seen(block):
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        block(x)
        block.bn2.eps = 0.7
        assert_current(block, x)


def test_the_whole_life_of_a_model(block):
    """Optimizer steps, train and eval in turn, assigned state, new parameters, copies: every answer is current."""
    x = torch.randn(4, 8, 6, 6)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    for _ in range(3):
        block.train()
        block(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        block.eval()
        with torch.no_grad():
            assert_current(block, x)

    other = Residual(8, 8)
    block.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert_current(block, x)
    block.load_state_dict(Residual(8, 8).state_dict(), assign=True)
    with torch.no_grad():
        assert_current(block, x)
    block.conv1.weight = nn.Parameter(torch.randn(8, 8, 3, 3))
    with torch.no_grad():
        assert_current(block, x)

    twin = copy.deepcopy(block)
    with torch.no_grad():
        twin.conv1.weight.zero_()
        assert_current(twin, x)
        assert_current(block, x)
        assert not torch.equal(twin(x), block(x))


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        block = Residual(8, 8).eval()
        x = torch.randn(1, 8, 6, 6)
        assert_current(block, x)
        block.conv1.weight.mul_(2)
        assert_current(block, x)


def test_one_weight_under_two_batch_norms_is_packed_twice_and_kept(block):
    block.conv2 = block.conv1
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        assert_current(block, x)
        assert len(packed_weights) == 2
        assert_current(block, x)
        assert len(packed_weights) == 2


def kept_values():
    entries = packed_weights._entries.values()
    return [use.value for entry in entries for uses in entry.uses.values() for use in uses]


def test_packed_once(block):
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        block(x)
        first = kept_values()
        block(x)
        second = kept_values()
    assert len(first) == 2 and all(a is b for a, b in zip(first, second, strict=True))


def test_stale_entries_do_not_pile_up(block):
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        for _ in range(20):
            block(x)
            block.conv1.weight.add_(1e-3)
            block.conv2.weight.data.mul_(1.01)
            block.bn2.bias.data.add_(0.01)
    assert len(packed_weights) == 2


def test_packed_shapes_are_bounded(block):
    with torch.no_grad():
        for size in range(4, 30):
            block(torch.randn(1, 8, size, size))
    folded = kept_values()
    assert len(folded) == 2 and all(len(f.packed) <= 8 for f in folded)


def test_entries_die_with_their_weight(block):
    with torch.no_grad():
        block(torch.randn(1, 8, 6, 6))
    assert len(packed_weights) == 2
    del block.conv1
    gc.collect()
    assert len(packed_weights) == 1


def test_clear_cache(block):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        block(torch.randn(1, 8, 6, 6).bfloat16())
    assert len(packed_weights) == 2 and len(cast_weights) == 2
    resnet_fast.clear_cache()
    assert len(packed_weights) == 0 and len(cast_weights) == 0


def test_single_element_is_what_clear_cache_is_for(block):
    """The documented limit, kept as a test so that the documentation stays true."""
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        block(x)
        block.conv1.weight.data[0, 1, 2, 2] += 5  # filter 0 is sampled at channel 0
        stale = block(x)
        resnet_fast.clear_cache()
        assert not torch.allclose(block(x), stale)
        assert_current(block, x)
