# make demo      set up and train a small MLA + MoE + MTP model on Python's own source (5 minutes), then show what it learnt
# make reasoning a small model learns to think: pretraining, fine-tuning, reinforcement
# make test      set up and run the tests
# make test-all  the slow ones too
# make lint      ruff and mypy
# make sanitize  the kernels' tests with address and undefined-behaviour checks
# Everything is installed into .venv; the system's Python is left alone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The install knows files by name: a new name, as after a pull, asks for another.
NAMES := $(shell find src -name '*.py' | sort | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.installed-$(NAMES)
NATIVE := $(wildcard CMakeLists.txt csrc/*)

.PHONY: demo reasoning test test-all lint sanitize setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	rm -f $(VENV)/.installed*
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/shoal train exportable --minutes 5 --model.num-nextn-predict-layers 1 --mtp.begins 0.4 --out runs/demo --overwrite \
		--prompts 'def read_json(path):' 'class Stack:' 'for i in range('

reasoning: $(STAMP)
	$(BIN)/shoal recipe reasoning --out runs/reasoning --overwrite

test: $(STAMP)
	$(BIN)/python -m pytest -m 'not slow and not gpu'

test-all: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# An environment of its own, which finds everything but shoal in the first.
SANITIZED := build/sanitized
sanitize: $(STAMP)
	$(PYTHON) -m venv $(SANITIZED)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$($(SANITIZED)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/others.pth"
	$(SANITIZED)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e . -C cmake.define.SHOAL_SANITIZE=ON -C build-dir=build/sanitized-kernels
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
		$(SANITIZED)/bin/python -m pytest -x tests/kernels tests/engine/test_native_runner.py

clean:
	rm -rf $(VENV) build
