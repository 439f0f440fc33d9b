# make demo: the whole workflow on real digits.  make test: every test.  make bench: what watching and ICA cost.
# Each sets everything up by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := envs/constraints.txt
INSTALL := $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -c $(CONSTRAINTS)
# Bytecode by all cores, without packages' own tests: pip's, by one core, took as long as all else.  Left to the jobs, each
# would compile all it imports where Python may not write (PYTHONDONTWRITEBYTECODE, as in many containers).  Some packages
# hold files in another syntax.
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/tests/' $(VENV)/lib autospec || true

.PHONY: demo test bench lint setup setup-test setup-slurm schema constraints clean

demo: $(VENV)/.ready
	$(BIN)/snakemake
	@echo
	@echo "Open results/report.html; the composed page is results/figures/figure-1.pdf."
	@echo "From now on:  . $(BIN)/activate && snakemake"

test: $(VENV)/.ready-test $(VENV)/.ready-slurm
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -n 2 --dist worksteal
	$(BIN)/pytest -n 2 tests/device

bench: $(VENV)/.ready-test
	$(BIN)/python benchmarks/cost.py $(BENCH_OPTIONS)
	$(BIN)/python benchmarks/scica.py $(SCICA_OPTIONS)

lint: $(VENV)/.ready-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow
	$(BIN)/mypy

schema: $(VENV)/.ready
	$(BIN)/python -m autospec schema

# A new set of pins, from nothing: what today's releases resolve to.
constraints:
	$(PYTHON) envs/pin.py

setup: $(VENV)/.ready
setup-test: $(VENV)/.ready-test
setup-slurm: $(VENV)/.ready-slurm

$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "autospec needs Python 3.11 or newer, and $(PYTHON) is older: run  make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV) (a minute or two; PyTorch is the largest part) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	$(COMPILE)
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(INSTALL) -e '.[test]'
	$(COMPILE)
	touch $@

# Snakemake's executor for Slurm, for the test of it: in a folder of its own, since where it is installed every start of
# Snakemake asks Slurm's controller, and waits up to ten seconds for one that does not answer.
$(VENV)/.ready-slurm: $(VENV)/.ready
	sed '1,/^# needed for Slurm as well/d' $(CONSTRAINTS) > $(VENV)/slurm-plugin.txt
	rm -rf $(VENV)/slurm-plugin
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --target $(VENV)/slurm-plugin -r $(VENV)/slurm-plugin.txt
	touch $@

clean:
	rm -rf $(VENV) results work logs .snakemake
