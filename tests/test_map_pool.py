"""Memory of large feature maps: used again once nobody holds it, never before, and bounded."""

import gc
import os
import threading

import pytest
import torch

import resnet_fast
from resnet_fast.ops import conv_bn_relu, conv_bn_relu_ref

idle = torch.ops.resnet_fast._map_pool_bytes
SIZE = 4 * 64 * 80 * 80 * 4  # bytes of the map below: more than a megabyte


def arguments(n=4, c=16):
    return torch.randn(n, c, 80, 80), torch.randn(64, c, 1, 1), None, None, None, torch.randn(64), torch.rand(64) + 0.5


def conv(args, dtype=torch.float32):
    with torch.no_grad():
        return conv_bn_relu(*(t.to(dtype) if isinstance(t, torch.Tensor) and t.dim() == 4 else t for t in args))


@pytest.fixture(autouse=True)
def empty_pool():
    gc.collect()
    resnet_fast.clear_cache()
    assert idle() == 0


def test_memory_is_used_again_when_the_last_tensor_is_gone():
    args = arguments()
    out = conv(args)
    address, view = out.data_ptr(), out[1:, ::2]
    assert idle() == 0
    kept = view.clone()
    del out
    other = conv(args)
    assert other.data_ptr() != address and torch.equal(view, kept)
    del view
    assert idle() >= SIZE
    assert conv(args).data_ptr() == address
    resnet_fast.clear_cache()
    assert idle() == 0


def test_results_that_are_kept_stay():
    args = [arguments() for _ in range(6)]
    outs = [conv(a) for a in args]
    assert len({o.data_ptr() for o in outs}) == 6
    for out, a in zip(outs, args, strict=True):
        assert torch.allclose(out, conv_bn_relu_ref(*a), atol=1e-4)


def test_a_small_map_does_not_take_a_large_block():
    large = conv(arguments(n=16))
    del large
    before = idle()
    small = conv(arguments(n=4))
    assert idle() == before and small.shape[0] == 4
    tiny = conv((torch.randn(1, 16, 4, 4), *arguments()[1:]))
    del tiny
    assert idle() == before  # malloc serves those


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_every_dtype_and_what_torch_does_with_the_result(dtype):
    args = arguments()
    for _ in range(2):
        out = conv(args, dtype)
        assert out.is_contiguous(memory_format=torch.channels_last) and out.untyped_storage().nbytes() >= out.nbytes
        out.add_(1)
        assert torch.equal(out.clone().share_memory_(), out) and torch.equal(out.contiguous(), out)


def test_idle_memory_is_bounded():
    bound = min(2**30, os.sysconf("SC_PHYS_PAGES") // 8 * os.sysconf("SC_PAGE_SIZE"))
    args = arguments(n=16)
    outs = [conv(args) for _ in range(bound // (4 * SIZE) + 3)]
    assert len(outs) * 4 * SIZE > bound
    del outs
    assert bound - 8 * SIZE <= idle() <= bound


def test_from_many_threads():
    args = [arguments(c=3 + i) for i in range(4)]
    expected = [conv_bn_relu_ref(*a) for a in args]
    wrong = []

    def run(i):
        for _ in range(20):
            if not torch.allclose(conv(args[i]), expected[i], atol=1e-4):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_forked_child_works_on_one_thread():
    args = arguments()
    expected = conv(args)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # as torch's own operators need it
        os.write(write, b"same" if torch.equal(conv(args), expected) else b"other")
        os._exit(0)
    os.close(write)
    assert os.read(read, 10) == b"same"
    os.waitpid(pid, 0)
