# Needs Python 3.11 or newer with venv, and nothing else. `make demo` and `make test` install by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Debian's packages of the checks; as root they are installed, otherwise they must be there.
SYSTEM := g++ libaio-dev chromium
SLURM := slurm-wlm munge
SSH := openssh-server pdsh
IMAGE := buildah mmdebstrap python3-venv
packages = @test "$$(id -u)" != 0 || dpkg -s $(1) >/dev/null 2>&1 || \
	{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(1); }

.PHONY: docs demo demo-detection detect-student detect-target detect-random study test test-system system-packages proof-1b lint bench soak slurm-check hostfile-check image-check lock gpu-check clean

$(STAMP): setup.py requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

## Trains the demo recipe on drawings, evaluates it on things it has never seen, writes a report. DEMO="train.steps=100"
## changes fields of the recipe, LAUNCHER="--master_port 29501" is for DeepSpeed's launcher.
demo: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed $(LAUNCHER) launchers/pretrain.py --ds ds_configs/zero3.json $(DEMO)
	$(BIN)/m3i eval retrieval,zeroshot,categories,styles runs/demo --data data/demo/heldout
	$(BIN)/m3i report runs/demo

## From the demo's checkpoint to detection: student, target and the same network untrained, with the same budget.
DETECT := $(BIN)/python launchers/finetune_detection.py --data data/demo_detection --recipe demo_detection train.threads=1
demo-detection: $(STAMP)
	test -f runs/demo/exit.json || $(MAKE) demo
	$(BIN)/m3i data demo-detection
	$(BIN)/m3i export runs/demo --to safetensors --branch student --force --out runs/demo/student.safetensors
	$(BIN)/m3i export runs/demo --to safetensors --branch target --force --out runs/demo/target.safetensors
	$(BIN)/m3i verify runs/demo/student.safetensors --for safetensors
	$(BIN)/m3i verify runs/demo/target.safetensors --for safetensors
	$(MAKE) -j 2 detect-student detect-target detect-random
	$(BIN)/m3i scores runs/demo_detection/student runs/demo_detection/target runs/demo_detection/random

detect-student detect-target: detect-%:
	$(DETECT) --weights runs/demo/$*.safetensors --out runs/demo_detection/$*

detect-random:
	$(DETECT) --weights runs/demo/student.safetensors backbone.init=random --out runs/demo_detection/random

## The tests of the README; about 40 minutes on two cores, no compiler, no GPU. One thread in each of the two workers.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --ignore tests/system tests

## Tests that need more than Python packages: a C++ compiler and libaio's headers (offload to NVMe), a browser (the report).
## As root it installs them by apt; otherwise it skips, by name, what cannot run.
test-system: $(STAMP) system-packages
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs tests/system

system-packages:
	$(call packages,$(SYSTEM))

## The documentation as a site: build/docs/index.html. A warning is an error.
docs: $(STAMP)
	$(BIN)/python docs/recipe_fields.py
	$(BIN)/python docs/mix_picture.py
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files -z '*.sh' '*.sbatch' .ci/run | xargs -0 $(BIN)/shellcheck
	$(BIN)/hadolint docker/Dockerfile

## The demo under three seeds: the table in README.md.
study: $(STAMP)
	$(BIN)/m3i study demo

bench: $(STAMP)
	$(BIN)/python kernels/bench.py
	$(BIN)/m3i bench loader
	$(BIN)/m3i bench step

## Kills a loading run 200 times, with changing numbers of ranks, and proves exactly-once after each: 15 minutes. Then 54
## events of everything that goes wrong with a training (kills, signals, full disk, damaged checkpoints, NaN): an hour.
soak: $(STAMP)
	$(BIN)/python tests/soak_sampler.py --kills 200
	$(BIN)/python tests/soak_events.py --events 54

## A billion parameters trained on this machine without a GPU: three steps, kill -9, one more; 16 GiB, 60 GB of disk.
proof-1b: $(STAMP) system-packages
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/proof_1b.py

## The launchers of a cluster, run for real on one Debian machine, as root: a Slurm of two machines, ssh to two addresses,
## the CPU image built and run without a Docker daemon. 10 to 20 minutes each; docs/cluster.md has what they print.
slurm-check: $(STAMP)
	$(call packages,$(SLURM))
	$(BIN)/python tests/cluster/slurm.py

hostfile-check: $(STAMP)
	$(call packages,$(SSH))
	$(BIN)/python tests/cluster/hostfile.py

image-check:
	$(call packages,$(IMAGE))
	bash tests/cluster/image.sh

## Pins the packages of the image anew, after a change of requirements.txt; needs uv.
lock:
	bash docker/lock.sh

## On a machine with an NVIDIA GPU, torch and Triton (nothing is installed): are the kernels right and fast there?
gpu-check:
	$(PYTHON) kernels/gpu_check.py

clean:
	rm -rf $(VENV) build *.egg-info
