"""The CPU kernels and threads: torch's own pool only, as many threads as are set, also after fork and from many threads.

Every test runs in a process of its own, with a timeout: what goes wrong with threads often hangs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PRELUDE = """
import os, signal, sys, threading
import torch
import resnet_fast
from resnet_fast.ops import conv_bn_relu

ops = torch.ops.resnet_fast
torch.set_num_threads(1)  # what makes the tensors below starts no thread
torch.manual_seed(0)
torch.set_grad_enabled(False)

def layer(c, k, kernel, groups=1):
    weight = torch.randn(k, c // groups, kernel, kernel) / (c * kernel * kernel / groups) ** 0.5
    return weight, torch.randn(k), torch.rand(k) + 0.5

# Winograd, GEMM 1x1 and 3x3 with stride 2, first layer, groups; maps of megabytes come from the pool of maps.
LAYERS = [
    (layer(64, 64, 3), dict(padding=1)), (layer(64, 256, 1), {}), (layer(64, 96, 3), dict(padding=1, stride=2)),
    (layer(64, 64, 3, 4), dict(padding=1, groups=4)),
]
STEM = layer(3, 64, 7)
X, IMAGES = torch.randn(2, 64, 56, 56), torch.randn(2, 3, 64, 64)

def conv(x, layer, **how):
    weight, mean, var = layer
    return conv_bn_relu(x, weight, None, None, None, mean, var, **how)

def run_all():
    maps = [conv(X, layer, **how) for layer, how in LAYERS]
    maps.append(conv(IMAGES, STEM, stride=2, padding=3))
    maps += [resnet_fast.ops.add_relu(X, X.flip(0)), ops._max_pool_cpu(X, [3, 3], [2, 2], [1, 1], [1, 1], [28, 28])]
    return [*maps, ops._avg_pool_flatten_cpu(X)]

def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))

def threads():
    return len(os.listdir("/proc/self/task"))
"""


def python(code: str, timeout: int = 120, **env: str) -> str:
    """What the code behind PRELUDE prints."""
    command = [sys.executable, "-c", PRELUDE + code]
    result = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


@pytest.mark.parametrize("count", (1, 2, 3, 16))
def test_as_many_threads_as_are_set_and_no_second_pool(count):
    """Ours start as many as torch's own pool has, and torch's operators after them start none."""
    code = f"""
torch.set_num_threads({count})
before = threads()
ours = run_all()
after_ours = threads() - before
X.new_zeros(1 << 22).add_(1), torch.mm(torch.randn(512, 512), torch.randn(512, 512)), torch.conv2d(X, LAYERS[0][0][0])
after_torch = threads() - before
assert same(run_all(), ours)
print(after_ours, after_torch, threads() - before)
"""
    n = count - 1
    assert python(code) == f"{n} {n} {n}"


def test_fewer_threads_are_honoured():
    """Of threads that are there already, one works: the others use no processor time."""
    code = """
def ticks():
    spent = {}
    for task in os.listdir("/proc/self/task"):
        fields = open(f"/proc/self/task/{task}/schedstat").read().split()
        spent[task] = int(fields[0])  # nanoseconds on a processor
    return spent

torch.set_num_threads(2)
run_all()
torch.set_num_threads(1)
run_all()
before = ticks()
for _ in range(5):
    run_all()
worked = {task: spent - before.get(task, 0) for task, spent in ticks().items()}
own = worked.pop(str(threading.get_native_id()))
assert own > 1e6 and len(worked) >= 1
print(max(worked.values()) < own / 100)
"""
    assert python(code, OMP_WAIT_POLICY="passive") == "True"


@pytest.mark.parametrize("count", (1, 2, 3, 16))
def test_eight_python_threads_on_one_model(count):
    """Cold and warm, each of them gets what one alone gets, bit for bit."""
    code = f"""
from resnet_fast.nn import Residual

torch.set_num_threads({count})
model = torch.nn.Sequential(Residual(16, 16), Residual(16, 32, True, 2), Residual(32, 32)).eval()
x = torch.randn(2, 16, 40, 40)
expected = model(x), run_all()
resnet_fast.clear_cache()
sys.setswitchinterval(1e-5)
start, wrong = threading.Barrier(8), []

def work():
    torch.set_grad_enabled(False)
    torch.set_num_threads({count})  # the setting belongs to the thread
    start.wait()
    for _ in range(4):
        if not (torch.equal(model(x), expected[0]) and same(run_all(), expected[1])):
            wrong.append(1)

workers = [threading.Thread(target=work) for _ in range(8)]
for w in workers:
    w.start()
for w in workers:
    w.join()
print("wrong", len(wrong))
"""
    assert python(code) == "wrong 0"


def test_a_forked_child_on_one_thread():
    """Kernels, cache and pool of maps were used before by a pool of threads, which the child does not have."""
    code = """
torch.set_num_threads(2)
expected = run_all()
assert ops._map_pool_bytes() == 0
more = run_all()
del more
assert ops._map_pool_bytes() > 0 and resnet_fast.cache_info().weights > 0
for i in range(3):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # or a child that hangs outlives its parent
        try:
            torch.set_num_threads(1)
            right = same(run_all(), expected)
            LAYERS[0][0][0].data.mul_(2)  # what the child changes, the child packs anew
            right = right and not torch.equal(run_all()[0], expected[0])
            resnet_fast.clear_cache()
            right = right and same(run_all()[1:], expected[1:])
            os._exit(0 if right else 3)
        except BaseException:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same(run_all(), expected)
print("right")
"""
    assert python(code) == "right"


def test_a_child_forked_while_other_threads_pack():
    """The cache's lock may be held at that moment, by a thread that the child does not have."""
    code = """
from resnet_fast.ops.weight_cache import packed_weights

torch.set_num_threads(1)
expected = run_all()
held, done = threading.Event(), threading.Event()

def hold():
    with packed_weights._lock:
        held.set()
        done.wait()

holder = threading.Thread(target=hold)
holder.start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(30)  # or a child that hangs outlives its parent
    try:
        resnet_fast.clear_cache()
        os._exit(0 if same(run_all(), expected) else 3)
    except BaseException:
        os._exit(4)
status = os.waitpid(child, 0)[1]
done.set()
holder.join()
print(os.waitstatus_to_exitcode(status))
"""
    assert python(code) == "0"


@pytest.mark.parametrize("method", ("fork", "spawn"))
def test_data_loader_workers(method, tmp_path):
    """A dataset that computes features with our kernels, in two workers; the parent has used them before."""
    script = Path(tmp_path, "loader.py")
    script.write_text(
        PRELUDE
        + """
from torch.utils.data import DataLoader, Dataset
from resnet_fast.nn import Residual

class Features(Dataset):
    def __init__(self, model, images):
        self.model, self.images = model, images
    def __len__(self):
        return len(self.images)
    def __getitem__(self, i):
        torch.set_grad_enabled(False)
        assert torch.get_num_threads() == 1
        return self.model(self.images[i : i + 1])[0]

def main(method):
    torch.set_num_threads(2)
    model = torch.nn.Sequential(Residual(3, 64, True, 1), Residual(64, 64)).eval()
    images = torch.randn(6, 3, 72, 72)
    expected = [model(image[None])[0] for image in images]
    run_all()
    for _ in range(2):
        loader = DataLoader(Features(model, images), batch_size=None, num_workers=2, multiprocessing_context=method)
        assert same(list(loader), expected)
        assert same([model(image[None])[0] for image in images], expected)
    print("right")

if __name__ == "__main__":
    main(sys.argv[1])
"""
    )
    result = subprocess.run([sys.executable, script, method], capture_output=True, text=True, timeout=150)
    assert result.returncode == 0 and result.stdout.strip() == "right", result.stderr[-3000:]
