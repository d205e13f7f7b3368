# Every target sets up what it needs. Only make and Python 3.11 or newer have to be on the machine.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check --quiet
READY := $(VENV)/.installed
# The extra `speech`; pystoi has the version of requirements.lock. pesq is built on installation.
SPEECH := pesq==0.0.4 $(shell grep '^pystoi==' requirements.lock)
# Extra arguments of the command behind a target: make test ARGS="-k codes -x"
ARGS ?=
# The default tests run in two processes; those of a file stay together, as they share what it makes once.
TWO := -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-audio test test-slow test-all test-lowest lint format wheel clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1@\2/p' $(MAKEFILE_LIST) | column -t -s @ 2>/dev/null \
		|| sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1: \2/p' $(MAKEFILE_LIST)

setup: $(READY) ## create .venv and install the locked packages into it

# The stamp is written last, so that an interrupted installation starts again where pip finds it.
$(READY): requirements.lock pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %d.%d: name another one with make PYTHON=..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@test -x $(RUN) || { echo "[set-up 1/4] creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "[set-up 2/4] installing the packages of requirements.lock (some gigabytes with torch; a few minutes the first time)"
	@$(PIP) install -r requirements.lock
	@echo "[set-up 3/4] installing vqtok itself, editable"
	@$(PIP) install --no-deps --no-build-isolation -e .
	@echo "[set-up 4/4] building pesq, for one of the measures of speech"
	@$(PIP) install $(SPEECH) > $(VENV)/pesq.log 2>&1 \
		|| echo "PESQ stays out: no C compiler was found that could build pesq (pip's words are in $(VENV)/pesq.log)"
	@touch $@

demo: $(READY) ## train, generate and judge; writes demo/report.html
	$(RUN) examples/demo.py --output_dir demo $(ARGS)

demo-audio: $(READY) ## train a codec and a prior on spoken numbers, speak and judge; writes demo-audio/report.html
	$(RUN) examples/demo_audio.py --output_dir demo-audio $(ARGS)

test: $(READY) ## the default tests
	$(RUN) -m pytest $(TWO) $(ARGS)

# The slow tests start processes and train, so each gets twenty minutes.
test-slow: $(READY) ## only the slow tests
	$(RUN) -m pytest -m "slow and not gpu and not network" --timeout 1200 $(ARGS)

test-all: $(READY) ## the default and the slow tests
	$(RUN) -m pytest -m "not gpu and not network" --timeout 1200 $(ARGS)

# The lower bounds of pyproject.toml, each as an exact version, with the newest of everything that they leave open.
LOWEST := .venv-lowest
$(LOWEST)/.installed: pyproject.toml setup.py
	@test -x $(LOWEST)/bin/python || { echo "[lowest 1/2] creating $(LOWEST)"; $(PYTHON) -m venv $(LOWEST); }
	@echo "[lowest 2/2] installing the lower bounds of pyproject.toml"
	@$(LOWEST)/bin/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		extras = [r for name in ("audio", "demo", "tracking", "parity", "peft", "ray", "speech") for r in p["optional-dependencies"][name] if not r.startswith("pesq")]; \
		print("\n".join(r.replace(">=", "==") for r in [*p["dependencies"], *extras]))' > $(LOWEST)/lowest.txt
	@$(LOWEST)/bin/python -m pip --disable-pip-version-check --quiet install -r $(LOWEST)/lowest.txt \
		"setuptools>=77,<82" pytest pytest-timeout pytest-xdist hypothesis
	@$(LOWEST)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --no-build-isolation -e .
	@touch $@

test-lowest: $(LOWEST)/.installed ## the default tests with the lowest versions that pyproject.toml allows
	$(LOWEST)/bin/python -m pytest -p no:cacheprovider $(TWO) $(ARGS)

lint: $(READY) ## ruff, format check, types of the maths floors
	$(RUN) -m ruff check --output-format concise .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(READY) ## format the code and mend what ruff can mend
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# An old build/ would put deleted files into the wheel.
wheel: $(READY) ## build dist/vqtok-*.whl
	@rm -rf build dist
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist

clean: ## remove caches and builds (keeps .venv, demo/ and demo-audio/)
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find vqtok tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
