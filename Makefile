# The five commands. PYTHON picks the interpreter: make test PYTHON=.venv/bin/python
PYTHON ?= python
SCRATCH ?= build/bench

.PHONY: install test lint types bench gpu

install:
	$(PYTHON) -m pip install -e ".[dev]"

test:
	$(PYTHON) -m pytest

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m mypy

# Needs the extra "bench". Threads stay on their cores, or every figure is too low.
bench:
	OMP_PROC_BIND=true $(PYTHON) benchmarks/vision.py --scratch $(SCRATCH)
	OMP_PROC_BIND=true $(PYTHON) benchmarks/load.py --scratch $(SCRATCH)
	OMP_PROC_BIND=true $(PYTHON) benchmarks/linear.py
	OMP_PROC_BIND=true $(PYTHON) benchmarks/generate.py --scratch $(SCRATCH)

# On a machine with an NVIDIA GPU, from the source tree. Without one, the tests and the benchmark are skipped.
gpu:
	$(PYTHON) setup.py build_native --inplace
	PYTHONPATH=src $(PYTHON) -m pytest -o addopts=-q tests/gpu; tests=$$?; \
	PYTHONPATH=src $(PYTHON) benchmarks/ops.py --output benchmarks/results && exit $$tests
