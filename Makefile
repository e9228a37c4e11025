# The five commands. PYTHON picks the interpreter: make test PYTHON=.venv/bin/python
PYTHON ?= python

.PHONY: install test lint types bench

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
	OMP_PROC_BIND=true $(PYTHON) benchmarks/vision.py
	OMP_PROC_BIND=true $(PYTHON) benchmarks/load.py
