# Two commands do everything on a fresh machine: `make train` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RECIPE ?= recipes/demo.yaml

.PHONY: train test test-slow test-gpu lint slurm install clean
train: install
	$(BIN)/qwen-moe train $(RECIPE)

test: install lint slurm
	$(BIN)/python -m pytest -m "not slow and not gpu" $(PYTEST_OPTIONS)

test-slow: install slurm
	$(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_OPTIONS)

# On one GPU, unattended, within ten minutes; writes runs/gpu/report.md (docs/gpu.md). Installs nothing: it runs in the
# environment of PYTHON, so that the torch that was built for the machine's CUDA is the one that is tested.
test-gpu:
	$(PYTHON) -m tests.gpu.report $(GPU_OPTIONS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A real Slurm for the tests of launches. They are skipped, saying so, where it is not there and may not be installed.
# `SLURM=no make test` installs nothing.
SLURM_TESTS := $(SLURM)
override SLURM := slurm-wlm munge iproute2
slurm:
	@if [ "$(SLURM_TESTS)" = no ]; then echo "SLURM=no: the tests on a Slurm cluster are skipped"; \
	elif command -v slurmctld >/dev/null && command -v munged >/dev/null && command -v ip >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing $(SLURM) with apt-get, as root, for the tests of launches (SLURM=no make test skips this)"; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  apt-get install -qq --no-install-recommends $(SLURM) >/dev/null 2>&1 \
	  || { apt-get update -qq && apt-get install -qq --no-install-recommends $(SLURM) >/dev/null; } \
	  || echo "could not install $(SLURM): the tests on a Slurm cluster are skipped"; \
	else echo "no Slurm here (as root, apt-get install $(SLURM)): the tests on a cluster are skipped"; fi

install: $(VENV)/.installed

# torch first and exactly: a looser request may bring gigabytes of CUDA packages to a machine without a GPU.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
