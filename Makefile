# `make demo` and `make test` set everything up and run; `make install` is the set-up they share.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
# Two processes. The tests of a file stay in one of them: they share fixtures, and the code blocks of a page their names.
PARALLEL := -n 2 --dist loadfile

.PHONY: install demo study test test-oldest mutations benchmarks lint types docs links package clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version + "; call make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch, Lightning and the rest into $(VENV); several GB on Linux, which takes some minutes."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,docs]'
	touch $@

demo: install
	$(BIN)/python examples/digits.py

# The smallest study, from the runs to the report; what was done before is not done again.
study: install
	$(BIN)/python examples/study/run.py examples/study/digits_smoke.yaml

test: install
	$(BIN)/python -m pytest --cov $(PARALLEL)

# The fast tests on the oldest versions that pyproject.toml allows, in an environment of their own; no part of CI.
# Old packages call newer ones in ways that are deprecated by now, which says nothing about this package.
test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest $(PARALLEL) -W ignore::DeprecationWarning tests/unit $(addprefix \
		tests/integration/test_,accumulation.py cli.py compressed_checkpoint.py hooks.py other_loggers.py resume.py)

$(OLDEST)/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "The oldest versions need Python 3.11, this is " + sys.version + "; call make PYTHON=python3.11 test-oldest")'
	$(PYTHON) -m venv $(OLDEST)
	@echo "Installing the oldest PyTorch, Lightning and the rest into $(OLDEST); about 6 GB on Linux, which takes some minutes."
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[cli,examples,loggers]' \
		hypothesis pandas pytest pytest-xdist sybil
	touch $@

# Breaks the core a line at a time and shows that the tests notice; takes some minutes, and is no part of CI.
mutations: install
	$(BIN)/python tests/mutations.py

# Measures the cost of a step on this machine, and writes docs/cost.md; wants a machine that does nothing else.
benchmarks: install
	$(BIN)/python tests/benchmarks/cost_page.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: install
	$(BIN)/mypy

docs: install
	$(BIN)/sphinx-build --fail-on-warning --keep-going --fresh-env docs docs/_build/html

# Asks for every page that the documentation links to; needs a network, and so is no part of CI.
links: install
	$(BIN)/sphinx-build --builder linkcheck docs docs/_build/linkcheck

# Builds sdist and wheel, checks what they hold, imports the wheel where nothing else of this project is, calls its
# command, and installs the sdist over it.
package: install
	rm -rf build dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	! tar --list --file dist/*.tar.gz | grep -E '^[^/]+/(\.ci|docs|examples|tests)/'
	! $(BIN)/python -m zipfile --list dist/*.whl | grep -vE '^(File Name|lightning_gcsr)'
	$(PYTHON) -m venv --clear build/clean-venv
	build/clean-venv/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd build/clean-venv && bin/python -c 'import lightning_gcsr; print("imported", lightning_gcsr.__version__, "from", lightning_gcsr.__file__)'
	build/clean-venv/bin/python -m pip install --quiet --constraint constraints.txt "$$(echo dist/*.whl)[cli]"
	build/clean-venv/bin/lightning-gcsr --version
	build/clean-venv/bin/python -m pip install --quiet --no-deps --force-reinstall dist/*.tar.gz
	build/clean-venv/bin/lightning-gcsr --version
	rm -rf build/clean-venv

clean:
	rm -rf $(VENV) $(OLDEST) build dist docs/_build docs/api docs/tutorials runs *.egg-info .coverage .coverage.*
