# `make quickstart` and `make test` set up everything they need in .venv.
# TORCH is what pip is asked for, options included. Where pip's index serves the CUDA build under this version and there
# is no GPU:  make install TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
# For a GPU, name the build for your CUDA in the same way.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
DATA ?=
IMAGE ?= cpu
PYTHON_DIGEST ?=
OUT ?= runs/quickstart
ARGS ?=

PY := $(VENV)/bin/python
# one process a core, up to four: more would meet the time limits of tests that start two ranks or a cluster themselves
# and a thread each: two processes of two threads wait for each other on two cores
# files in their own order: tests/integration, the long ones, come before tests/unit, and all processes end together
PARALLEL := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
RAY := $(patsubst ray==%,%,$(filter ray==%,$(shell cat constraints.txt)))
INSTALLED := $(VENV)/.installed
# The extra `bench`, without what the peers ask for besides: it is here already, or not needed.
PEERS := transformers tokenizers megabyte-pytorch beartype

.PHONY: help install quickstart test test-all chaos bench-tokenize bench-train bench-load bench-predict bench-scale bench-gpu image lint check format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

install: $(INSTALLED) ## virtual environment and dependencies

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --progress-bar off $(TORCH)
	$(PY) -m pip install --quiet --progress-bar off -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(INSTALLED) ## audio to a table of classifiers on a small corpus; DATA=folder takes your own audio
	$(PY) launch/quickstart.py configs/quickstart/small.yaml 'output.url="$(OUT)"' $(if $(DATA),'data="$(DATA)"') $(ARGS)

test: $(INSTALLED) ## every test but the slow ones (about 25 minutes on two cores)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" $(PARALLEL) $(ARGS)

test-all: $(INSTALLED) ## every test
	$(PY) -m pytest $(ARGS)

chaos: $(INSTALLED) ## kill workers and drivers, spoil S3, fill the disk; prints what was lost, repeated or changed (half an hour)
	$(PY) tests/integration/chaos.py $(ARGS)

bench-tokenize: $(INSTALLED) ## hours of audio an hour beside the encodec package and the limit of its arithmetic (10 minutes)
	$(PY) launch/bench.py tokenize $(ARGS)

bench-load: $(INSTALLED) ## clips loaded per core-second beside plain webdataset, streaming and from memory (5 minutes)
	$(PY) launch/bench.py load $(ARGS)

bench-predict: $(INSTALLED) ## labels a second from .ecdc bytes beside decoding them, log-mel and a CNN (15 minutes)
	$(PY) launch/bench.py predict $(ARGS)

bench-scale: $(INSTALLED) ## pretraining on one rank and on two, and on 1 to 1,024 GPUs on paper (8 minutes)
	$(PY) launch/bench.py scale $(ARGS)

bench-gpu: $(INSTALLED) ## what one GPU trains and tokenises a second, and where a step's time goes
	$(PY) launch/bench.py gpu $(ARGS)

bench-train: $(INSTALLED) ## a training step beside a flat Transformer, ModernBERT and MEGABYTE (an hour)
	$(PY) -m pip install --quiet --progress-bar off --no-deps -c constraints.txt $(PEERS)
	$(PY) launch/bench.py train $(ARGS)

# the image for CPUs is one of Linux, where pip's own index serves the CUDA build
CPU_INDEX := --index-url https://download.pytorch.org/whl/cpu
image: ## container image of k8s/; PYTHON_DIGEST=sha256:… pins its base, IMAGE=cuda is for GPUs
	docker build --file k8s/Dockerfile --target $(IMAGE) --build-arg PYTHON_DIGEST=$(PYTHON_DIGEST) \
	  --build-arg TORCH="$(TORCH)$(if $(filter cpu,$(IMAGE)), $(CPU_INDEX))" \
	  --tag megascale:0.1.0-ray$(RAY)$(if $(filter cpu,$(IMAGE)),-cpu) .

lint: $(INSTALLED) ## ruff, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

check: lint ## ruff, mypy, unit tests
	$(PY) -m pytest tests/unit -m "not slow" $(ARGS)

format: $(INSTALLED) ## let ruff lay the code out
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
