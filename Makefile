# make quickstart: from nothing to a trained model, its accuracy grid and its pictures.
# make docs:       the API reference, in docs/api/html.
# make test:       from nothing to a tested checkout; CI runs this. A process per core, one thread each.
# make test-fast:  the tests that are not marked slow, in the environment there is: under two minutes on two cores.
# make test-oldest, make test-newest: the tests on the oldest versions that pyproject.toml admits, and on the newest
#                  there are, each in an environment of its own. Some GB: torch of PyPI comes with its CUDA libraries.
#                  Saved models are also run on the versions of transformers that serving engines pin.
# make test-engines: llama.cpp, built from source (some minutes), and CTranslate2 in an environment of their own; and
#                  vLLM for CPUs in another. tests/engines/requirements-*.txt have the versions.
# make bench-engines: how fast llama.cpp, MLX and transformers decode one model.
# make fuzz N=10000: as many random models and calls for every law; `make test` tries the same few each time.
PYTHON ?= python3
N      ?= 1000
RUN    ?= runs/quickstart
CORES  ?= logical
BIN    := .venv/bin
PINNED_BY_ENGINES := 5.16.1 5.19.0 5.20.2
# Each process takes about 1 GB; one that is idle takes over half of what another has left.
PYTEST := -m pytest -n $(CORES) --maxprocesses 8 --dist worksteal

.PHONY: quickstart docs test test-fast fuzz test-oldest test-newest test-engines bench-engines lint bench

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: .venv/installed
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		train.py recipes/quickstart.yaml
	$(BIN)/looped eval $(RUN) --loops 1 2 4 8 12 16 24 32 40 48 56 64 72 80 88 --max-loops 88 --limit 50
	$(BIN)/looped plot $(RUN)
	$(BIN)/looped ask $(RUN)

docs: .venv/installed
	$(BIN)/python docs/api/build.py docs/api/html

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

.venv/tested: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,quantizers]'
	touch $@

test: lint .venv/tested
	$(BIN)/python $(PYTEST)

test-fast: .venv/tested
	$(BIN)/python $(PYTEST) -m "not slow"

fuzz: .venv/tested
	$(BIN)/pytest tests/model/test_properties.py --fuzz $(N)

test-oldest: constraints-oldest.txt
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/pip install --quiet -c constraints-oldest.txt -e '.[dev,quantizers]'
	.venv-oldest/bin/python $(PYTEST)
	.venv-oldest/bin/python tests/saved_folders.py write .venv-oldest/saved
	.venv-oldest/bin/python tests/saved_folders.py check .venv-oldest/saved
	for version in $(PINNED_BY_ENGINES); do \
		$(PYTHON) -m venv --clear .venv-oldest/transformers && \
		.venv-oldest/transformers/bin/pip install --quiet torch==2.9.0 transformers==$$version && \
		.venv-oldest/transformers/bin/python tests/saved_folders.py check .venv-oldest/saved || exit 1; \
	done

test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/pip install --quiet -e '.[dev,quantizers]'
	.venv-newest/bin/pip list | grep -iE '^(torch|transformers|datasets|accelerate|huggingface_hub) '
	.venv-newest/bin/python $(PYTEST)
	.venv-newest/bin/python tests/saved_folders.py write .venv-newest/saved
	.venv-newest/bin/python tests/saved_folders.py check .venv-newest/saved

.venv-engines/installed: pyproject.toml constraints.txt tests/engines/requirements-llama.txt
	$(PYTHON) -m venv --clear .venv-engines
	.venv-engines/bin/pip install --quiet -c constraints.txt -e '.[export,eval,mlx]' pytest hypothesis
	.venv-engines/bin/pip install --quiet -r tests/engines/requirements-llama.txt
	touch $@

# vLLM reads no pictures or sound here, and PyPI's packages for them want a torch with CUDA.
.venv-vllm/installed: tests/engines/requirements-vllm.txt
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/pip install --quiet -r tests/engines/requirements-vllm.txt
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-engines: .venv-engines/installed .venv-vllm/installed
	.venv-engines/bin/python -m pytest tests/engines -rs

bench-engines: .venv-engines/installed
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 .venv-engines/bin/python tests/engines/decode_speed.py

bench: .venv/installed
	$(BIN)/looped bench --run $(RUN)
