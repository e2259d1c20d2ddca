# Each target works as the first command on a machine that has Python >= 3.11 and make: it makes .venv and installs what it needs.
#
#   make demo    distil the bundled teacher into a one-step student      make test    the tests
#   make check   what a change must pass: lint, types, tests             make docs    the documentation, into site/
#   make audit   known vulnerabilities of what is installed (asks the network)
#
# TORCH says what is given to pip for torch; the default is the version in constraints.txt. Another build, for example:
#   make demo TORCH=torch                                                       the newest one
#   make demo TORCH="torch==2.13.0 --index-url https://URL-OF-A-BUILD"          one particular build
# (or set STEPFOLD_TORCH in the environment). It is read when .venv is made: `make clean` first if there is one already.

PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11 python,$(shell \
	$(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(p))))
STEPFOLD_TORCH ?= $(shell sed -n 's/^torch==/&/p' constraints.txt)
TORCH ?= $(STEPFOLD_TORCH)
BIN := .venv/bin

.PHONY: demo test check lint types format audit docs clean
.DELETE_ON_ERROR:

demo: .venv/.installed
	$(BIN)/stepfold distill --preset demo --out runs/demo

# A file at a time to each process, one process a core; more than four would share too little memory.
test: .venv/.installed
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile

check: lint types docs test

lint: .venv/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint Dockerfile; fi

types: .venv/.installed
	$(BIN)/pyright --pythonpath $(BIN)/python

format: .venv/.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# --strict: a package that could not be looked up fails the audit; without it, no network means "no known vulnerabilities".
audit: .venv/.installed-audit
	$(BIN)/pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' > .venv/audit.txt
	$(BIN)/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r .venv/audit.txt

docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .cache site dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that no other package decides which build of it is taken; after that its version is held.
.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "stepfold needs Python >= 3.11 and found none; install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "stepfold needs Python >= 3.11 and $(PYTHON) is `$(PYTHON) -V 2>&1`; name a newer one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	grep -v '^torch==' constraints.txt > .venv/constraints.txt
	$(BIN)/pip install -c .venv/constraints.txt $(TORCH)
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >> .venv/constraints.txt
	$(BIN)/pip install -c .venv/constraints.txt -e '.[dev]'
	touch $@

.venv/.installed-audit: .venv/.installed
	$(BIN)/pip install -c .venv/constraints.txt -e '.[audit]'
	touch $@

.venv/.installed-docs: .venv/.installed
	$(BIN)/pip install -c .venv/constraints.txt -e '.[docs]'
	touch $@
