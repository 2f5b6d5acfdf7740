# `make demo` trains, exports and samples a small DiT on real digits, `make demo-t2i` a U-ViT that draws what a sentence
# says, `make demo-lora` fine-tunes a tiny SDXL on colored digits; `make test` runs the tests, `make bench` all
# benchmarks. All install first.
PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers

.PHONY: demo demo-t2i demo-lora test faults install lint peers bench

demo: $(VENV)/installed
	$(VENV)/bin/python -m demo

demo-t2i: $(VENV)/installed
	$(VENV)/bin/python -m demo.text_to_image

demo-lora: $(VENV)/installed
	$(VENV)/bin/python -m demo.lora

# A file's tests stay in one process, since they share what is made once; a thread each leaves the cores to both. Files in
# their order: those of the fewest tests, which run commands, would come last and leave a core idle.
test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Kills, full disks, hostile files and more, at length: a table and output/faults/summary.json.
# FAULTS="kills disk --scale 0.1" make faults runs a tenth of these two.
faults: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.faults $(FAULTS)

install: $(VENV)/installed

# PyTorch and diffusers, for the tests that compare with them: PEER_PYTHON=.venv-peers/bin/python make test
peers: $(PEERS)/installed

# Tables on screen and output/bench/*.json; BENCHMARKS="loading startup" make bench runs these two.
# Where PyTorch cannot be installed, it is left out.
bench: $(VENV)/installed
	-$(MAKE) peers
	PEER_PYTHON=$(PEERS)/bin/python $(VENV)/bin/python -m benchmarks $(BENCHMARKS)

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/installed: requirements.txt requirements/common.txt latent_diffusion/native/kernels.c
	sh scripts/install.sh $(PYTHON) $(VENV) requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	sh scripts/install.sh $(PYTHON) $(VENV) requirements-dev.txt
	touch $@

$(PEERS)/installed: requirements-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip --quiet --disable-pip-version-check install --requirement requirements-peers.txt
	touch $@
