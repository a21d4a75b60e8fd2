# make demo: sets everything up in .venv and shows the package at work.  make test: the test suite.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.installed
# Several processes of tests: most of what a test does is in one thread.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh csrc/*/*/*.cpp csrc/*/*/*.h)
EMULATOR_FILES := $(wildcard tests/cuda_emulator/*.cpp tests/cuda_emulator/*.h tests/cuda_emulator/*/*.h \
	tests/cuda_emulator/*/*.cpp tests/cuda_emulator/*.cu tests/cuda_emulator/*/*.cu) $(wildcard benchmarks/*/*.cu)

.PHONY: demo test bench report lint format test-peers test-triton test-triton-aot test-emulator triton-table test-oldest test-aarch64 sanitize cuda-check clean

# What pyproject.toml lists as an extra. Not by `pip install -e .[extra]`, which would compile everything once more.
PRINT_EXTRA = import importlib.metadata as m, sys; \
	print(*(r.split(";")[0] for r in m.requires("resnet_fast") if r.endswith(f"== \"{sys.argv[1]}\"")), sep="\n")
install_extra = $(BIN)/python -c '$(PRINT_EXTRA)' $(1) | xargs $(BIN)/pip install --quiet

# torchvision first: it brings the torch that it is built for.
$(SETUP): setup.py pyproject.toml $(CXX_FILES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torchvision" 2>/dev/null || $(BIN)/pip install --quiet "torch>=2.11" torchvision
	$(BIN)/pip install --quiet -e ".[test]"
	touch $@

demo: $(SETUP)
	$(BIN)/resnet-fast info
	$(BIN)/resnet-fast classify examples/photos/*.jpg --model resnet50
	OMP_PROC_BIND=true $(BIN)/resnet-fast bench resnet18 --batch 1 --dtype float32

# Each file in one process, so that what its tests share is made once.
test: $(SETUP)
	$(PYTEST) --dist loadfile --no-loadscope-reorder tests

bench: $(SETUP)
	OMP_PROC_BIND=true $(BIN)/python -m pytest benchmarks --benchmark-only

# The engines that we are measured against, and what draws the plots.
$(VENV)/.bench: $(SETUP)
	$(call install_extra,bench)
	touch $@

report: $(VENV)/.bench
	$(BIN)/resnet-fast report

# Every engine computes what torchvision computes; JAX too, which is a peer on CUDA only.
test-peers: $(VENV)/.bench
	$(BIN)/pip install --quiet jax
	RESNET_FAST_TEST_PEERS=1 $(PYTEST) tests/test_peers.py

test-triton: $(SETUP)
	TRITON_INTERPRET=1 $(PYTEST) tests/triton_interpreter

test-triton-aot: $(SETUP)
	RESNET_FAST_TEST_AOT=1 $(PYTEST) tests/triton_aot

# The CUDA C++ kernels on the CPU; needs neither a GPU nor a CUDA toolkit.
test-emulator: $(SETUP)
	RESNET_FAST_TEST_EMULATOR=1 $(PYTEST) tests/cuda_emulator

# What every Triton convolution is compiled to, for people: benchmarks/results/triton_tiles.md.
triton-table: $(SETUP)
	$(BIN)/python tests/triton_aot/table.py

# The same build under the oldest torch supported, laid in front of the newer one that it was built with.
OLDEST := .torch_oldest
$(OLDEST)/.installed: $(SETUP)
	$(BIN)/pip install --quiet --no-deps --target $(OLDEST) torch==2.11.0 torchvision==0.26.0 triton==3.6.0
	touch $@

test-oldest: $(OLDEST)/.installed
	PYTHONPATH=$(OLDEST) $(BIN)/python -c "import torch; assert torch.__version__.startswith('2.11.'), torch.__version__"
	PYTHONPATH=$(OLDEST) $(PYTEST) tests/test_add_relu.py tests/test_conv_bn_relu.py tests/test_conv_bn_relu_cuda.py \
		tests/test_weight_cache.py tests/test_residual.py tests/test_models.py tests/test_backends.py
	PYTHONPATH=$(OLDEST) $(PYTEST) tests/test_inference.py tests/test_inference_model.py tests/test_inference_plan.py \
		-k "of_this_package or blocks or outputs or fused or copies or functional or refused or bit_for_bit"
	PYTHONPATH=$(OLDEST) $(PYTEST) tests/test_batch_norm_relu.py tests/test_conv2d.py tests/test_conv2d_fork.py \
		tests/test_max_pool_with_indices.py tests/test_gpu_campaign.py -k "dry_run or not (level or campaign or kernels)"
	PYTHONPATH=$(OLDEST) RESNET_FAST_TEST_AOT=1 $(PYTEST) tests/triton_aot

# The CPU kernels without torch: built for aarch64 and run under qemu, then natively at every level that this CPU has.
AARCH64_PACKAGES := g++-aarch64-linux-gnu qemu-user
test-aarch64: $(SETUP)
	if ! command -v aarch64-linux-gnu-g++ >/dev/null || ! command -v qemu-aarch64 >/dev/null; then \
		(apt-get update -qq && apt-get install -y -qq --no-install-recommends $(AARCH64_PACKAGES)) >/dev/null || \
		{ echo "test-aarch64 needs Debian's packages $(AARCH64_PACKAGES): install them as root" >&2; exit 1; }; fi
	$(BIN)/python tests/aarch64/run.py

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, at every level that this CPU has.
SANITIZED := build/sanitized
sanitize: $(SETUP)
	RESNET_FAST_CUDA=0 RESNET_FAST_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-base $(SANITIZED) \
		--build-lib $(SANITIZED)/lib
	cd $(SANITIZED)/lib && export ASAN_OPTIONS=detect_leaks=0 && \
		export LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" && \
		$(abspath $(BIN))/python -c "from resnet_fast import _C; assert '$(SANITIZED)' in _C.__file__, _C.__file__" && \
		$(abspath $(BIN))/python -m pytest -n 2 $(abspath tests/test_conv_cpu.py) -k "every_other_level or kernels"

$(VENV)/.dev: $(SETUP)
	$(call install_extra,dev)
	touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES) tests/aarch64/*.cpp tests/aarch64/*.h $(EMULATOR_FILES)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES) tests/aarch64/*.cpp tests/aarch64/*.h $(EMULATOR_FILES)

# Reads the machine code of the CUDA part, which is built for every default architecture (a register spill is an error).
cuda-check: $(VENV)/.dev
	test -e resnet_fast/_C_cuda.abi3.so || RESNET_FAST_CUDA=1 $(BIN)/pip install --quiet --no-deps -e .
	RESNET_FAST_TEST_CUDA_BUILD=1 $(BIN)/python -m pytest tests/cuda_build

clean:
	rm -rf build dist *.egg-info resnet_fast/*.so $(VENV) $(OLDEST)
