# make play: set up and walk in the shipped world    make test: set up and run the tests    make lint: ruff
# make data: set up and record the default clips from Luanti
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check
# Without an NVIDIA card PyTorch's CPU wheels save several GB; where that index is out of reach pip goes on without it.
CPU_WHEELS := $(if $(shell command -v nvidia-smi),,--retries 1 --extra-index-url https://download.pytorch.org/whl/cpu)

.PHONY: play data test lint setup clean

play: $(READY)
	$(VENV)/bin/python live_inference.py $(ARGS)

# Needs: apt-get install minetest xvfb gcc libc6-dev
data: $(READY)
	$(VENV)/bin/python record.py --out data/luanti --clips 308 --clips_per_world 7 --frames 1200 --seed 100 $(ARGS)

test: $(READY)
	$(VENV)/bin/python -m pytest $(ARGS)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

setup: $(READY)

# The marker is written last, so a setup that was cut off is done again.
$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV) || { echo "error: this Python has no venv; on Debian/Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PIP) $(CPU_WHEELS) "$$(grep '^torch' requirements.txt)"
	$(PIP) -r requirements.txt
	touch $(READY)

clean:
	rm -rf $(VENV) outputs .pytest_cache .ruff_cache
