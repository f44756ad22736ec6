# make play: set up and walk in the shipped world     make test: set up and run the tests
# make data: set up and record the default data set   make lint: set up and run ruff
# make soak: 20,000 steps of play and ten minutes of the page, with plots of memory and time
PYTHON ?= python3
VENV := .venv
RUN_READY := $(VENV)/.ready-run
DEV_READY := $(VENV)/.ready-dev
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check
# The package index for PyTorch alone. A P100 needs TORCH_INDEX=https://download.pytorch.org/whl/cu126.
TORCH_INDEX ?=
# Without an NVIDIA card the CPU wheels save several GB. If that index cannot be reached, pip goes on without it.
CPU_WHEELS := $(if $(shell command -v nvidia-smi),,--retries 1 --extra-index-url https://download.pytorch.org/whl/cpu)
TORCH_WHEELS := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),$(CPU_WHEELS))

.PHONY: play data test lint soak setup clean

play: $(RUN_READY)
	$(VENV)/bin/python live_inference.py $(ARGS)

# Needs: apt-get install minetest xvfb gcc libc6-dev
data: $(RUN_READY)
	$(VENV)/bin/python record.py --out data/luanti --clips 308 --clips_per_world 7 --frames 1200 --seed 100 $(ARGS)

test: $(DEV_READY)
	$(VENV)/bin/python -m pytest $(ARGS)

lint: $(DEV_READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

soak: $(DEV_READY)
	$(VENV)/bin/python tests/soak/soak.py play $(ARGS)
	$(VENV)/bin/python tests/soak/soak.py page $(ARGS)

setup: $(RUN_READY)

# Each marker is written last, so an interrupted setup is done again.
$(RUN_READY): requirements.txt
	$(PYTHON) -m venv $(VENV) || { echo "error: this Python has no venv; on Debian/Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PIP) $(TORCH_WHEELS) "$$(grep '^torch' requirements.txt)"
	$(PIP) -r requirements.txt
	touch $(RUN_READY)

$(DEV_READY): requirements-dev.txt $(RUN_READY)
	$(PIP) -r requirements-dev.txt
	touch $(DEV_READY)

clean:
	rm -rf $(VENV) outputs .pytest_cache .ruff_cache
