# Everything is installed into $(VENV); only Python 3.11 or newer is needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
# Without the last option accelerate gives a process one CPU thread.
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(shell nproc)

.PHONY: help install lock quickstart demo test test-fast test-gpu lint types
help:
	@echo "make quickstart   install, teach checkpoints/emoji to draw in lines, measure it (11 minutes on 2 CPU cores)"
	@echo "make demo         open a page to play with the model of the quickstart"
	@echo "make test         install, and run all tests except those that need a GPU"
	@echo "make test-fast    only the fast ones of these: three minutes"
	@echo "make test-gpu     the tests that need a GPU, several at a time"
	@echo "make lint types   check style and types"
	@echo "make lock         renew requirements.lock, the exact versions that these commands install"

install: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$($(PYTHON) --version) found, Python 3.11 or newer is needed; try make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on --quiet --constraint requirements.lock -e ".[dev]"
	@touch $@

# Constraints for every extra and every Python that pyproject.toml allows.
lock:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --upgrade --no-annotate --no-header --quiet \
		--output-file requirements.lock

quickstart: install
	$(BIN)/python -m transfusion_mot.data.line_drawings --output data/line_drawings
	$(LAUNCH) train.py --config configs/quickstart.yaml output_dir=$(RUN)
	rm -rf $(RUN)/evaluation
	$(BIN)/python evaluate/benchmark.py --checkpoint $(RUN) --output $(RUN)/evaluation
	$(BIN)/python sample.py --checkpoint $(RUN) --caption $(RUN)/evaluation/real/00000.png
	@echo
	@echo "before and after:  $(RUN)/samples/before-and-after.png"
	@echo "losses:            $(RUN)/loss.png"
	@echo "report:            $(RUN)/evaluation/report.html"

demo: install
	$(BIN)/python -m transfusion_mot.demo --checkpoint $(RUN)

# Neighbouring tests share fixtures, so each process takes consecutive tests; a process that is done takes some of another's.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test: install
	$(PYTEST)

test-fast: install
	$(PYTEST) -m "not slow and not gpu"

test-gpu: install
	$(BIN)/python -m pytest -m gpu -n 8

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy
