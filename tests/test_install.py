"""Installing: the user's torch stays as it is."""

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# As much of torch as setup.py looks at while pip plans.
STUB = {
    "torch/__init__.py": "from . import version\n__version__ = version.__version__\n",
    "torch/version.py": "__version__ = {version!r}\ncuda = None\n",
    "torch/utils/__init__.py": "",
    "torch/utils/cpp_extension.py": """
from setuptools import Extension
from setuptools.command.build_ext import build_ext as BuildExtension

def CppExtension(name, sources, **options):
    return Extension(name, sources)
""",
    "torch-{version}.dist-info/METADATA": "Metadata-Version: 2.1\nName: torch\nVersion: {version}\n",
    "torch-{version}.dist-info/INSTALLER": "pip\n",
    "torch-{version}.dist-info/RECORD": "torch/__init__.py,,\n",
}


def environment_with_torch(folder, version):
    """A new virtual environment that holds nothing but pip and a stub of torch; its python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    purelib = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    ).stdout.strip()
    for name, text in STUB.items():
        file = Path(purelib) / name.replace("{version}", version)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.replace("{version!r}", repr(version)).replace("{version}", version))
    return python


@pytest.mark.parametrize("version", ("2.11.0", "2.13.0+cpu"))
def test_pip_leaves_the_installed_torch_alone(tmp_path, version):
    python = environment_with_torch(tmp_path / "venv", version)
    source = tmp_path / "source"  # pip builds metadata in the tree it is given
    ignore = shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so")
    shutil.copytree(ROOT, source, ignore=ignore)
    report = tmp_path / "report.json"
    command = [python, "-m", "pip", "install", "--dry-run", "--report", report, source]
    result = subprocess.run(command, capture_output=True, text=True)
    if "(from versions: none)" in result.stderr:  # pip's build environment needs setuptools from an index
        pytest.skip("offline: pip finds no package index")
    assert result.returncode == 0, result.stderr[-2000:]
    plan = {item["metadata"]["name"] for item in json.loads(report.read_text())["install"]}
    assert "resnet_fast" in {name.replace("-", "_") for name in plan}
    assert not plan & {"torch", "torchvision", "triton"}


def test_too_old_a_torch_is_refused_in_words(tmp_path):
    stub = tmp_path / "torch"
    stub.mkdir()
    (stub / "__init__.py").write_text("__version__ = '2.10.1'")
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0 and "needs torch >= 2.11, this environment has 2.10.1" in result.stderr
