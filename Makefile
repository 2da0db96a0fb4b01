# Two commands do everything a new user needs: `make demo` and `make test`. Each sets up what it needs.
PYTHON_VENV := .venv/bin/python
# Real ImageNet pictures for tests that can use them; such tests skip where there are none.
export NOISYNN_SAMPLES ?= $(abspath $(wildcard ../shared/data))
# The user's own pictures for the demo: a folder with train/<class>/ and val/<class>/, or with <class>/ alone.
DATA ?=
PART ?=

.PHONY: help setup demo test lint doctor gpu soak clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

setup: ## .venv with everything pinned in requirements.txt; Debian's packages for ffcv where allowed
	@./setup.sh

demo: setup ## the whole job on real pictures, in minutes (DATA=/path/to/pictures takes your own)
	@$(PYTHON_VENV) -m jobs demo --out runs/demo $(if $(DATA),--data "$(DATA)")

test: setup lint ## lint, types and tests
	@$(PYTHON_VENV) -m pytest

lint: setup
	@$(PYTHON_VENV) -m ruff check . && $(PYTHON_VENV) -m ruff format --check . && $(PYTHON_VENV) -m mypy

doctor: setup ## what is installed, what works, what to mend
	@$(PYTHON_VENV) -m pipeline doctor

gpu: ## what needs a GPU: PART=check (tests of the kernels) or PART=noise (their speed, into benchmarks/results)
	@$(MAKE) --silent -C pipeline/noise/csrc PYTHON=$(abspath $(or $(wildcard $(PYTHON_VENV)),$(shell command -v python3)))
	@case "$(PART)" in \
	check) $(or $(wildcard $(PYTHON_VENV)),python3) -m pytest tests/gpu ;; \
	noise) $(or $(wildcard $(PYTHON_VENV)),python3) -m benchmarks noise --device cuda --dtype bfloat16 --megabytes 1000 ;; \
	*) echo "error: make gpu PART=check or PART=noise" >&2; exit 2 ;; \
	esac

soak: setup ## the long counts: faults, kills and statistics that are too slow for `make test`
	@$(PYTHON_VENV) -m pytest -m soak

clean: ## remove caches and the demo's output
	rm -rf runs/demo .pytest_cache .ruff_cache .mypy_cache .hypothesis
