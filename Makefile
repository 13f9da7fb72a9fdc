# Each target is one command. Nothing has to be done before: the first one makes the virtual environment.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo report test test-slow lint

# Runs stage 1 on the built-in shapes and writes pictures and a table. It works offline and takes 4 to 8 minutes on two
# slow cores.
demo: .venv/ready
	$(BIN)/python stage1_baseline.py --budget cpu --resume

# Runs seven variants on the built-in shapes with seed 0, and writes runs/report/REPORT.md, which puts their numbers
# beside the committed ones. It takes half an hour on two slow cores. (The runs have a folder of their own, since those of
# other budgets or settings could not stand in the same table.)
report: .venv/ready
	$(BIN)/python stage1_baseline.py --variant vae form1 guided augmented --budget cpu --out runs/report --resume
	$(BIN)/python stage2_joint.py --budget cpu --out runs/report --resume
	$(BIN)/python stage3_adaptive.py --budget cpu --out runs/report --resume
	$(BIN)/python bonus_latent.py --budget cpu --out runs/report --resume
	$(BIN)/python final_evaluation.py --runs runs/report

test: .venv/ready
	$(BIN)/python -m pytest -q

# Runs the tests that take minutes each. `make test` leaves them out.
test-slow: .venv/ready
	$(BIN)/python -m pytest -q -m slow

lint: .venv/ready
	$(BIN)/python -m pip install -q "ruff>=0.6"
	$(BIN)/ruff check .

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@
