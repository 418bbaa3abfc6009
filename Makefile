# Everything runs in .venv, which is made on demand: a fresh clone needs make and Python 3.11 or newer, nothing else.
# The package is installed editable, so only a change of pyproject.toml calls for another install. (pip -qq: errors only.)

PYTHON ?= python3
# Passed on to what a target runs: make test ARGS="-k partition", make bench ARGS=--help
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-lowest test-compilers lint check fix docs bench bench-peers clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/stamp-demo  ## train a small GPT on simulated devices and write plots to demo_out/
	$(BIN)/python examples/train_gpt.py --output demo_out $(ARGS)

# Two processes: most of the time goes into compiling, which uses one core. ARGS="-n 0" for one, with a debugger, say.
test: $(VENV)/stamp-test  ## run all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# By path, so that no test can be forgotten: whatever compiles for longer belongs into tests/contracts, or is marked slow.
test-fast: $(VENV)/stamp-test  ## run the unit tests, one file per module
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore=tests/contracts -m "not slow" $(ARGS)

# Where the code says what is not true of the oldest versions that pyproject.toml allows. ARGS=tests/model for a part.
test-lowest: .venv-lowest/stamp  ## run all tests with the lowest versions of what jaxpipe needs
	.venv-lowest/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

# The lower bounds become constraints: jaxpipe's own dependencies at their lowest, what those need as pip likes it.
.venv-lowest/stamp: pyproject.toml
	@echo "Creating .venv-lowest with the lowest versions of jaxpipe's dependencies."
	@test -x .venv-lowest/bin/pip || $(PYTHON) -m venv --clear .venv-lowest
	@$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
		| sed 's/>=/==/' > .venv-lowest/constraints.txt
	@.venv-lowest/bin/python -m pip install -qq --disable-pip-version-check \
		--constraint .venv-lowest/constraints.txt --editable '.[$(EXTRAS_test)]'
	@touch $@

# Two environments, because each brings the compiler of one kind of hardware: 0.7 GB and 5.5 GB. None of the hardware is needed.
# A step that was compiled before is not compiled again, if nothing that it depends on has changed.
test-compilers: .venv-tpu/stamp .venv-cuda/stamp  ## compile for TPUs and GPUs that are not there, and look at it (long)
	JAXPIPE_REPORTS=.venv-tpu/reports .venv-tpu/bin/python -m pytest -n 2 tests/compilers -k "tpu or topology" $(ARGS)
	JAXPIPE_REPORTS=.venv-cuda/reports .venv-cuda/bin/python -m pytest -n 2 tests/compilers -k "gpu or topology" $(ARGS)

.venv-tpu/stamp .venv-cuda/stamp: .venv-%/stamp: pyproject.toml
	@echo "Creating .venv-$* with jaxpipe[$*] and the compiler; the first time takes some minutes."
	@test -x .venv-$*/bin/pip || $(PYTHON) -m venv --clear .venv-$*
	@.venv-$*/bin/python -m pip install -qq --disable-pip-version-check --editable '.[$*,test]'
	@touch $@

lint: $(VENV)/stamp-check  ## check format, lint, types and duplicated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pylint jaxpipe

check: lint  ## the same

fix: $(VENV)/stamp-check  ## repair format and lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv-docs/stamp  ## build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --strict $(ARGS)
	@echo "Open site/index.html, or run .venv-docs/bin/mkdocs serve"

# What builds the site, without jaxpipe and jax: the reference is read off the sources.
.venv-docs/stamp: pyproject.toml
	@echo "Creating .venv-docs with what builds the site."
	@test -x .venv-docs/bin/pip || $(PYTHON) -m venv --clear .venv-docs
	@$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
		| .venv-docs/bin/python -m pip install -qq --disable-pip-version-check --requirement /dev/stdin
	@touch $@

bench: $(VENV)/stamp-demo  ## run the benchmarks beside loops in JAX (long, on a machine that does nothing else)
	$(BIN)/python benchmarks/run.py $(ARGS)
	$(BIN)/python benchmarks/micro_batches.py $(ARGS)
	$(BIN)/python benchmarks/schedules.py $(ARGS)

bench-peers: .venv-peers/stamp  ## time the same GPT in jaxpipe, torch and DeepSpeed (minutes, likewise)
	.venv-peers/bin/python benchmarks/peers.py $(ARGS)

# torch for CPUs only: the usual build for Linux brings gigabytes of CUDA. DeepSpeed looks for torch while it is built, and
# builds no ops of its own. The benchmark leaves out what is not there.
PEERS_TORCH ?= torch==2.13.0+cpu
.venv-peers/stamp: pyproject.toml
	@echo "Creating .venv-peers with torch and DeepSpeed; the first time takes some minutes."
	@test -x .venv-peers/bin/pip || $(PYTHON) -m venv --clear .venv-peers
	@.venv-peers/bin/python -m pip install -qq --disable-pip-version-check --editable . setuptools wheel
	@.venv-peers/bin/python -m pip install -qq --disable-pip-version-check '$(PEERS_TORCH)' \
		|| echo "$(PEERS_TORCH) is not available here; for another build: make bench-peers PEERS_TORCH=torch"
	@DS_BUILD_OPS=0 .venv-peers/bin/python -m pip install -qq --disable-pip-version-check --no-build-isolation deepspeed \
		|| echo "DeepSpeed could not be installed."
	@touch $@

clean:  ## remove .venv, results and caches
	rm -rf $(VENV) .venv-tpu .venv-cuda .venv-docs .venv-lowest .venv-peers \
		demo_out bench_out site build dist .pytest_cache .ruff_cache .hypothesis
	find jaxpipe tests examples benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

# One stamp per set of extras, so that `make demo` does not wait for a type checker.
EXTRAS_demo := examples
EXTRAS_test := examples,test
EXTRAS_check := examples,test,dev

$(VENV)/stamp-demo $(VENV)/stamp-test $(VENV)/stamp-check: $(VENV)/stamp-%: pyproject.toml | $(VENV)/stamp-venv
	@echo "Installing jaxpipe[$(EXTRAS_$*)] and what it needs into $(VENV); the first time takes a minute or two."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[$(EXTRAS_$*)]'
	@touch $@

# A stamp here as well, and --clear: an interrupted `python -m venv` leaves a python without pip.
$(VENV)/stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "jaxpipe needs Python 3.11 or newer, but $(PYTHON) is older or missing. Try: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)."
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@
