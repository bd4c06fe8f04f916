# Each target sets up whatever it needs; a second call reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH_VENV := .venv-bench
BENCH_JSON := build/benchmarks/run.json
STEERING_JSON := build/benchmarks/steering.json
STEERING_BENCHMARKS := benchmarks/test_steering.py benchmarks/test_predictor.py
BENCH_OPTIONS := --benchmark-enable --benchmark-group-by=group --benchmark-sort=name --benchmark-columns=median,iqr,rounds
# A choice of benchmarks gets a report of its own beside the json; only a whole run replaces the one that is kept.
RESULTS ?= $(if $(ARGS),build/benchmarks,benchmarks/results)
# Two dictionaries and the small catalogues, at medium and large batches.
QUICK := (threads2 and (n2048 or n8192 or run-sae) and (rows64 or rows4096)) or \
  ((items3700 or items60000 or run-items) and d64 and (rows64 or rows1024))
CPP_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')
BUILD_FILES := CMakeLists.txt pyproject.toml $(filter csrc/%,$(CPP_FILES))
CUDA_BUILD := build/cuda
# The machine with a GPU may have no network: its own Python, with whatever torch is there, and WHEELS=FOLDER for
# packages it lacks.
GPU_PYTHON ?= python3
GPU_BUILD := build/gpu
GPU_INSTALL = env -u PIP_CONSTRAINT -u PIP_BUILD_CONSTRAINT $(GPU_PYTHON) -m pip install -q --no-index --no-deps \
  --target $(GPU_BUILD)/site
# Warnings of its libraries, other versions than here, are no errors of ours.
GPU_PYTEST = $(GPU_PYTHON) -m pytest -q -W default --tb=short
GPU_PEERS := sae-lens eai-sparsify dictionary-learning transformer-lens better-abc docstring-parser simple-parsing \
  natsort schedulefree datasets dill multiprocess requests charset-normalizer
GPU_PLATFORMS := _2_28 _2_17 2014
space := $(subst ,, )
SANITIZERS := memcheck racecheck synccheck
GPU_SHARES := $(shell seq 0 15)
TRITON_TESTS := $(wildcard tests/kernels/triton/launched/test_*.py)

# pip older than 25.3 takes the versions in its isolated build environments from the first, newer ones from the second.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DELETE_ON_ERROR:
.PHONY: help setup test demo bench bench-quick bench-steering bench-memory cuda lint format
.PHONY: gpu gpu-wheels gpu-build gpu-test gpu-test-cuda gpu-test-triton gpu-sanitize \
  $(GPU_SHARES:%=gpu-test-triton-%) $(SANITIZERS:%=gpu-sanitize-%)
.PHONY: sanitize sanitize-thread symbols wheel clean

help:
	@echo 'make test       set up .venv, build the extension, run the tests (ARGS="-k topk" to choose)'
	@echo 'make demo       set up .venv, run the study on MovieLens 100K into runs/demo (ARGS="--data DIR" for other data)'
	@echo 'make bench      set up .venv-bench, time the ops beside other libraries (ARGS="-k topk" to choose), some 45 minutes'
	@echo 'make bench-quick   the same for a few sizes, 5 minutes'
	@echo 'make bench-steering   time what steering adds to a recommender, and the predictor, some 17 minutes'
	@echo 'make bench-memory   peak memory of the steps on 20 million generated interactions, half an hour on a busy machine, 3 GB of disk'
	@echo 'make test-integrations  checkpoints and models of other libraries, against those libraries'
	@echo 'make setup      only set up .venv'
	@echo 'make lint       ruff, mypy, clang-format; changes nothing'
	@echo 'make format     let ruff and clang-format rewrite the sources'
	@echo 'make sanitize   kernel tests against an AddressSanitizer and UBSan build'
	@echo 'make sanitize-thread  kernel tests against a ThreadSanitizer build, some 8 minutes'
	@echo 'make cuda       compile the CUDA kernels with nvcc; warnings and register spills are errors; needs no GPU'
	@echo 'make gpu        on a machine with a GPU: build with its own torch, test, sanitize and time the GPU kernels'
	@echo 'make symbols    check that the object files of each tier define no weak symbol'
	@echo 'make wheel      build a wheel into dist/'
	@echo 'make clean      remove what the other targets made, except runs/'
	@echo 'PYTHON=python3.12 chooses the interpreter a new .venv is made with.'

setup: $(VENV)/.installed

# bin/pip is the last thing venv writes, so its presence means that the environment is whole.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Python 3.10 or newer is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# Python sources are not listed: the installation is editable. The stamp carries the time at which the installation
# began, so that a file changed meanwhile counts as newer.
$(VENV)/.installed: constraints.txt $(BUILD_FILES) | $(BIN)/pip
	@touch $(VENV)/.started
	$(BIN)/python -m pip install -q -e '.[dev]'
	@mv $(VENV)/.started $@

test: setup
	$(BIN)/python -m pytest $(ARGS)

demo: setup
	$(BIN)/saerec demo --out runs/demo $(ARGS)

# Borrows everything but the peers from .venv, the editable saerec_fast included: site.addsitedir reads its .pth files.
# Where a requirement cannot be installed the others still are; the report names the missing peer, and the next call
# tries again.
$(BENCH_VENV)/.installed: benchmarks/requirements.txt constraints.txt | setup
	$(BIN)/python -m venv --clear $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install -q --no-deps -r $< || \
	  sed 's/#.*//' $< | grep . | while read -r peer; do \
	    $(BENCH_VENV)/bin/python -m pip install -q --no-deps "$$peer" || touch $(BENCH_VENV)/.incomplete; done
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	  > "$$($(BENCH_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	@test -e $(BENCH_VENV)/.incomplete || touch $@

bench: export SAEREC_BENCH_COMMAND = make bench$(if $(ARGS), ARGS='$(ARGS)')
bench: $(BENCH_VENV)/.installed
	@mkdir -p $(dir $(BENCH_JSON)) && rm -f $(BENCH_JSON)
	$(BENCH_VENV)/bin/python -m pytest benchmarks $(STEERING_BENCHMARKS:%=--ignore=%) $(BENCH_OPTIONS) \
	  --benchmark-json=$(BENCH_JSON) $(ARGS); \
	status=$$?; $(BENCH_VENV)/bin/python benchmarks/report.py $(BENCH_JSON) $(RESULTS) && exit $$status

# A report of its own, beside that of `make bench`.
bench-steering: export SAEREC_BENCH_COMMAND = make bench-steering$(if $(ARGS), ARGS='$(ARGS)')
bench-steering: $(BENCH_VENV)/.installed
	@mkdir -p $(dir $(STEERING_JSON)) && rm -f $(STEERING_JSON)
	$(BENCH_VENV)/bin/python -m pytest $(STEERING_BENCHMARKS) $(BENCH_OPTIONS) --benchmark-json=$(STEERING_JSON) $(ARGS); \
	status=$$?; $(BENCH_VENV)/bin/python benchmarks/report.py $(STEERING_JSON) $(RESULTS) && exit $$status

# Not more threads than one: the readers' buffers are per thread, and a figure should not depend on the machine's cores.
bench-memory: export OMP_NUM_THREADS = 1
bench-memory: export POLARS_MAX_THREADS = 1
bench-memory: setup
	$(BIN)/python benchmarks/study_memory.py $(ARGS)

bench-quick:
	$(MAKE) bench ARGS='-k "$(strip $(QUICK))"'

# Not part of setup: the compilation takes as long as all the rest. Only the CUDA module is built, into its own folder.
cuda: setup
	@PATH="$$PATH:/usr/local/cuda/bin" command -v nvcc > /dev/null || { echo 'make cuda: no nvcc on this machine'; exit 1; }
	PATH="$$PATH:/usr/local/cuda/bin" $(BIN)/python -m pip install -q --upgrade --no-deps --target $(CUDA_BUILD)/site . \
	  --config-settings=cmake.define.SAEREC_CUDA=ON --config-settings=cmake.define.SAEREC_CPU=OFF \
	  --config-settings=cmake.define.SAEREC_WERROR=ON --config-settings=build-dir=$(CUDA_BUILD)
	SAEREC_CUDA_MODULE=$(CUDA_BUILD)/site $(BIN)/python -m pytest -q tests/kernels/cuda/test_cuda_extension.py

# Tests and benchmarks import what was built, or, where that failed, the sources; PYTHONSAFEPATH keeps the working directory
# from coming first.
GPU_TARGETS := gpu gpu-build gpu-test gpu-test-cuda gpu-test-triton gpu-sanitize \
  $(GPU_SHARES:%=gpu-test-triton-%) $(SANITIZERS:%=gpu-sanitize-%)
$(GPU_TARGETS): export PYTHONPATH := $(CURDIR)/$(GPU_BUILD)/site:$(CURDIR)
$(GPU_TARGETS): export PYTHONSAFEPATH := 1
$(GPU_TARGETS): export PATH := $(PATH):/usr/local/cuda/bin
# Not where it measures: the ways say themselves what they lack.
$(filter-out gpu,$(GPU_TARGETS)): export SAEREC_REQUIRE_GPU := 1
# Runs the targets below, each for a limited time, and measures after that.
gpu:
	$(GPU_PYTHON) benchmarks/gpu.py --out $(RESULTS)

# A wheel that cannot be installed is missing in the report.
gpu-build:
	rm -rf $(GPU_BUILD)/site
	$(if $(WHEELS),$(GPU_INSTALL) --no-compile $(WHEELS)/*.whl || \
	  for wheel in $(WHEELS)/*.whl; do $(GPU_INSTALL) --no-compile --upgrade "$$wheel" || true; done)
	$(GPU_INSTALL) --no-build-isolation --upgrade . \
	  --config-settings=cmake.define.SAEREC_CUDA=ON --config-settings=build-dir=$(GPU_BUILD)/cmake

# For a machine without network: the libraries that are measured beside saerec_fast and what their SAEs import, for the
# Python and the packages that it has.
gpu-wheels:
	$(PYTHON) -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version 3.12 \
	  $(GPU_PLATFORMS:%=--platform manylinux%_x86_64) -d $(WHEELS) \
	  $$(grep -E '^($(subst $(space),|,$(GPU_PEERS)))==' benchmarks/requirements.txt)

gpu-test: gpu-test-cuda gpu-test-triton

# After a fault on the device all that follows in the same process fails as well.
gpu-test-cuda:
	$(GPU_PYTEST) --maxfail=20 tests/kernels/cuda/test_cuda_extension.py tests/kernels/cuda/test_cuda_steer.py \
	  -k "not emulated" $(ARGS)

# The hundreds of kernels that these tests compile take minutes of one core: a process for each share of the tests, in
# which what most others are made of comes first.
gpu-test-triton:
	@$(MAKE) --no-print-directory -k -j $(GPU_SHARES:%=gpu-test-triton-%)

$(GPU_SHARES:%=gpu-test-triton-%): gpu-test-triton-%:
	@SAEREC_TEST_SHARE=$*/$(words $(GPU_SHARES)) $(GPU_PYTEST) -p no:cacheprovider --maxfail=5 \
	  $(filter %topk.py,$(TRITON_TESTS)) $(filter-out %topk.py,$(TRITON_TESTS)) $(ARGS)

gpu-sanitize:
	@command -v compute-sanitizer || echo 'make gpu: no compute-sanitizer on this machine, skipped'
	! command -v compute-sanitizer > /dev/null || $(MAKE) -k -j -Otarget $(SANITIZERS:%=gpu-sanitize-%)

# On the sizes on integers; without torch's cache each tensor is an allocation of its own, and what lies beyond it shows.
$(SANITIZERS:%=gpu-sanitize-%): gpu-sanitize-%:
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $* --error-exitcode 9 \
	  $(GPU_PYTEST) tests/kernels/cuda/test_cuda_steer.py -k "on_device and sizes and float32"

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP_FILES)

# Borrows everything but saerec_fast from .venv. Only site directories have their .pth files read, so the editable
# saerec_fast of .venv stays out. $* is the CMake option behind SAEREC_, in lower case.
.venv-%/.installed: $(VENV)/.installed
	$(BIN)/python -m venv --clear .venv-$*
	CXX='$(CXX)' .venv-$*/bin/python -m pip install -q --no-deps -e . \
	  --config-settings=cmake.define.SAEREC_$(shell echo $* | tr a-z A-Z)=ON --config-settings=build-dir=build/$*
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > .venv-$*/shared.pth
	mv .venv-$*/shared.pth "$$(.venv-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@touch $@

# The runtime has to be loaded before Python is, and finds the C++ exceptions it wraps only if libstdc++ is loaded too.
# Leaks are not looked for: Python and torch keep memory until the process ends. Freed memory stays out of use for a
# while, but not for long: tests of peak memory are among these.
sanitize: .venv-sanitize/.installed
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  .venv-sanitize/bin/python -m pytest tests/kernels --ignore=tests/kernels/triton --ignore=tests/kernels/cuda $(ARGS)

# Only the kernels are instrumented, and they run on std::thread here: torch's and Python's own threads are not looked at.
# All the kernel tests, not only those of threads: compilers get instrumented vector code wrong, and a build whose results
# are wrong says nothing about the races of the right one. Its shadow memory is no use to tests of peak memory.
sanitize-thread: .venv-sanitize_thread/.installed
	LD_PRELOAD="$$($(CXX) -print-file-name=libtsan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	TSAN_OPTIONS="halt_on_error=1 ignore_noninstrumented_modules=1 exitcode=66" \
	  .venv-sanitize_thread/bin/python -m pytest tests/kernels --ignore=tests/kernels/triton --ignore=tests/kernels/cuda \
	    --ignore=tests/kernels/test_memory.py -k "not fork" $(ARGS)

symbols: setup
	tools/check_symbols.sh build/cp*/CMakeFiles/saerec_cpu_*.dir

wheel: setup
	rm -f dist/*.whl
	$(BIN)/python -m pip wheel -q --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) .venv-* $(BENCH_VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find saerec_fast tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# Other libraries, each in an environment that has it: the peers of the benchmarks for checkpoints, RecTools and RePlay for
# steering, RecBole with its old pins. A library that could not be installed fails its tests. Their warnings, some of them
# while they are imported, are not errors of ours.
INTEGRATIONS := tests/integrations
RECBOLE_TESTS := $(INTEGRATIONS)/test_recbole.py
CHECKPOINT_TESTS := $(INTEGRATIONS)/test_conversion.py
PEER_ENVIRONMENTS := .venv-recommenders/.installed .venv-recbole/.installed
.PHONY: test-integrations
test-integrations: $(BENCH_VENV)/.installed $(PEER_ENVIRONMENTS)
	$(BENCH_VENV)/bin/python -m pytest $(CHECKPOINT_TESTS) $(ARGS)
	.venv-recommenders/bin/python -m pytest -W ignore $(INTEGRATIONS) --ignore=$(RECBOLE_TESTS) --ignore=$(CHECKPOINT_TESTS) $(ARGS)
	.venv-recbole/bin/python -m pytest -W ignore $(RECBOLE_TESTS) $(ARGS)

# Over .venv, as the benchmarks' environment is. Their versions are in the list, whatever constraints.txt says.
$(PEER_ENVIRONMENTS): export PIP_CONSTRAINT :=
$(PEER_ENVIRONMENTS): .venv-%/.installed: $(INTEGRATIONS)/requirements-%.txt constraints.txt | setup
	$(BIN)/python -m venv --clear $(@D)
	$(@D)/bin/python -m pip install -q --no-deps -r $<
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	  > "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	@touch $@
