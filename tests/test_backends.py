import os
import subprocess
import sys
import threading

import pytest
import torch

import resnet_fast
from resnet_fast.backends import forced
from resnet_fast.measure import environment


def python(code, **env):
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True)


def test_every_backend_is_listed_with_a_reason():
    found = resnet_fast.backends()
    assert list(found) == ["reference", "cpu", "triton", "cuda", "cudnn"]
    assert found["reference"].available and found["cpu"].available
    assert all(b.reason for b in found.values())


def test_switch_nests_and_returns():
    assert forced() is None
    with resnet_fast.use_backend("reference"):
        with resnet_fast.use_backend("cpu"):
            assert forced() == "cpu"
            with resnet_fast.use_backend(None):
                assert forced() is None
        assert forced() == "reference"
    assert forced() is None


def test_switch_returns_after_an_error_and_holds_for_its_thread_alone():
    with pytest.raises(ZeroDivisionError), resnet_fast.use_backend("reference"):
        seen = []
        thread = threading.Thread(target=lambda: seen.append(forced()))
        thread.start()
        thread.join()
        assert seen == [None]
        _ = 1 / 0
    assert forced() is None


def test_unknown_and_missing_backends_are_refused_in_words():
    with pytest.raises(ValueError, match="must be one of reference, cpu, triton, cuda, cudnn, got 'cublas'"):
        resnet_fast.use_backend("cublas").__enter__()
    if not torch.cuda.is_available():
        for name in ("cuda", "cudnn"):
            with pytest.raises(RuntimeError, match=f"backend '{name}' does not work here"):
                resnet_fast.use_backend(name).__enter__()


def test_environment_variable():
    code = "from resnet_fast.backends import forced; print(forced())"
    assert python(code, RESNET_FAST_BACKEND="reference").stdout.strip() == "reference"
    assert "must be one of" in python(code, RESNET_FAST_BACKEND="nonsense").stderr


def test_interpreted_bfloat16_is_refused_in_words():
    pytest.importorskip("triton")
    code = "import torch, resnet_fast as r; x = torch.ones(2, dtype=torch.bfloat16); r.ops.add_relu(x, x)"
    run = python(code, TRITON_INTERPRET="1", RESNET_FAST_BACKEND="triton")
    assert "computes on its raw bits" in run.stderr


def test_log_of_choices():
    code = "import torch, resnet_fast as r; r.ops.add_relu(torch.ones(2), torch.ones(2))"
    assert "add_relu cpu torch.float32: cpu (C++" in python(code, RESNET_FAST_LOG="choice").stderr


def test_import_is_light():
    """No compiler, no GPU, no torchvision, no Triton."""
    code = (
        "import sys, torch; before = set(sys.modules); import resnet_fast, resnet_fast.nn; "
        "print([m for m in set(sys.modules) - before if m.split('.')[0] in ('torchvision', 'triton', 'numpy')], "
        "torch.cuda.is_initialized())"
    )
    assert python(code).stdout.strip() == "[] False"


def test_operators_without_the_python_package():
    """A process that only loads the library runs every graph, on the plain kernels."""
    code = f"""
import torch
torch.ops.load_library({resnet_fast._C.__file__!r})
x, w, v = torch.randn(2, 3, 8, 8), torch.randn(3, 3, 3, 3), torch.rand(4, 3) + 0.5
out = torch.ops.resnet_fast.conv_bn_relu(x, w, None, *v[:2], *v[2:], x, [1, 1], [1, 1], [1, 1], 1, 1e-5, True)
ref = torch.batch_norm(torch.conv2d(x, w, None, 1, 1), *v, False, 0.0, 1e-5, False)
assert torch.equal(out, torch.relu(ref + x))
out = torch.ops.resnet_fast.conv_bn_relu(x, w, v[0], None, None, *v[2:], None, [2, 1], [1, 0], [1, 2], 1, 1e-5, False)
ref = torch.conv2d(x, w, v[0], (2, 1), (1, 0), (1, 2))
assert torch.equal(out, torch.batch_norm(ref, None, None, *v[2:], False, 0.0, 1e-5, False))
assert torch.equal(torch.ops.resnet_fast.add_relu(x, x.flip(0)), torch.relu(x + x.flip(0)))
out = torch.ops.resnet_fast.conv_bn_relu_max_pool(x, w, None, *v, [1, 1], [1, 1], [1, 1], 1, 0.5, [3, 3], [2, 2], [1, 1])
ref = torch.batch_norm(torch.conv2d(x, w, None, 1, 1), *v, False, 0.0, 0.5, False)
assert torch.equal(out, torch.max_pool2d(torch.relu(ref), 3, 2, 1))
last = [x, w, None, *v, x, w, v[0]]
how = [[1, 1], [1, 1], [1, 1], 1, 0.5, [1, 1], [2, 2], [2, 2], 1, 0.25]
ref, shortcut = torch.batch_norm(torch.conv2d(x, w, None, 1, 1), *v, False, 0.0, 0.5, False), torch.conv2d(x, w, v[0], 1, 2, 2)
out = torch.ops.resnet_fast.conv_bn_relu_projection(*last, None, None, None, None, *how)
assert torch.equal(out, torch.relu(ref + shortcut))
out = torch.ops.resnet_fast.conv_bn_relu_projection(*last, *v, *how)
assert torch.equal(out, torch.relu(ref + torch.batch_norm(shortcut, *v, False, 0.0, 0.25, False)))
try:
    torch.ops.resnet_fast.conv_bn_relu_projection(*last, None, None, v[2], None, *how)
    raise AssertionError("one statistic alone was taken")
except RuntimeError as error:
    assert "both running statistics" in str(error)
out = torch.ops.resnet_fast.max_pool(x, [2, 3], [2, 1], [1, 0], [1, 2], True)
assert torch.equal(out, torch.max_pool2d(x, (2, 3), (2, 1), (1, 0), (1, 2), True))
assert torch.equal(torch.ops.resnet_fast.avg_pool_flatten(x), x.mean((2, 3)))
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_models_without_torchvision_name_the_command():
    code = "import sys; sys.modules['torchvision'] = None; import resnet_fast.models"
    minor = int(torch.__version__.split(".")[1]) + 15
    assert f'"torchvision==0.{minor}.*"' in python(code).stderr


def test_a_measurement_knows_its_commit(tmp_path):
    root = os.path.dirname(os.path.dirname(resnet_fast.__file__))
    git = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
    if git.returncode:
        pytest.skip("this checkout is not one of git's")
    assert environment()["commit"].rstrip("+") == git.stdout[:12]
    copied = "import sys, resnet_fast.measure as m; m.__file__ = sys.argv[1]; print(m._commit())"
    elsewhere = subprocess.run(
        [sys.executable, "-c", copied, str(tmp_path / "measure.py")], capture_output=True, text=True
    )
    assert elsewhere.stdout.strip() == "None"
