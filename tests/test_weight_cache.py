"""Nothing goes stale: whatever changes a weight or a BatchNorm tensor, the next result is the new one."""

import copy
import gc
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast.nn import Residual
from resnet_fast.ops import conv_bn_relu, conv_bn_relu_ref
from resnet_fast.ops.weight_cache import packed_weights


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

    block.share_memory()  # other addresses, the same values and versions
    with torch.no_grad():
        assert_current(block, x)
        before = block(x)
        block.conv1.weight.data.mul_(1.5)
        assert_current(block, x)
        assert not torch.equal(block(x), before)


def test_a_write_by_another_process_is_seen(block):
    """Shared memory: filters and channels that another process scales are noticed like those of `.data`."""
    x = torch.randn(2, 8, 6, 6)
    block.share_memory()
    with torch.no_grad():
        before = block(x)
    writer = torch.multiprocessing.get_context("fork").Process(target=scale_all, args=(block.conv2.weight,))
    writer.start()
    writer.join(60)
    assert writer.exitcode == 0
    with torch.no_grad():
        assert_current(block, x)
        assert not torch.equal(block(x), before)


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


def packed_bytes():
    """Of distinct tensors, found without the cache's own bookkeeping."""
    gc.collect()
    tensors = {}
    for entry in packed_weights._entries.values():
        for uses in entry.uses.values():
            for use in uses:
                folded = use.value
                kept = [use.fingerprint, folded.bias, folded.direct, *(p.weight for p in folded.packed.values())]
                tensors |= {id(t): t.numel() * t.element_size() for t in kept if t is not None}
    return sum(tensors.values())


def test_bytes_are_counted(block):
    with torch.no_grad():
        for size in (6, 7, 8, 14):
            block(torch.randn(1, 8, size, size))
            assert packed_weights.bytes == packed_bytes() > 2 * 8 * 8 * 9 * 4
        one = packed_weights.bytes
        block(torch.randn(1, 8, 8, 6))  # another shape, for which the weights are there
        assert packed_weights.bytes == one
    info = resnet_fast.cache_info()
    assert info.weights == packed_weights.bytes and info.limit == packed_weights.limit
    assert resnet_fast.explain(block, torch.randn(1, 8, 6, 6)).cache.weights == info.weights
    del block.conv1
    gc.collect()
    assert packed_weights.bytes == packed_bytes() < info.weights


def layers(count, channels=16):
    return [
        (torch.randn(channels, channels, 3, 3), torch.randn(channels), torch.rand(channels) + 0.5) for _ in range(count)
    ]


def conv(x, layer):
    with torch.no_grad():
        return conv_bn_relu(x, layer[0], None, None, None, *layer[1:], padding=1)


def conv_ref(x, layer):
    return conv_bn_relu_ref(x, layer[0], None, None, None, *layer[1:], padding=1)


def test_what_is_packed_for_values_that_are_not_finite_is_counted():
    """Where Winograd's algorithm meets one, the weight is packed for the direct kernel, too."""
    layer = layers(1, 64)[0]
    conv(torch.randn(1, 64, 28, 28), layer)
    one = packed_weights.bytes
    assert conv(torch.full((1, 64, 28, 28), torch.nan), layer).isnan().all()
    assert packed_weights.bytes == packed_bytes() == one + 64 * 64 * 9 * 4


def test_the_least_recently_used_go_first(monkeypatch):
    x, some = torch.randn(1, 16, 12, 12), layers(6)
    conv(x, some[0])
    each = packed_weights.bytes
    monkeypatch.setattr(packed_weights, "limit", 4 * each)
    for layer in some[1:4]:
        conv(x, layer)
    conv(x, some[0])  # now some[1] is the oldest
    for layer in some[4:]:
        conv(x, layer)
        assert packed_weights.bytes == packed_bytes() == 4 * each
    assert set(packed_weights._entries) == {id(some[i][0]) for i in (0, 3, 4, 5)}
    for layer in some * 2:  # what was dropped is packed again
        assert torch.allclose(conv(x, layer), conv_ref(x, layer), atol=1e-4)
        assert packed_weights.bytes <= 4 * each


def test_a_model_above_the_bound_is_right(block, monkeypatch):
    monkeypatch.setattr(packed_weights, "limit", 0)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        for _ in range(2):
            assert_current(block, x)
            assert len(packed_weights) == 1  # the last one stays
        with torch.autocast("cpu", torch.bfloat16):  # a cast weight and what is packed of it drop each other
            assert torch.allclose(block(x).float(), plain(block, x).float(), rtol=0.05, atol=0.05)


def test_threads_that_drop_each_others_weights(monkeypatch):
    """Eight threads, eight layers, more shapes than are kept, room for two: every answer is that of one thread."""
    some, xs = layers(8), [torch.randn(1, 16, 4 + i, 5) for i in range(11)]
    expected = [[conv(x, layer) for x in xs] for layer in some]
    resnet_fast.clear_cache()
    monkeypatch.setattr(packed_weights, "limit", 300_000)
    wrong = []

    def work(first):
        try:
            for i in range(first, first + 3 * len(some)):
                for j in range(len(xs)):
                    at = (i + j) % len(some)
                    if not torch.equal(conv(xs[(first + j) % len(xs)], some[at]), expected[at][(first + j) % len(xs)]):
                        wrong.append((i, j))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert packed_weights.bytes == packed_bytes() <= 300_000


def test_threads_with_a_shape_each_share_one_weight():
    """More threads than shapes are kept."""
    layer, xs = layers(1)[0], [torch.randn(1, 16, 4 + i, 9) for i in range(12)]
    expected = [conv(x, layer) for x in xs]
    results = [[] for _ in xs]

    def work(i):
        results[i] = [conv(xs[i], layer) for _ in range(40)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for got, right in zip(results, expected, strict=True):
        assert len(got) == 40 and all(torch.equal(g, right) for g in got)


@pytest.mark.parametrize("text, limit", (("1000", "1000"), ("1e9", "ValueError: RESNET_FAST_CACHE_BYTES must be")))
def test_the_bound_is_set_by_the_environment(text, limit):
    code = "import resnet_fast; print(resnet_fast.cache_info().limit)"
    env = {**os.environ, "RESNET_FAST_CACHE_BYTES": text}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert limit in run.stdout + run.stderr


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
    assert len(packed_weights) == 4 and packed_weights.bytes > 0  # two casts, packed
    resnet_fast.clear_cache()
    assert len(packed_weights) == packed_weights.bytes == 0


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
