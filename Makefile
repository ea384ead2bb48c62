# Everything from nothing: `make test` on a fresh machine with Python makes the environment, fetches the model and tests.

PYTHON ?= python3
ARGS ?=
BUDGET ?= small
DATA ?=

VENV := .venv
BIN := $(VENV)/bin
PIP_QUIETLY := pip --quiet --disable-pip-version-check --no-input
PIP := $(BIN)/python -m $(PIP_QUIETLY)
DEEPSPEED := 'deepspeed>=0.19,<0.20' einops hjson msgpack ninja py-cpuinfo
STAMP := $(VENV)/.installed
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed
MODEL := .models/SmolLM2-135M-Instruct
MODEL_FILE := $(MODEL)/model.safetensors

PYTHON_IS_NEW_ENOUGH := import sys; v = sys.version_info; sys.exit( \
	None if v >= (3, 10) else "error: Python 3.10 or newer is needed, %s is %d.%d.%d" % ((sys.executable,) + v[:3]))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install model quickstart test test-vllm test-versions test-lowest test-newest results results-gpu lint format clean distclean

help: ## Show this list
	@echo "Targets (PYTHON=... picks the interpreter, ARGS='...' goes to quickstart, tests and results):"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## Make .venv with the pinned packages, this one (editable) and its tools

model: $(MODEL_FILE) ## Put SmolLM2-135M-Instruct in .models/

quickstart: $(MODEL_FILE) ## Run examples/quickstart.py
	@$(BIN)/python examples/quickstart.py $(ARGS)

test: $(MODEL_FILE) ## Run the tests, e.g. make test ARGS="-m 'not slow' -k attention"
	@echo "==> pytest"
	@$(BIN)/python -m pytest -q $(ARGS)

test-vllm: $(VLLM_STAMP) ## Run the tests on a real vLLM, in an environment of its own (.venv-vllm)
	@echo "==> pytest with vLLM"
	@for tests in tests/serving tests/self_study/engines/test_vllm.py tests/self_study/test_vllm_runs.py; do \
		$(VLLM_BIN)/python -m pytest -q $$tests $(ARGS) || { status=$$?; [ $$status -eq 5 ] || exit $$status; }; done  # 5: none selected

test-versions: test-lowest test-newest ## Run the quick tests with the lowest and the newest transformers, peft, trl

# The packages of `.venv`, with these three in front of them: one torch serves all. Every run asks for the newest anew.
test-lowest: WANTED = sed -nE 's/^ *"((transformers|peft|trl)>=)([0-9.]+).*/\2==\3/p'
test-newest: WANTED = sed -nE 's/^ *"((transformers|peft|trl)>=[^"]*)".*/\1/p'
test-lowest test-newest: test-%: $(MODEL_FILE)
	@echo "==> installing the $* transformers, peft and trl that pyproject.toml admits, in $(VENV)-$*"
	@test -x $(VENV)-$*/bin/python || $(BIN)/python -m venv --without-pip $(VENV)-$*
	@$(BIN)/python -c 'import site; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' \
		> $$($(VENV)-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages-of-venv.pth
	@$(WANTED) pyproject.toml | xargs $(VENV)-$*/bin/python -m pip --quiet --no-input install --upgrade
	@$(VENV)-$*/bin/python -c 'from importlib.metadata import version; print("==> pytest with", \
		*(f"{name} {version(name)}" for name in ("transformers", "peft", "trl")))'
	@$(VENV)-$*/bin/python -m pytest -q -m "not slow" $(ARGS)

results: $(MODEL_FILE) ## Measure everything shortly; make results BUDGET=full DATA=folder writes docs/results.md; carries on
	@$(BIN)/python -m benchmarks.results --budget $(BUDGET) $(if $(DATA),--data $(DATA)) $(ARGS)

results-gpu: $(STAMP) ## The same with Qwen3-4B and Llama-3.1-8B on LongHealth and QuALITY; wants a GPU with 80 GB
	@for model in "Qwen/Qwen3-4B --window 40960" "meta-llama/Llama-3.1-8B-Instruct --window 131072"; do \
		$(BIN)/python -m benchmarks.results --budget full --device cuda --tasks longhealth quality $(if $(DATA),--data $(DATA)) \
			--documents 6 --conversations 4096 --steps 400 --model $$model $(ARGS) || exit 1; done

lint: $(STAMP) ## Check style, format and types
	@echo "==> ruff check"
	@$(BIN)/ruff check .
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "==> mypy"
	@$(BIN)/mypy

format: $(STAMP) ## Repair style and format
	@$(BIN)/ruff check --fix-only --exit-zero .
	@$(BIN)/ruff format .

clean: ## Remove caches and build output
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path './$(VENV)*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove the environments and the model too
	@rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest $(VLLM_VENV) $(MODEL)

# The stamp is written last, so an install that broke off is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "error: $(PYTHON) not found; install Python 3.10 or newer, or name it: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c '$(PYTHON_IS_NEW_ENOUGH)'
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || { echo "==> making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -c '$(PYTHON_IS_NEW_ENOUGH)'
	@echo "==> installing torch (a few minutes)"
	@$(PIP) install -c constraints.txt torch
	@echo "==> installing peft-cartridges[dev] and its dependencies (a few minutes)"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@echo "==> installing DeepSpeed for its own test, apart: accelerate imports it wherever it finds it"
	@$(PIP) install --target $(VENV)/deepspeed --no-deps $(DEEPSPEED) || echo "without DeepSpeed its test is skipped"
	@touch $@

# vLLM's environment: torch with what it asks for, the rest as it is pinned, then this package without its dependencies.
$(VLLM_STAMP): constraints-vllm.txt
	@$(PYTHON) -c '$(PYTHON_IS_NEW_ENOUGH)'
	@$(VLLM_BIN)/python -m pip --version > /dev/null 2>&1 || { echo "==> making $(VLLM_VENV)"; $(PYTHON) -m venv $(VLLM_VENV); }
	@echo "==> installing vLLM (a few minutes)"
	@$(VLLM_BIN)/python -m $(PIP_QUIETLY) install "$$(grep '^torch==' constraints-vllm.txt)"
	@$(VLLM_BIN)/python -m $(PIP_QUIETLY) install --no-deps -r constraints-vllm.txt -e .
	@touch $@

# The environment comes first, but a newer one is no reason to fetch the model again.
$(MODEL_FILE): | $(STAMP)
	@echo "==> fetching the model"
	@TQDM_DISABLE=1 $(BIN)/python examples/smollm2.py --output $(MODEL)
