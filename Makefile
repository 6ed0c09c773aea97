# Two commands do everything on a fresh machine: `make train` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RECIPE ?= recipes/demo.yaml

.PHONY: train test test-slow test-gpu mutations lint slurm install clean
train: install
	$(BIN)/qwen-moe train $(RECIPE)

# Two processes share the tests, a file at a time; `PARALLEL= make test` runs them in one.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder
test: install lint slurm
	$(BIN)/python -m pytest -m "not slow and not gpu" $(PARALLEL) $(PYTEST_OPTIONS)

test-slow: install slurm
	$(BIN)/python -m pytest -m "slow and not gpu" $(PARALLEL) $(PYTEST_OPTIONS)

# Plants mistakes one after the other and prints those that no test sees (tests/mutations); minutes long.
# `make mutations MUTATION_OPTIONS="--only capacity --jobs 2"` tries some of them.
mutations: install
	$(BIN)/python -m tests.mutations.run $(MUTATION_OPTIONS)

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

# $(call quietly,WHAT,COMMAND): one line for a phase. What the command prints is in $(VENV)/install.log; of it are shown
# lines that pip calls errors, and the end where the command fails, which ends make.
quietly = @echo "$(1) ..."; log="$(VENV)/install.log"; { $(2); } > "$$log" 2>&1 && status=0 || status=$$?; \
	if [ $$status -ne 0 ]; then tail -n 60 "$$log" >&2; \
	  echo "$(1) failed with status $$status; all that it printed is in $$log" >&2; exit $$status; fi; \
	grep '^ERROR' "$$log" >&2 || :

# torch first and exactly: a looser request may bring gigabytes of CUDA packages to a machine without a GPU.
$(VENV)/.installed: pyproject.toml constraints.txt
	@mkdir -p $(VENV)
	$(call quietly,making $(VENV),$(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet --upgrade pip)
	$(call quietly,installing torch (some minutes),$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)")
	$(call quietly,installing the other packages (some minutes),$(BIN)/python -m pip install --quiet \
	  --constraint constraints.txt --editable ".[test]")
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
