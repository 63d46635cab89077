# Set-up, checks and the quickstart. `make help` lists the targets.
# Needed beforehand: make and Python >= 3.11 with its venv module.

VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
CPU_TORCH_INDEX := https://download.pytorch.org/whl/cpu
PIP_INSTALL := $(BIN)/python -m pip install $(if $(CI),--quiet) --constraint $(CONSTRAINTS)
SOURCES := src kernels tests

# Set PYTHON to choose the interpreter; otherwise the first of these that is new enough and starts.
PYTHONS := $(or $(PYTHON),python3.11 python3.12 python3.13 python3)
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help quickstart setup test test-minimum lint types format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r target text; do printf '%-21s%s\n' "$$target" "$$text"; done

# Threads that spin while they wait starve each other on busy cores: steps were ten times slower without the setting.
quickstart: $(VENV)/.installed ## set up what is needed and run `dsla quickstart`
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE} $(BIN)/dsla quickstart

setup: $(VENV)/.installed-dev ## virtual environment with the package (editable) and the development tools

test: $(VENV)/.installed-dev ## run the tests (more options: PYTEST_ARGS='-k name')
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

# Left out: what does not touch transformers or peft or does so through what is tested already, and distributed, because transformers 5.17 itself cannot resume a run on
# several CPU processes (it restores the optimizer to the device "cpu:0").
NOT_MINIMUM := reference attention kernels kernels_in_layer gates_kernel softmax_decode ragged teacher distributed \
	benchmarks eval_serving inference_eval hub_layout scale report quality task_groups replay serving_http serving_command serving_control serving_ray bench
test-minimum: ## run the tests with the oldest supported versions, in an environment of their own
	$(MAKE) test VENV=.venv-minimum CONSTRAINTS=constraints-minimum.txt PYTEST_ARGS="$(NOT_MINIMUM:%=--ignore tests/test_%.py) $(PYTEST_ARGS)"

lint: $(VENV)/.installed-dev ## ruff: rules and formatting
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check

types: $(VENV)/.installed-dev ## mypy over the packages
	$(BIN)/python -m mypy

format: $(VENV)/.installed-dev ## rewrite the sources as `make lint` wants them
	$(BIN)/python -m ruff check --fix
	$(BIN)/python -m ruff format

clean: ## remove the virtual environment, caches and build outputs
	rm -rf $(VENV) .venv-minimum .mypy_cache .pytest_cache .ruff_cache build dist src/*.egg-info kernels/*.egg-info *.egg-info
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# The set-up is redone when pyproject.toml or constraints.txt change.

# Where no NVIDIA driver answers, torch comes first, alone, as a CPU build: a "+cpu" version counts as newer than PyPI's
# CUDA build of the same release. Should the CPU index not answer, pip goes on with PyPI's build after the retries.
# --no-deps keeps everything but torch away from that index; the next step installs torch's dependencies.
$(VENV)/.torch: $(CONSTRAINTS)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 && exit; \
	for python in $(PYTHONS); do \
		if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
			echo "$$python -m venv $(VENV)"; exec $$python -m venv --clear $(VENV); \
		fi; \
	done; \
	echo "No Python >= 3.11 with the venv module was found (tried: $(PYTHONS))." >&2; \
	echo "Install one (Debian, Ubuntu: apt-get install python3 python3-venv), or name one: make PYTHON=/path/to/python" >&2; \
	exit 1
	@if nvidia-smi >/dev/null 2>&1; then \
		echo "NVIDIA driver found: torch comes from PyPI"; \
	else \
		echo "No NVIDIA driver found: installing a CPU build of torch"; \
		$(PIP_INSTALL) --no-deps --retries 2 --timeout 20 --extra-index-url $(CPU_TORCH_INDEX) torch; \
	fi
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP_INSTALL) --editable '.[plot]'
	@touch $@

# The development extras contain the ones above.
$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $(VENV)/.installed $@
