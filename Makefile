# make          lists the targets
# make test     is what must pass before a commit

.POSIX:

PYTHON ?= python3
# Another index to take torch from, such as https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Test processes at a time. Results do not depend on it.
JOBS ?= 2
# Where `make gpu` writes.
OUT ?= perf/results

BIN = .venv/bin
READY = .venv/ready
# With one thread in each of JOBS processes torch's own threads do not fight over the cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -q
PARALLEL = -n $(JOBS)

.PHONY: help setup demo test test-torch test-interpret test-static test-wheel test-models test-all quick compat compat-all \
	lint format bench bench-models overhead static mutants gpu clean

help:
	@echo 'make demo      train three models on handwritten digits with tritune and torch; results in build/demo/'
	@echo 'make test      what must pass before a commit: lint, the tiers that need no GPU, the wheel'
	@echo 'make test-all  the same with every combination of dtypes, layouts, cases and targets, as CI runs it'
	@echo 'make quick     lint and a fast part of the tests, for the inner loop'
	@echo 'make compat    the oldest supported torch; the compat subset on the oldest and the newest supported Triton'
	@echo 'make test-models  the tests that need transformers, timm or Keras, in an environment that has them'
	@echo 'make bench-models  the time of a ResNet and a GPT-2 on the CPU, ours over the original'
	@echo 'make compat-all  the same with every shipped config on those two: before a change of kernels or configs'
	@echo 'make lint      ruff and mypy          make format    rewrite the sources as ruff likes them'
	@echo 'make bench     CPU benchmarks         make static    compile-time profile of the shipped kernels'
	@echo 'make overhead  what our calls cost above torch'"'"'s own on the CPU; for perf/results/cpu and README.md'
	@echo 'make gpu       measure on this machine'"'"'s GPU with $$(PYTHON) as it is; OUT=folder for the results'
	@echo 'make mutants   plant faults in the kernels and see which ones the short interpreted suite finds; an hour or two'
	@echo 'make setup     only create .venv      make clean     remove all that make created'
	@echo
	@echo 'variables      PYTHON=python3  TORCH_INDEX=url (index for torch alone)  JOBS=2  OUT=perf/results'

setup: $(READY)

# A recipe for <folder>/ready finds its folder in $(@D).
CHECK_PYTHON = \
	{ $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'tritune needs Python 3.11 or newer; name one: make PYTHON=python3.11' >&2; exit 1; }; } && \
	{ $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo '$(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }; }
CONSTRAINTS = constraints.txt
INSTALL_TORCH = index='$(TORCH_INDEX)' && $(@D)/bin/pip install -q -c $(CONSTRAINTS) torch $(BESIDE_TORCH) setuptools \
	$${index:+--extra-index-url "$$index"}
INSTALL = $(@D)/bin/pip install -q -c $(CONSTRAINTS) --no-build-isolation

$(READY): pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(@D)
	$(INSTALL_TORCH)
	$(INSTALL) -e '.[dev]'
	touch $@

demo: $(READY)
	mkdir -p build/demo
	$(BIN)/python -m tritune demo --out build/demo

test test-all: lint test-torch test-interpret test-static test-wheel

SUBSET = and not full
test-all: SUBSET =

test-torch: $(READY)
	$(PYTEST) -m 'torch $(SUBSET)' $(PARALLEL) --ignore=tests/test_packaging.py

test-interpret: $(READY)
	$(PYTEST) -m 'interpret $(SUBSET)' $(PARALLEL)

test-static: $(READY)
	$(PYTEST) -m 'static $(SUBSET)' $(PARALLEL)

test-wheel: $(READY)
	$(PYTEST) -m 'torch $(SUBSET)' tests/test_packaging.py

quick: lint
	$(PYTEST) -x -m 'torch and not slow and not full' $(PARALLEL)
	$(PYTEST) -x -m 'interpret and compat and not slow' $(PARALLEL)

compat: .venv-triton36/ready .venv-triton39/ready
	OMP_NUM_THREADS=1 .venv-triton36/bin/pytest -q -m 'torch and not slow and not full' $(PARALLEL)
	for version in 36 39; do for tier in interpret static; do \
		OMP_NUM_THREADS=1 .venv-triton$$version/bin/pytest -q -m "$$tier and compat and not full" $(PARALLEL) || exit 1; \
	done; done

compat-all: compat
	for version in 36 39; do \
		OMP_NUM_THREADS=1 .venv-triton$$version/bin/pytest -q -m static -k test_shipped_configs $(PARALLEL) || exit 1; \
	done

# The oldest torch belongs to the oldest Triton, whose interpreter fails on numpy >= 2.4 (loop bounds known only at run
# time). Without TORCH_INDEX it is a GPU build, of some gigabytes.
.venv-triton36/ready: CONSTRAINTS = $(@D)/constraints.txt
.venv-triton36/ready: pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(@D)
	sed -e 's/^torch==.*/torch==2.11.0/; s/^triton==.*/triton==3.6.0/; s/^numpy==.*/numpy<2.4/' \
		-e 's/^setuptools==.*/setuptools==81.0.0/' constraints.txt > $(CONSTRAINTS)
	$(INSTALL_TORCH)
	$(INSTALL) -e '.[test]'
	touch $@

# torch's GPU build insists on its own triton; --no-deps puts another one beside it without an argument.
.venv-triton39/ready: pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(@D)
	$(INSTALL_TORCH)
	$(INSTALL) -e '.[test]'
	$(@D)/bin/pip install -q --no-deps 'triton>=3.9,<3.10'
	touch $@

# Elsewhere these tests are skipped.
test-models: .venv-models/ready
	OMP_NUM_THREADS=1 .venv-models/bin/pytest -q -m torch $(PARALLEL) \
		tests/test_transformers.py tests/test_models.py tests/test_examples.py
	OMP_NUM_THREADS=1 .venv-models/bin/pytest -q -m 'interpret $(SUBSET)' $(PARALLEL) \
		tests/test_transformers.py tests/test_models.py

bench-models: .venv-models/ready
	.venv-models/bin/python -P -m tritune.perf.models

# timm needs torchvision, of which each build fits one build of torch: both come from the same index.
.venv-models/ready: BESIDE_TORCH = torchvision
.venv-models/ready: pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(@D)
	$(INSTALL_TORCH)
	$(INSTALL) -e '.[test,models]' keras
	$(@D)/bin/python -c 'import timm' 2>/dev/null || { \
		echo "timm's models are left out: the index's torchvision does not fit its torch" >&2; \
		$(@D)/bin/pip uninstall -q -y timm torchvision; }
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typecheck && mkdir -p build/typecheck/tritune
	for path in src/tritune/* autotune kernels ops perf; do ln -s ../../../$$path build/typecheck/tritune; done
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(PYTEST) perf/

overhead: $(READY)
	$(BIN)/python -m tritune.perf.overhead --out perf/results/cpu --readme README.md

static: $(READY)
	$(BIN)/python -m tritune bench static

mutants: $(READY)
	$(BIN)/python tests/mutants.py --full --jobs $(JOBS)

gpu:
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m tritune.perf.gpu --out $(OUT)

clean:
	rm -rf .venv .venv-triton36 .venv-triton39 .venv-models build dist *.egg-info src/*.egg-info \
		.pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
