"""The project's sources as a fresh checkout has them."""

import importlib.util
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent


def copy_sources(folder: Path) -> Path:
    """``folder``, filled with what the package is built from and nothing compiled."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "resnet_fast", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    return folder


def load_setup():
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("resnet_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
