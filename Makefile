# make play: set up and walk in the shipped world     make test: set up and run the tests
# make train: set up and train a world one can play, in ten minutes on two cores, from samples/ or FROM=CLIPS
# make data: set up and record the default data set   make lint: set up and run ruff
# make soak: 20,000 steps of play and ten minutes of the page, with plots of memory and time
# make fuzz: malformed inputs for all scripts          make kill: runs that are killed at random times
# make lock: the versions and hashes of what running needs, from requirements.txt
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

# Versions and hashes of everything that is installed: for CUDA builds, macOS and Windows, or all but PyTorch,
# which then comes from its index of CPU wheels. Another index for PyTorch needs other versions.
LOCK := $(if $(TORCH_INDEX),,$(if $(CPU_WHEELS),requirements-cpu.lock,requirements-cuda.lock))
COMPILE := $(VENV)/bin/uv pip compile requirements.txt --universal --python-version 3.10 --generate-hashes --quiet \
	--no-annotate --custom-compile-command "make lock"

.PHONY: play train data test lint soak fuzz kill lock setup clean

play: $(RUN_READY)
	$(VENV)/bin/python live_inference.py $(ARGS)

# A world from a folder of clips: tokens/NAME, runs/NAME, outputs/NAME.mp4, where NAME is the folder's.
FROM ?= samples
NAME ?= $(notdir $(FROM:/=))
train: $(RUN_READY)
	@echo "1/3 clips to tokens (about a minute for samples/)"
	$(VENV)/bin/python preprocess.py --parent_dir $(FROM) --out_dir tokens/$(NAME) --precision auto
	@echo "2/3 training (about 7 minutes); pictures and curves.png in runs/$(NAME)"
	$(VENV)/bin/python train.py RECIPE=small DATA_DIR=tokens/$(NAME) OUT_DIR=runs/$(NAME) $(ARGS)
	@echo "3/3 a rollout under recorded actions: truth | generated | difference"
	$(VENV)/bin/python inference.py --checkpoint runs/$(NAME)/best.pt --frames 48 \
		--start $$(ls tokens/$(NAME)/*.npz | head -n 1) --out outputs/$(NAME).mp4
	@echo "look at outputs/$(NAME)_sheet.png; play it: make play ARGS='--checkpoint runs/$(NAME)/best.pt'"

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

fuzz: $(DEV_READY)
	$(VENV)/bin/python tests/fuzz/campaign.py $(ARGS)

kill: $(DEV_READY)
	$(VENV)/bin/python tests/fuzz/kills.py $(ARGS)

lock: $(RUN_READY)
	$(PIP) uv
	$(COMPILE) -o requirements-cuda.lock
	$(COMPILE) $$(sed -nE 's/^((torch|triton|cuda-|nvidia-)[a-z0-9-]*)==.*/--no-emit-package \1/p' \
		requirements-cuda.lock | sort -u) -o requirements-cpu.lock

setup: $(RUN_READY)

# Each marker is written last, so an interrupted setup is done again.
$(RUN_READY): requirements.txt $(LOCK)
	$(PYTHON) -m venv $(VENV) || { echo "error: this Python has no venv; on Debian/Ubuntu: apt-get install python3-venv"; exit 1; }
	$(if $(filter requirements-cuda.lock,$(LOCK)),,$(PIP) $(TORCH_WHEELS) "$$(grep '^torch' requirements.txt)")
	@$(if $(LOCK),$(PIP) --no-deps --require-hashes -r $(LOCK),false) \
		|| echo "note: requirements*.lock does not fit this machine; installing the newest versions instead"
	$(PIP) -r requirements.txt
	touch $(RUN_READY)

$(DEV_READY): requirements-dev.txt $(RUN_READY)
	$(PIP) -r requirements-dev.txt
	touch $(DEV_READY)

clean:
	rm -rf $(VENV) outputs .pytest_cache .ruff_cache
