# One command each, nothing needed before: the virtual environment is made on first use.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test test-slow lint clean

demo: .venv/ready  ## stage 1 on the built-in shapes: pictures and a table, offline, about 12 minutes on two cores with bfloat16
	$(BIN)/python stage1_baseline.py --resume

test: .venv/ready
	$(BIN)/python -m pytest -q

test-slow: .venv/ready  ## the tests that take minutes each
	$(BIN)/python -m pytest -q -m slow

lint: .venv/ready
	$(BIN)/python -m pip install -q "ruff>=0.6"
	$(BIN)/ruff check .

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

clean:
	rm -rf .venv runs
