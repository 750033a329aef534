# `make demo` and `make test` each work alone on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
BIN := $(VENV)/bin

.PHONY: demo test lint bench fuzz clean
.DEFAULT_GOAL := demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: $(BIN)/python pyproject.toml setup.py
	$(BIN)/python -m pip install --quiet .
	touch $@

$(VENV)/.installed-$(EXTRAS): $(BIN)/python pyproject.toml setup.py $(wildcard tests/parity/requirements*.txt)
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	$(if $(findstring parity,$(EXTRAS)),$(BIN)/python -m pip install --quiet --no-deps -r tests/parity/requirements-first.txt)
	$(if $(findstring parity,$(EXTRAS)),$(BIN)/python -m pip install --quiet --no-deps -r tests/parity/requirements.txt)
	touch $@

demo: $(VENV)/.installed  ## caption a bundled clip of human speech, live; then a full-duplex dialogue; then speech of a text
	$(BIN)/antiphon transcribe --realtime apps/samples/two_cities.flac
	@mkdir -p build
	$(BIN)/antiphon talk --file apps/samples/questions.flac -o build/dialogue.wav --seed 0
	@echo "Both sides of the dialogue, the model on the right: build/dialogue.wav"
	$(BIN)/antiphon speak "You have heard two strangers read and talk. I am a small voice, and I speak while I think." -o build/speech.wav --seed 0
	@echo "What it says: build/speech.wav"

test: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pip install --quiet --no-deps --target build/site --upgrade .
	cd build && MYPYPATH=site ../$(BIN)/mypy --config-file ../pyproject.toml -p antiphon

bench: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/antiphon bench runtime
	$(BIN)/antiphon bench asr
	$(BIN)/antiphon bench transport_loss
	$(BIN)/antiphon bench transport_peers

fuzz: $(VENV)/.installed-$(EXTRAS)  ## a minute on everything that strangers may send; needs the fuzz extra
	$(BIN)/python tests/fuzz/run.py --seconds 60

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
