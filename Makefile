PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: test demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

demo: $(STAMP)
	$(BIN)/fastgrpo demo

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "fastgrpo needs Python 3.11 or newer, and '$(PYTHON)' is not: make PYTHON=python3.11 $(MAKECMDGOALS)"; \
		exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt torch==2.13.0
	$(BIN)/pip install -c constraints.txt -e '.[dev,demo]'
	@touch $@
