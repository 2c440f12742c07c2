# `make demo` and `make test` set everything up and run; `make install` is the set-up they share.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo study test mutations lint types docs links package clean

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
	$(BIN)/python -m pytest --cov

# Breaks the core a line at a time and shows that the tests notice; takes some minutes, and is no part of CI.
mutations: install
	$(BIN)/python tests/mutations.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

docs: install
	$(BIN)/sphinx-build --fail-on-warning --keep-going --fresh-env docs docs/_build/html

# Asks for every page that the documentation links to; needs a network, and so is no part of CI.
links: install
	$(BIN)/sphinx-build --builder linkcheck docs docs/_build/linkcheck

# Builds the wheel, imports it where nothing else of this project is, and calls its command.
package: install
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist .
	$(PYTHON) -m venv --clear build/clean-venv
	build/clean-venv/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd build/clean-venv && bin/python -c 'import lightning_gcsr; print("imported", lightning_gcsr.__version__, "from", lightning_gcsr.__file__)'
	build/clean-venv/bin/python -m pip install --quiet --constraint constraints.txt "$$(echo dist/*.whl)[cli]"
	build/clean-venv/bin/lightning-gcsr --version
	rm -rf build/clean-venv

clean:
	rm -rf $(VENV) build dist docs/_build docs/tutorials runs *.egg-info .coverage
