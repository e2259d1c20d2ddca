# Each target works as the first command on a machine that has Python >= 3.11 and make: it makes .venv and installs what it needs.
#
#   make demo    distil the bundled teacher, in four steps and in one    make test        the tests, minutes on two cores
#   make check   what a change must pass: lint, types, docs, tests       make test-long   those that take longer: kills, real
#                with the long ones, no known vulnerability                               compilers, every case of a matrix
#                                                                        make docs        the documentation, into site/
#   make test-long PART=2/8   one part of the long ones; each commit's CI runs one of eight, the next commit's the next
#   make release-check   sdist and wheel, built and checked in an environment of its own, .venv-release
#   make audit   known vulnerabilities of what is installed; fails too if one package could not be looked up
#
# TORCH says what is given to pip for torch; the default is the version in constraints.txt. Another build, for example:
#   make demo TORCH=torch                                                       the newest one
#   make demo TORCH="torch==2.13.0 --index-url https://URL-OF-A-BUILD"          one particular build
# (or set STEPFOLD_TORCH in the environment). It is read when .venv is made: `make clean` first if there is one already.
#
# VERSIONS takes the other ends of the ranges in pyproject.toml, each in an environment of its own:
#   make test VERSIONS=lowest      constraints-lowest.txt, in .venv-lowest      make test VERSIONS=newest      no constraints, in .venv-newest

PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11 python,$(shell \
	$(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(p))))
$(if $(filter-out lowest newest,$(VERSIONS)),$(error VERSIONS=$(VERSIONS) is not known; give lowest or newest, or nothing for those of constraints.txt))
CONSTRAINTS := $(wildcard constraints$(VERSIONS:%=-%).txt)
TORCH ?= $(or $(STEPFOLD_TORCH),$(shell sed -n '/^torch==/p' $(CONSTRAINTS) /dev/null),torch)
# Nothing is compiled when it is installed, so Python must be let keep what it compiles: without, each start takes 13 s, not 4.
unexport PYTHONDONTWRITEBYTECODE
VENV := .venv$(VERSIONS:%=-%)
BIN := $(VENV)/bin
AUDIT = $(BIN)/pip-audit --strict --no-deps --disable-pip --progress-spinner off --timeout 10 -r $(VENV)/audit.txt

.PHONY: demo test test-long check lint types format audit audit-if-online docs reference release-check clean $(VENV)/audit.txt
.DELETE_ON_ERROR:

# A student that is there is not made again, and a run that was stopped goes on.
demo: runs/demo-4step/student runs/demo/student

.PRECIOUS: runs/%/student
runs/%/student: | $(VENV)/.installed
	$(BIN)/stepfold distill --preset $* --out runs/$*$(if $(wildcard runs/$*/config.yaml), --resume)

# One process a core; more than four would share too little memory. Who is done first takes over tests of the others; but
# of the long ones whole files, since what their tests share takes minutes to make.
PYTEST = $(BIN)/python -m pytest -q -n logical --maxprocesses 4

test: $(VENV)/.installed
	$(PYTEST) --dist worksteal -m 'not long'

test-long: $(VENV)/.installed
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m long$(PART:%= --part %)

check: lint types docs test test-long audit-if-online

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint Dockerfile; fi

types: $(VENV)/.installed
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# --strict: a package that could not be looked up fails the audit; without it, no network means "no known vulnerabilities".
audit: $(VENV)/audit.txt
	$(AUDIT)

# The same, but without an answer it goes on. pip-audit writes its file (-o) where it has found something, and never otherwise.
audit-if-online: $(VENV)/audit.txt
	@rm -f $(VENV)/found.txt
	@$(AUDIT) -o $(VENV)/found.txt 2> $(VENV)/audit.log && echo "no known vulnerabilities" || \
		if [ -s $(VENV)/found.txt ]; then cat $(VENV)/found.txt; false; \
		else echo "not audited: $$(tail -n 1 $(VENV)/audit.log | sed 's/^ERROR:[^:]*://' | cut -c1-200)"; fi

$(VENV)/audit.txt: $(VENV)/.installed-audit
	@$(BIN)/pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' > $@

# The pages that are written from the code: commands, settings, messages, API.
reference: $(VENV)/.installed
	$(BIN)/python docs/reference/make.py

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The files of a release, built as an index gets them: the wheel out of the sdist.
release-check: .venv-release/.installed
	rm -rf dist
	.venv-release/bin/pyproject-build
	.venv-release/bin/twine check --strict dist/*
	.venv-release/bin/check-wheel-contents dist/*.whl

.venv-release/.installed:
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/pip install --no-compile 'build>=1.2' 'check-wheel-contents>=0.6' 'twine>=6'
	touch $@

clean:
	rm -rf .venv .venv-lowest .venv-newest .venv-release .cache site dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that no other package decides which build of it is taken; after that its version is held.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "stepfold needs Python >= 3.11 and found none; install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "stepfold needs Python >= 3.11 and $(PYTHON) is `$(PYTHON) -V 2>&1`; name a newer one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	sed '/^torch==/d' $(CONSTRAINTS) /dev/null > $(VENV)/constraints.txt
	$(BIN)/pip install --no-compile -c $(VENV)/constraints.txt $(TORCH)
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >> $(VENV)/constraints.txt
	$(BIN)/pip install --no-compile -c $(VENV)/constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.installed-audit: $(VENV)/.installed
	$(BIN)/pip install --no-compile -c $(VENV)/constraints.txt -e '.[audit]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/pip install --no-compile -c $(VENV)/constraints.txt -e '.[docs]'
	touch $@
