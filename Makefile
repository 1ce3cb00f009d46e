# Two commands matter: `make demo` and `make test`. Each makes its own environment (.venv) from constraints.txt first;
# `make gpu` takes the Python that is there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := $(VENV)/.peers
SOURCES := setup.py pyproject.toml CMakeLists.txt constraints.txt $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

.PHONY: demo test test-slow test-gpu test-models sanitize lint format bench gpu gpu-pack clean
.DEFAULT_GOAL := demo

demo: $(READY)
	$(BIN)/python -m afd.demo --out demo $(DEMO)

# Files of tests side by side, on one thread each; tests of threads set their own.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist loadfile $(TESTS)

test-slow: $(READY)
	$(BIN)/pytest -m "slow and not gpu"

test-gpu: $(READY)
	$(BIN)/pytest -m gpu

# What is claimed of timm, torchvision and Hugging Face, with these libraries and their own torch, in an environment apart.
MODELS_VENV := .venv-models
MODELS_READY := $(MODELS_VENV)/.ready

test-models: $(MODELS_READY)
	OMP_NUM_THREADS=1 $(MODELS_VENV)/bin/pytest -m models $(or $(TESTS),tests/models)

$(MODELS_READY): $(SOURCES) constraints-models.txt
	test -x $(MODELS_VENV)/bin/python || $(PYTHON) -m venv $(MODELS_VENV)
	$(MODELS_VENV)/bin/pip install --quiet --constraint constraints-models.txt --editable ".[train,models]" \
		datasets pytest pytest-benchmark hypothesis
	touch $@

# The tests of the ops, with the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer; FUZZ random calls.
FUZZ ?= 13000
SANITIZED := PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/build/sanitize ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)"

sanitize: $(READY)
	rm -rf build/sanitize build/lib.*
	AFD_SANITIZE=address,undefined AFD_CUDA=off $(BIN)/pip install --quiet --no-deps --target build/sanitize .
	$(SANITIZED) $(BIN)/python -c "from afd.ops import native; assert 'build/sanitize' in native._C.__file__"
	AFD_FUZZ_CASES=$(FUZZ) $(SANITIZED) $(BIN)/pytest --capture=sys tests/ops

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*')

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*')

# The short set: under five minutes on two cores. Results go to benchmarks/results and README's tables follow them.
BENCH := $(BIN)/python -m afd bench
LIBRARIES := torchattacks,foolbox,art

bench: $(PEERS)
	$(BENCH) attacks --model lenet --batch 256 --eps 8/255 --steps 5 --repeats 5 --against $(LIBRARIES),art-defaults,eager,eager-bf16
	$(BENCH) attacks --model resnet18 --steps 3 --repeats 3 --against $(LIBRARIES),eager-bf16
	$(BENCH) kernels --sizes cifar --repeats 40
	$(BENCH) discriminator --repeats 100
	$(BENCH) methods --case small --repeats 5
	$(BIN)/python benchmarks/readme.py

# A day on a GPU, with nothing fetched: make gpu STAGES=1,2,3 BUDGET=350 WHEELS=build/wheels DATA=folder OUT=folder
OUT ?= build/gpu
STAGES ?= 1,2,3
BUDGET ?= 350
COMMIT ?= $(shell git describe --always --abbrev=40 --exclude='*' --dirty 2>/dev/null)
GPU_DAY := PYTHONPATH="$(CURDIR)/benchmarks$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m

gpu:
	$(GPU_DAY) gpu_day --stages "$(STAGES)" --budget "$(BUDGET)" --out "$(OUT)" --commit "$(COMMIT)" \
		$(if $(DATA),--data "$(DATA)") $(if $(WHEELS),--wheels "$(WHEELS)")

# What that machine lacks, in build/wheels: packages, the module for Python 3.12 and an H100, and DATA if it is named.
GPU_PYTHON ?= $(or $(lastword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python)),python3.12)

gpu-pack:
	$(PYTHON) benchmarks/gpu_pack.py build/wheels "$(GPU_PYTHON)" "$(DATA)" "$(COMMIT)"

clean:
	rm -rf $(VENV) $(MODELS_VENV) build afd/*.so *.egg-info demo

$(READY): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if $(BIN)/pip show afd 2>/dev/null | grep -q '^Summary: Adversarial Feature Desensitization'; then \
		$(BIN)/pip uninstall --quiet --yes afd; fi  # what this library was called before
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test,lint]"
	touch $@

$(PEERS): benchmarks/peers.txt $(READY)
	$(BIN)/pip install --quiet --no-deps --requirement benchmarks/peers.txt
	touch $@
