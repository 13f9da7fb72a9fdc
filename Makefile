# One command each, nothing needed before: the virtual environment is made on first use.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo report test test-slow lint clean

demo: .venv/ready  ## stage 1 on the built-in shapes: pictures and a table, offline, 5 minutes on two slow cores
	$(BIN)/python stage1_baseline.py --budget cpu --resume

report: .venv/ready  ## seed 0 of what the report rests on, on shapes, beside the committed numbers: half an hour on two slow cores
	$(BIN)/python stage1_baseline.py --variant vae form1 uncond --budget cpu --resume
	$(BIN)/python stage2_joint.py --budget cpu --resume
	$(BIN)/python stage3_adaptive.py --conditioning fixed --budget cpu --resume
	$(BIN)/python stage3_adaptive.py --budget cpu --resume
	$(BIN)/python bonus_latent.py --budget cpu --resume
	$(BIN)/python final_evaluation.py --runs runs

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
