# make quickstart | test | check | install; the first of them on a fresh machine installs.

PYTHON ?= python3
# Which torch to install. On a machine with an NVIDIA GPU: make install TORCH=torch
TORCH ?= torch==2.13.0
BIN := .venv/bin
WORLD := recipes/world
JOB := build/quickstart

# Real models and texts for `make results-methods`, beside the embedded teacher: a folder with `models` and `text`.
REAL_DATA ?= $(wildcard ../shared/data)

.PHONY: install quickstart results-methods results-plans results-sensitivity peers test check world-data teacher clean

install: .venv/installed

.venv/installed: pyproject.toml
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

# The main job on the embedded teacher: all five stages, beside rounding to nearest and a control that
# is trained for as many steps on the same text, but without a teacher.
quickstart: install $(WORLD)/distill.txt
	rm -rf $(JOB)
	$(BIN)/edgerazor pack $(WORLD)/teacher --bits 1.58 --work $(JOB)/rounded
	$(BIN)/edgerazor distill --recipe recipes/control.yaml --work $(JOB)/control
	$(BIN)/edgerazor pack --work $(JOB)/control
	$(BIN)/edgerazor run recipes/quickstart.yaml --work $(JOB)/distilled

$(WORLD)/distill.txt: $(WORLD)/corpus.py | install
	$(BIN)/python $(WORLD)/corpus.py distill

# The table of methods in recipes/RESULTS.md; hours, but it keeps what is finished and goes on where it was stopped.
results-methods: install peers $(WORLD)/distill.txt
	$(BIN)/python recipes/methods.py $(if $(REAL_DATA),--real-data $(REAL_DATA))

# The table of plans: bits where they are needed, at equal real bytes; likewise.
results-plans: install $(WORLD)/distill.txt
	$(BIN)/python recipes/plans.py $(if $(REAL_DATA),--real-data $(REAL_DATA))

# What the estimates of sensitivity are worth, and what they cost; alone on the machine.
results-sensitivity: install $(WORLD)/distill.txt
	$(BIN)/python recipes/sensitivity.py $(if $(REAL_DATA),--real-data $(REAL_DATA))

# What packing costs in memory and time, and how fast a packed model opens; alone on the machine, 6 GB of disk.
.PHONY: results-packing
results-packing: install
	$(BIN)/python recipes/packing.py

# Damaged packed folders, N of them or as many as FUZZ_SECONDS allow: all refused in one sentence, or unharmed.
.PHONY: fuzz
fuzz: install
	$(BIN)/python tests/fuzz_packed.py $(or $(N),100000) $(if $(FUZZ_SECONDS),--seconds $(FUZZ_SECONDS))

# Published post-training methods, in an environment of their own (several GB: GPTQModel brings torch with CUDA).
peers: build/peers/installed

build/peers/installed: recipes/peers.txt
	rm -rf build/peers
	$(PYTHON) -m venv build/peers
	build/peers/bin/pip install --quiet -r recipes/peers.txt
	touch $@

# The tasks and the held-out text that lie in the repository; made again only when the world changes.
world-data: install
	$(BIN)/python $(WORLD)/corpus.py tasks

# The embedded teacher from nothing: hours on a CPU, minutes on a GPU.
teacher: install
	$(BIN)/python $(WORLD)/train_teacher.py

test: install $(WORLD)/distill.txt
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

clean:
	rm -rf build .venv
