# Two commands do everything a new user needs: `make demo` and `make test`. Each sets up what it needs.
PYTHON_VENV := .venv/bin/python
# Real ImageNet pictures for tests that can use them; such tests skip where there are none.
export NOISYNN_SAMPLES ?= $(abspath $(wildcard ../shared/data))
# The user's own pictures for the demo: a folder with train/<class>/ and val/<class>/, or with <class>/ alone.
DATA ?=
PART ?=
# Kernels are measured where there is no .venv: the smallest environment with a GPU has torch in its own Python.
PYTHON_HERE := $(or $(wildcard $(PYTHON_VENV)),python3)
KERNELS := $(MAKE) --silent -j4 -C pipeline/noise/csrc PYTHON=$(abspath $(or $(wildcard $(PYTHON_VENV)),$(shell command -v python3)))
GPU_SECONDS := 540

.PHONY: help setup demo test lint doctor bench peers gpu soak clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

setup: ## .venv with everything pinned in requirements.txt; Debian's packages for ffcv where allowed
	@./setup.sh

demo: setup ## the whole job on real pictures, in minutes (DATA=/path/to/pictures takes your own)
	@$(PYTHON_VENV) -m jobs demo --out runs/demo $(if $(DATA),--data "$(DATA)")

# Two at a time, and files whose tests share what they have trained whole. A thread that waits must not spin meanwhile:
# torch's would take half of each other's time.
test: setup lint ## lint, types and tests
	@status=0; export OMP_WAIT_POLICY=PASSIVE; \
	for tests in "tests/unit" "--dist loadfile --no-loadscope-reorder tests/integration tests/distributed tests/slurm tests/gpu"; \
	do $(PYTHON_VENV) -m pytest -n 2 $$tests || status=1; done; exit $$status

lint: setup
	@$(PYTHON_VENV) -m ruff check . && $(PYTHON_VENV) -m ruff format --check . && $(PYTHON_VENV) -m mypy

doctor: setup ## what is installed, what works, what to mend
	@$(PYTHON_VENV) -m pipeline doctor

bench: ## statistics of 10^9 draws, and each noise beside eager torch and torch.compile; on a GPU where there is one
	@$(KERNELS)
	@$(PYTHON_HERE) -m benchmarks draws
	@$(PYTHON_HERE) -m benchmarks noise

peers: setup ## the other loaders that `python -m benchmarks loader` compares with, into .peers
	@$(PYTHON_VENV) -m pip install --quiet --disable-pip-version-check --no-deps --target .peers -r benchmarks/requirements-peers.txt

# One shell, since the build takes of the part's time. 124 is what `timeout` ends with.
gpu: ## what needs a GPU, 9 minutes a part, the same command goes on: PART=check (tests), or noise, train, cifar (measured)
	@case "$(PART)" in check|noise|train|cifar) ;; \
	*) echo "error: make gpu PART=check, PART=noise, PART=train or PART=cifar" >&2; exit 2 ;; esac
	@end=$$(($$(date +%s) + $(GPU_SECONDS))); status=0; \
	$(KERNELS) || exit 2; \
	run() { timeout --foreground $$((end - $$(date +%s))) $(PYTHON_HERE) "$$@" || status=$$?; }; \
	measure() { run -m benchmarks $(PART) --device cuda --minutes $$(((end - $$(date +%s)) / 60)) "$$@"; }; \
	case $(PART) in \
	check) if $(PYTHON_HERE) -c "import pytest" 2>/dev/null; then run -m pytest tests/gpu; \
		else echo "error: the tests did not run: pytest is missing, and '$(PYTHON_HERE) -m pip install pytest' installs it" >&2; \
		status=2; fi; run tests/gpu/sanitize.py ;; \
	noise) measure --dtype bfloat16 --megabytes 1000 --rounds 10 ;; \
	train) measure ;; \
	cifar) measure $(if $(DATA),--data "$(DATA)") ;; \
	esac; \
	[ $$status != 124 ] || echo "cut off after $(GPU_SECONDS) s: the same command goes on where it stopped" >&2; \
	exit $$status

soak: setup ## the long counts: faults, kills and statistics that are too slow for `make test`
	@$(PYTHON_VENV) -m pytest -m soak

clean: ## remove caches and the demo's output
	rm -rf runs/demo .pytest_cache .ruff_cache .mypy_cache .hypothesis
