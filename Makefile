# make quickstart: from nothing to a trained model, its accuracy grid and its pictures.
# make test:       from nothing to a tested checkout; CI runs this.
PYTHON ?= python3
RUN    ?= runs/quickstart
BIN    := .venv/bin

.PHONY: quickstart test lint bench

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: .venv/installed
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		train.py recipes/quickstart.yaml
	$(BIN)/looped eval $(RUN) --loops 1 2 4 6 8 10 12 14 16 20 24 --max-loops 24
	$(BIN)/looped plot $(RUN)
	$(BIN)/looped ask $(RUN)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: lint
	$(BIN)/pytest

bench: .venv/installed
	$(BIN)/looped bench --run $(RUN)
