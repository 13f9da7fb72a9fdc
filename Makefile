# Each target is one command. Nothing has to be done before: the first one makes the virtual environment.
PYTHON ?= python3
BIN = .venv/bin

# glibc keeps freed memory for the next training step, which saves a tenth of the time on a CPU.
export MALLOC_TRIM_THRESHOLD_ = 2147483647
export MALLOC_MMAP_MAX_ = 0

.PHONY: demo report test lint

# Runs stage 1 on the built-in shapes and writes pictures and a table. It works offline and takes 4 to 6 minutes on two
# slow cores.
demo: .venv/ready
	$(BIN)/python stage1_baseline.py --budget cpu --resume

# Runs seven variants on the built-in shapes with seed 0, and writes runs/report/shapes-cpu/REPORT.md, which puts their
# numbers beside the committed ones. It takes 25 minutes on two cores.
report: .venv/ready
	$(BIN)/python stage1_baseline.py --variant vae form1 guided augmented --budget cpu --out runs/report --resume
	$(BIN)/python stage2_joint.py --budget cpu --out runs/report --resume
	$(BIN)/python stage3_adaptive.py --budget cpu --out runs/report --resume
	$(BIN)/python bonus_latent.py --budget cpu --out runs/report --resume
	$(BIN)/python final_evaluation.py --runs runs/report/shapes-cpu

test: .venv/ready
	$(BIN)/python -m pytest -q

lint: .venv/ready
	$(BIN)/python -m pip install -q "ruff>=0.6"
	$(BIN)/ruff check .

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@
