"""Builds the CPU kernels with test_kernels.cpp, no torch, and runs them: `portable` for aarch64 under qemu, and every
level that this machine has. ``--sanitize``: the latter under AddressSanitizer and UndefinedBehaviorSanitizer."""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]


def load_setup():
    """setup.py as a module, for the flags of the build."""
    spec = importlib.util.spec_from_file_location("setup_of_resnet_fast", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(compiler: str, level: str, flags: list[str], level_flags: list[str], folder: Path) -> Path:
    """The program with the kernels of one level. Only they have the level's flags."""
    folder.mkdir()
    sources = [*sorted((ROOT / "csrc/cpu/kernels").glob("*.cpp")), Path(__file__).with_name("test_kernels.cpp")]

    def compile(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        options = [*flags, *(level_flags if source.parent.name == "kernels" else ["-O1"])]
        command = [compiler, *options, f"-DRESNET_FAST_LEVEL={level}", "-c", source, "-o", target]
        subprocess.check_call(command)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, sources))
    program = folder / "test_kernels"
    # Static where it can be: qemu then needs no libraries of the other machine.
    link = [flag for flag in flags if flag in SANITIZE] or ["-static"]
    subprocess.check_call([compiler, *objects, *link, "-o", program])
    return program


def present(level: str) -> bool:
    """Whether this machine has the level, by the package's own test."""
    env = {**os.environ, "RESNET_FAST_CPU_LEVEL": level}
    code = "import resnet_fast; raise SystemExit(not resnet_fast.backends()['cpu'].available)"
    return subprocess.run([sys.executable, "-c", code], env=env).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", action="store_true")
    args = parser.parse_args()
    setup = load_setup()
    flags = [*setup.KERNEL_FLAGS, *(SANITIZE if args.sanitize else [])]
    with tempfile.TemporaryDirectory() as folder:
        if not args.sanitize:
            program = build("aarch64-linux-gnu-g++", "portable", flags, [], Path(folder, "aarch64"))
            print("aarch64 portable:", flush=True)
            subprocess.check_call(["qemu-aarch64", program])
        for level, level_flags in setup.LEVELS.items():
            if not present(level):
                print(f"this CPU does not have {level}")
                continue
            program = build(os.environ.get("CXX", "g++"), level, flags, level_flags, Path(folder, level))
            print(f"{level}:", flush=True)
            subprocess.check_call([program])


if __name__ == "__main__":
    main()
