# Each target makes what it needs: a virtual environment in .venv, with the package in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo docs test test-slow lint stubs soak bench-accuracy bench-codecs bench-durability bench-layout bench-link bench-malloc bench-memory bench-methods bench-overlap bench-paper bench-replicas bench-scale bench-traffic bench-wire clean fuzz docker-test examples

demo: $(VENV)/ready
	$(BIN)/dsl demo

# One thread for each process: they share the cores.
test: $(VENV)/ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --editable '.[fuzz]'
	mkdir -p fuzz/found
	$(BIN)/python -m fuzz -runs=200000 -max_len=2048 -artifact_prefix=fuzz/found/ fuzz/found fuzz/corpus

stubs: $(VENV)/ready
	$(BIN)/python tools/stubs.py

docs: $(VENV)/docs
	$(BIN)/python tools/settings.py
	$(BIN)/python tools/pages.py --build

examples: $(VENV)/ready
	$(BIN)/python tools/notebook.py examples/compare.ipynb

soak: $(VENV)/ready
	$(BIN)/python benchmarks/soak/main.py $(SOAK)

docker-test: $(VENV)/ready
	PYTHON=$(abspath $(BIN)/python) docker/test.sh

bench-accuracy bench-codecs bench-durability bench-layout bench-link bench-malloc bench-memory bench-methods bench-overlap bench-replicas bench-traffic bench-wire: bench-%: $(VENV)/ready
	$(BIN)/python benchmarks/$*/main.py $(IMAGES)

bench-scale: $(VENV)/ready
	$(BIN)/python benchmarks/scale/main.py $(SCALE)

bench-paper: $(VENV)/ready
	$(BIN)/dsl bench paper $(PAPER)

$(VENV)/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/docs: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) .cache build dist site .mypy_cache .ruff_cache .pytest_cache
