PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test bench evidence lint screenshot clean

demo: $(STAMP)  ## The main job on built-in input: report in out/report.html
	$(BIN)/chronotope compare

test: $(STAMP)  ## The tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

bench: $(STAMP)  ## Times and ratios, in one run
	$(BIN)/chronotope bench

evidence: $(STAMP)  ## The page of results; and the longer tests: trainings and timings
	$(BIN)/python docs/results.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m slow --durations=0

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

screenshot: $(STAMP)  ## docs/report.png from out/report.html
	$(BIN)/python docs/screenshot.py

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	touch $@

clean:
	rm -rf $(VENV) out build dist
