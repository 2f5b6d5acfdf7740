# `make demo` trains, exports and samples a small DiT on real digits, `make demo-t2i` a U-ViT that draws what a sentence
# says; `make test` runs the tests. All install first.
PYTHON ?= python3
VENV := .venv
PEER := .venv-peer

.PHONY: demo demo-t2i test install lint peer

demo: $(VENV)/installed
	$(VENV)/bin/python -m demo

demo-t2i: $(VENV)/installed
	$(VENV)/bin/python -m demo.text_to_image

# These start the loader's processes by forking, which must not happen beside the threads of the tests' own processes.
LOADER_TESTS := $(wildcard tests/*/test_features.py)

# A file's tests stay in one process, since they share what is made once; a thread each leaves the cores to both.
test: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest $(LOADER_TESTS)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile \
		$(addprefix --ignore=,$(LOADER_TESTS))

install: $(VENV)/installed

# PyTorch and diffusers, for the tests that compare with them: PEER_PYTHON=.venv-peer/bin/python make test
peer: $(PEER)/installed

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/installed: requirements.txt requirements/common.txt
	sh scripts/install.sh $(PYTHON) $(VENV) requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	sh scripts/install.sh $(PYTHON) $(VENV) requirements-dev.txt
	touch $@

$(PEER)/installed: requirements-peer.txt
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip --quiet --disable-pip-version-check install --requirement requirements-peer.txt
	touch $@
