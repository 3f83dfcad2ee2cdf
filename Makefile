# make verify | conform | test | check | bench: each one sets up what it needs the first time and again when that has changed.

VENV    ?= .venv
# What pip installs: this work tree, or the path of a wheel.
PACKAGE ?= -e .
JOBS    ?= 2

BIN    := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check
# torch itself runs single-threaded below, so that the test workers don't fight over the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal -p no:benchmark

# quick or full
LEVEL   ?= quick

.PHONY: verify conform test check bench coverage clean FORCE
.NOTPARALLEL:

verify: $(STAMPS)/verify $(STAMPS)/package
	$(BIN)/translution verify

# By the names that a stranger would use.
conform: $(STAMPS)/verify $(STAMPS)/package
	$(BIN)/translution conform translution.backends.reference:backend --level $(LEVEL)
	$(BIN)/translution conform translution.backends.numpy:backend --level $(LEVEL)
	$(BIN)/translution conform translution.backends.torch:backend --level $(LEVEL)
	TRITON_INTERPRET=1 $(BIN)/translution conform translution.backends.triton:backend --level $(LEVEL) --dtype float32
	$(BIN)/translution conform --selftest

# Triton decides when it is imported whether it interprets or compiles: one process for each.
test: $(STAMPS)/dev $(STAMPS)/package
	$(PYTEST) tests --ignore=tests/triton_interpreter --ignore=tests/triton_ahead_of_time
	TRITON_INTERPRET=1 $(PYTEST) tests/triton_interpreter
	$(PYTEST) tests/triton_ahead_of_time

check: $(STAMPS)/dev $(STAMPS)/package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/check_types.py
	$(BIN)/python scripts/size_table.py

# Every part runs, whatever another one misses.
bench: $(STAMPS)/dev $(STAMPS)/package
	missed=; \
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds || missed=1; \
	for part in report memory native scale; do $(BIN)/python benchmarks/$$part.py || missed=1; done; \
	test -z "$$missed"

coverage: $(STAMPS)/dev $(STAMPS)/package
	$(PYTEST) tests --ignore=tests/triton_interpreter --ignore=tests/triton_ahead_of_time --cov
	TRITON_INTERPRET=1 $(PYTEST) tests/triton_interpreter --cov --cov-append

clean:
	rm -rf $(VENV) build dist *.egg-info

$(STAMPS)/venv: scripts/find_python
	python=$$(PYTHON="$(PYTHON)" scripts/find_python) && "$$python" -m venv $(VENV)
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/verify: requirements/verify.txt requirements/triton.txt $(STAMPS)/venv
	@echo 'Installing requirements/verify.txt into $(VENV): a minute or two, once.'
	$(PIP) install -r requirements/verify.txt
	$(PIP) install --no-deps -r requirements/triton.txt
	touch $@

$(STAMPS)/dev: requirements/dev.txt $(STAMPS)/verify
	@echo 'Installing requirements/dev.txt into $(VENV): about a minute, once.'
	$(PIP) install -r requirements/dev.txt
	touch $@

# Everything the package depends on is pinned above, setuptools included, so nothing is resolved here.
$(STAMPS)/package: pyproject.toml $(filter %.whl,$(PACKAGE)) $(STAMPS)/package-name $(STAMPS)/verify
	PYTHONWARNINGS=ignore $(PIP) install --no-deps --no-build-isolation --force-reinstall $(PACKAGE)
	touch $@

# Rewritten only when PACKAGE differs from what is installed.
$(STAMPS)/package-name: FORCE | $(STAMPS)/venv
	@echo '$(PACKAGE)' | cmp -s - $@ || echo '$(PACKAGE)' > $@
FORCE:
