# distillbook: `make help` says what there is.
SHELL := /bin/bash
BIN := .venv/bin
BOOK := $(BIN)/distillbook
PINS := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help run test lab check export outputs gpu clean distclean
.DEFAULT_GOAL := help

help:            ## show this list
	@sed -n 's/^\([a-z]*\): .*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 18

run: .venv/.ready-run      ## install what is needed, distil a student, print its table and the path of its report
	@$(BOOK) run ship_a_student --profile laptop
	@$(BOOK) report ship_a_student

test: .venv/.ready-all     ## the whole test suite
	@$(BIN)/python -m pytest

lab: .venv/.ready-all      ## JupyterLab on the course
	@$(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" nbs/0_lab/00_settings.ipynb

check: .venv/.ready-all    ## install everything, then check this machine
	@$(BOOK) doctor

export: .venv/.ready-run   ## write distillbook/ from the notebooks, clean them, write README.md and data/SHA256SUMS (for authors)
	@$(BIN)/nbdev-export && $(BIN)/nbdev-clean
	@$(BIN)/python -c "from distillbook.lab.cli import write_readme, write_sums; print(write_sums()); print(write_readme())"

outputs: .venv/.ready-all  ## run the notebooks that changed, keep their outputs and records (for authors)
	@$(BOOK) outputs --profile smoke
	@$(BOOK) outputs

gpu: .venv/.ready-all      ## run every notebook at the gpu profile, keep its record
	@$(BIN)/python -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'make gpu needs a CUDA device, and torch sees none')"
	@$(BOOK) outputs --profile gpu

clean:           ## remove caches; .venv, runs and their records stay
	rm -rf runs/cache build .pytest_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv too; installing again needs the network, or the wheels
	rm -rf .venv *.egg-info

# A virtual environment made with the first Python from 3.11 to 3.13 that answers; PYTHON=... picks another.
.venv/bin/python:
	@for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	    echo "making .venv with $$($$python --version)"; exec $$python -m venv --clear .venv; fi; done; \
	echo "distillbook needs Python 3.11, 3.12 or 3.13 with its venv module, and none was found." >&2; \
	echo "Install one (Debian and Ubuntu: apt install python3 python3-venv; macOS: xcode-select --install, then brew install python@3.12), or name one: make run PYTHON=/path/to/python3.12" >&2; exit 1

# Each stamp is newer than the pins that it was installed from, so a second call installs nothing.
.venv/.ready-run: $(PINS) pyproject.toml | .venv/bin/python
	@echo "installing torch, then the rest; a few minutes the first time"
	$(BIN)/pip install --progress-bar off -c $(PINS) "$$(grep '^torch==' $(PINS))"
	$(BIN)/pip install --progress-bar off -c $(PINS) -e .
	@touch $@

.venv/.ready-all: .venv/.ready-run
	$(BIN)/pip install --progress-bar off -c $(PINS) -e '.[eval,peers,quant,embed,serve,lab,test]'
	@touch $@
