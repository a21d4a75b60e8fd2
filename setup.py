"""Build of resnet_fast: `_C` (schemas and CPU kernels) and, with a CUDA toolkit, `_C_cuda`.

Both use LibTorch's stable ABI and Python's limited API, so one binary serves torch >= 2.11 and Python >= 3.10.
RESNET_FAST_CUDA=0 or 1 forces the CUDA part off or on; TORCH_CUDA_ARCH_LIST overrides the architectures.
"""

import glob
import os
import platform
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor

from setuptools import setup

MIN_TORCH = "2.11"
CUDA_ARCHS = "8.0+PTX;9.0a"  # PTX of 8.0 serves 8.6, 8.9, 10 and 12
# No -ffast-math: NaN, infinities and rounding are part of the contract. Contraction: a * b + c becomes one FMA where
# the level has it, which -std=c++17 would forbid.
# GCC 12 takes the undefined lanes in its own AVX-512 headers for mistakes (GCC bug 105593).
KERNEL_FLAGS = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
KERNEL_FLAGS += ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-ffp-contract=fast"]
KERNEL_FLAGS += ["-fno-exceptions"]  # kernels throw nothing; what exceptions need is a symbol that levels would share
# For `make sanitize`: tests under AddressSanitizer and UndefinedBehaviorSanitizer, CPU part only.
SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]
SANITIZE = SANITIZE if os.environ.get("RESNET_FAST_SANITIZE") == "1" else []
KERNEL_FLAGS += SANITIZE
LEVELS = {"portable": []}  # the flags of each level in csrc/cpu/levels.cpp
if platform.machine().lower() in ("x86_64", "amd64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
    LEVELS |= {"avx2": avx2, "avx512": avx512, "avx512_bf16": [*avx512, "-mavx512bf16"]}


def say(text):
    print(f"[resnet_fast] {text}", file=sys.stderr, flush=True)


def import_torch():
    """torch of this environment, also from inside pip's isolated build, or None."""
    try:
        import torch
    except ImportError:
        # Build isolation hides the environment's packages but runs its interpreter; a second torch just to build
        # against would be gigabytes, and not the user's.
        hidden = sysconfig.get_path("purelib")
        sys.path.append(hidden)
        site.addsitedir(hidden)
        try:
            import torch
        except ImportError:
            return None
        say(f"build isolation: using torch {torch.__version__} of {hidden}")
    return torch


def find_cuda_home():
    """Root of a usable CUDA toolkit (compiler and headers), or None."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc:
        candidates.append(os.path.dirname(os.path.dirname(os.path.realpath(nvcc))))
    candidates += ["/usr/local/cuda", *sorted(glob.glob("/usr/local/cuda-*"), reverse=True), "/opt/cuda"]
    for root in filter(None, candidates):
        if os.path.isfile(f"{root}/bin/nvcc") and os.path.isfile(f"{root}/include/cuda_runtime.h"):
            return root
    return None


def decide_cuda(torch):
    """CUDA toolkit root to build `_C_cuda` with, or None; says why."""
    mode = os.environ.get("RESNET_FAST_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"RESNET_FAST_CUDA must be 0, 1 or unset, got {mode!r}")
    home = find_cuda_home()
    if mode == "0":
        why = "RESNET_FAST_CUDA=0"
    elif home is None:
        why = "no nvcc with cuda_runtime.h found; set CUDA_HOME"
    elif torch.version.cuda is None:
        why = f"torch {torch.__version__} has no CUDA"
    else:
        say(
            f"building CPU and CUDA kernels with {home} for {os.environ.setdefault('TORCH_CUDA_ARCH_LIST', CUDA_ARCHS)}"
        )
        return home
    if mode == "1":
        sys.exit(f"RESNET_FAST_CUDA=1, but {why}")
    say(f"CPU-only build ({why})")
    return None


def build_arguments(torch):
    cuda_home = decide_cuda(torch)
    if cuda_home:
        os.environ["CUDA_HOME"] = cuda_home
    from torch.utils import cpp_extension as ce

    if cuda_home:
        ce.CUDA_HOME = cuda_home  # fixed at import, maybe to the parent of a wrapper script

    macros = [("Py_LIMITED_API", "0x030a0000"), ("TORCH_TARGET_VERSION", "0x020b000000000000")]
    # Error messages carry file names: those of the project, not of the machine that built it.
    cxx = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", f"-ffile-prefix-map={os.getcwd()}/=", *SANITIZE]
    extensions = [
        ce.CppExtension(
            "resnet_fast._C",
            ["csrc/ops.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))],
            define_macros=macros,
            extra_compile_args={"cxx": cxx},
            extra_link_args=SANITIZE,
            depends=sorted(glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/cpu/kernels/*.cpp")),
            py_limited_api=True,
        )
    ]
    if cuda_home:
        nvcc = ["-O3", "-std=c++17", "-Xptxas", "--warn-on-spills,-Werror"]
        extensions.append(
            ce.CUDAExtension(
                "resnet_fast._C_cuda",
                [*sorted(glob.glob("csrc/cuda/*.cpp")), *sorted(glob.glob("csrc/cuda/*.cu"))],
                define_macros=[*macros, ("USE_CUDA", None)],
                extra_compile_args={"cxx": cxx, "nvcc": nvcc},
                depends=sorted(glob.glob("csrc/**/*.*h", recursive=True)),
                py_limited_api=True,
            )
        )

    class BuildExt(ce.BuildExtension):
        """Compiles csrc/cpu/kernels/ once per instruction-set level, then the extensions as usual."""

        def build_extensions(self):
            compiler = os.environ.get("CXX", "g++")
            headers = [*glob.glob("csrc/cpu/*.h"), *glob.glob("csrc/cpu/kernels/*.h")]
            objects, commands = [], []
            for source in sorted(glob.glob("csrc/cpu/kernels/*.cpp")):
                for level, flags in LEVELS.items():
                    name = os.path.splitext(os.path.basename(source))[0]
                    target = os.path.join(self.build_temp, level, f"{name}.o")
                    objects.append(target)
                    newest = max(map(os.path.getmtime, [source, __file__, *headers]))
                    if os.path.exists(target) and os.path.getmtime(target) > newest:
                        continue
                    os.makedirs(os.path.dirname(target), exist_ok=True)
                    options = [*KERNEL_FLAGS, *flags, f"-DRESNET_FAST_LEVEL={level}"]
                    commands.append([compiler, *options, "-c", source, "-o", target])
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
                list(pool.map(subprocess.check_call, commands))
            self.extensions[0].extra_objects = objects
            super().build_extensions()

    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": BuildExt},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
        "install_requires": [f"torch>={MIN_TORCH}"],
    }


def main():
    torch = import_torch()
    if torch is None:
        # Nothing to protect: let pip bring torch, first into the build, then as a dependency, and torchvision with it.
        say("no torch in this environment: pip will install torch and torchvision")
        setup(setup_requires=[f"torch>={MIN_TORCH}"], install_requires=[f"torch>={MIN_TORCH}", "torchvision"])
        return
    if tuple(map(int, torch.__version__.split(".")[:2])) < tuple(map(int, MIN_TORCH.split("."))):
        sys.exit(f"resnet_fast needs torch >= {MIN_TORCH}, this environment has {torch.__version__}; upgrade it first")
    # torchvision pins torch exactly: naming it here would make pip replace the user's torch.
    setup(**build_arguments(torch))


if __name__ == "__main__":
    main()
