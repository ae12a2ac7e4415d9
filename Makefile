# Two commands matter: `make study` reruns the study, `make test` runs every check. `make help` lists the rest.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
export PIP_REQUIRE_VIRTUALENV := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)
QUICK := build/quick
REHEARSAL := build/rehearsal
BUDGET ?= short
STUDY := $(CURDIR)$(if $(filter full,$(BUDGET)),/build/full)

.PHONY: help study record quick rehearsal graph test cluster fuzz mutants kills training_kills full_disk lab docs readme export weights sums organs supervised lint hooks pins audit sbom clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z_]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

.venv/done: constraints.txt requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(f"Python 3.11.5 or newer is needed; this is {sys.version.split()[0]}: make PYTHON=python3.11 ...") if sys.version_info < (3, 11, 5) else None'
	@PYTHON='$(PYTHON)' TORCH_INDEX='$(TORCH_INDEX)' HASHES='$(HASHES)' bash tests/install.sh
	@touch $@

study: .venv/done  ## the whole study on the built-in data; BUDGET=full: more patients and steps, in build/full
	@case '$(BUDGET)' in short|full) ;; *) echo "BUDGET is '$(BUDGET)': short or full"; exit 1;; esac
	@[ '$(BUDGET)' = short ] || bash tests/smoke.sh "$(STUDY)" params/full.yaml
	@cd "$(STUDY)" && python -m asap.cli study
	@cd "$(STUDY)" && { test -f runs/study/index.html || dvc repro -f -s page; }
	@echo "The study page: $(STUDY)/runs/study/index.html"

record: .venv/done  ## keep tables, metrics and page of a finished `make study BUDGET=full` in results/full
	@python benchmarks/record.py

quick: .venv/done  ## the study at smoke scale, in a few minutes, in build/quick
	@bash tests/smoke.sh $(QUICK)
	@cd $(QUICK) && python -m asap.cli study
	@echo "The study page: $(CURDIR)/$(QUICK)/runs/study/index.html"

rehearsal: .venv/done  ## each stage once at the paper's sizes, in build/rehearsal (an hour); writes benchmarks/rehearsal.csv
	@bash tests/smoke.sh $(REHEARSAL) params/rehearsal.yaml
	@cd $(REHEARSAL) && python benchmarks/rehearsal.py models && python -m asap.cli study
	@python benchmarks/rehearsal.py save $(REHEARSAL)

graph: .venv/done  ## write the modules and params of each stage, and the stages of task families, to dvc.yaml
	@python -m asap.cli graph

test: .venv/done  ## every check; the last line reads `N passed, N failed`
	@python tests/run.py

cluster: .venv/done  ## jobs on a SLURM of this machine (apt-get install slurm-wlm munge), slots, a store that is away; minutes
	@python -m pytest -m cluster

fuzz: .venv/done  ## 3,000 hostile files and 1,000 hostile params files (goes on where it was stopped; build/fuzz)
	@python benchmarks/hostile.py --save

weights: .venv/done  ## keep in weights/ what this study trained (for who maintains this repository)
	@python -c 'from asap.params import load_params; from asap.pretrain.checkpoint import export_weights; [print(n, export_weights(n) or "was not trained here") for n in ("text", *load_params().study.arms)]'
	@$(MAKE) -s sums

sums: .venv/done  ## write the hashes of the files in weights/ to weights/SHA256SUMS
	@python -c 'from pathlib import Path; from asap.contents import write_sums; write_sums(Path("weights"))'

organs: .venv/done  ## train the organ segmenter on phantoms (writes weights/organs)
	@python benchmarks/organs.py --keep
	@$(MAKE) -s sums

supervised: .venv/done  ## what a plain supervised CNN finds in the phantoms (up to 30 minutes; writes benchmarks/supervised.csv)
	@python benchmarks/supervised.py

mutants: .venv/done  ## would the tests notice? 600 small changes of asap/, one at a time (hours; goes on where it was stopped)
	@pip install -q -c constraints.txt cosmic-ray && python tests/mutants.py --copies 2

kills: .venv/done  ## 40 SIGKILLs over the study at smoke scale: nothing left, the same bytes (build/kills)
	@python benchmarks/kills.py --save

training_kills: .venv/done  ## 20 SIGKILLs over a pre-training in two processes: the same weights (build/training_kills)
	@python benchmarks/training_kills.py --save

full_disk: .venv/done  ## the study at smoke scale on disks that are too small for it (root; build/full_disk)
	@python benchmarks/full_disk.py --save

lab: .venv/done  ## JupyterLab on nbs/
	@jupyter lab nbs

docs: .venv/done  ## the notebooks as a site in _docs/
	@NO_MKDOCS_2_WARNING=1 mkdocs build -q --strict && echo "The pages: $(CURDIR)/_docs/index.html"

readme: .venv/done  ## README.md and its picture from nbs/index.ipynb
	@python tests/readme.py

export: .venv/done  ## notebooks -> asap/, cleaned
	@nbdev_export && nbdev_clean

lint: .venv/done  ## ruff, codespell, mypy
	@ruff check && ruff format --check nbs tests benchmarks && codespell && mypy asap

hooks: .venv/done  ## install the pre-commit hooks: lint, types, exported and clean notebooks
	@git rev-parse --git-dir >/dev/null 2>&1 || { echo "make hooks needs a git clone; this folder is none"; exit 1; }
	@pre-commit install

build/tools/done: constraints.txt
	@test -x build/tools/bin/python || $(PYTHON) -m venv build/tools
	@build/tools/bin/pip install -q -c constraints.txt cyclonedx-bom pip-audit uv
	@touch $@

pins: build/tools/done  ## the versions for all platforms: constraints.txt, requirements.txt (newer ones: make pins NEWER="name ...")
	@PATH=$(CURDIR)/build/tools/bin:$$PATH $(PYTHON) tests/pins.py $(NEWER)

audit: build/tools/done  ## known vulnerabilities of the pinned packages (pip-audit)
	@build/tools/bin/pip-audit --strict --no-deps --disable-pip -r requirements.txt

sbom: .venv/done build/tools/done  ## build/sbom.json: the packages in .venv and their licenses, in CycloneDX
	@build/tools/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible -o build/sbom.json
	@echo "The packages: $(CURDIR)/build/sbom.json"

clean:  ## remove what the study made (not .venv, not what git keeps)
	@rm -rf build data runs _docs .pytest_cache .mypy_cache .ruff_cache
