# `make demo` trains, exports and samples a small DiT on real digits; `make test` runs the tests. Both install first.
PYTHON ?= python3
VENV := .venv

.PHONY: demo test install lint

demo: $(VENV)/installed
	$(VENV)/bin/python -m demo

test: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest

install: $(VENV)/installed

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/installed: requirements.txt requirements/common.txt
	sh scripts/install.sh $(PYTHON) $(VENV) requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	sh scripts/install.sh $(PYTHON) $(VENV) requirements-dev.txt
	touch $@
