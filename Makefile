# `make run` trains, measures and draws everything; `make test` checks it. Both set themselves up.
SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
# The folder as the suite reads it; suite/files.py needs nothing but Python
OUTPUTS = MORLIB_OUTPUTS="$(MORLIB_OUTPUTS)" $(PYTHON) -c 'import runpy; print(runpy.run_path("suite/files.py")["outputs"]())'
OUT := $(if $(MORLIB_OUTPUTS),$(or $(shell $(OUTPUTS)),$(error $(PYTHON) cannot read MORLIB_OUTPUTS)),$(CURDIR)/outputs)

# A compiled module is kept: else each of the many processes here compiles torch and the suite anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install run paper test stored properties-a-to-m properties-n-to-z notebooks bench reference report clean

install: $(VENV)/ready

# On a CPU the notebooks run side by side, as many as the preset has jobs (or MORLIB_JOBS), each on one core. The longest come
# first. On a card they run one after another. 05 takes the models of 02 and 04 over, and waits for those under way.
JOBS_HERE := $(BIN)/python -c 'from suite import runs; s = runs.settings({}); print(s.jobs if s.stored or runs.pick_device()[0].type == "cpu" else 1)'
LONGEST := $(foreach number,04 02 03 07,$(wildcard notebooks/$(number)_*.ipynb))
EXECUTED := $(patsubst notebooks/%.ipynb,execute-%,$(LONGEST) $(filter-out $(LONGEST),$(NOTEBOOKS)))
SIDE_BY_SIDE = $(MAKE) --no-print-directory $(if $(filter output-sync,$(.FEATURES)),--output-sync=$(1))

run: $(VENV)/ready
	@mkdir -p "$(OUT)"
	@jobs=$$($(JOBS_HERE)) || exit 1; \
	if [[ $$jobs != 1 ]]; then export MORLIB_JOBS=1 OMP_NUM_THREADS=1 NO_BAR=--no-progress-bar; fi; \
	$(call SIDE_BY_SIDE,none) -j$$jobs $(EXECUTED)
	@echo; echo "Done. Look at:"; \
	echo "  $(OUT)/*.ipynb           the executed notebooks: tables and figures with what they mean"; \
	echo "  $(OUT)/figures           the figures as PNG"; \
	echo "  $(OUT)/results           one JSON record a run"; \
	echo "  $(OUT)/routing_text.html a text coloured by depth (open it in a browser)"

$(EXECUTED): execute-%:
	@echo "== notebooks/$*.ipynb begins"; \
	MORLIB_OUTPUTS="$(OUT)" $(BIN)/papermill notebooks/$*.ipynb "$(OUT)/$*.ipynb" --cwd notebooks -k python3 $$NO_BAR && \
	echo "== notebooks/$*.ipynb: $$SECONDS seconds"

paper: export MORLIB_PRESET := paper
paper: run

# Style; then, two at a time: the properties, with every training path at a test's size (tests/test_notebooks.py); and the
# committed notebooks against the stored records.
CHECKS := properties-n-to-z properties-a-to-m stored

test: export TQDM_DISABLE := 1
test: export OMP_NUM_THREADS := 1
test: $(VENV)/ready
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet . || { echo "style: ruff check --fix . and ruff format . put most of it right"; exit 1; }
	@echo "two checks at a time, each printed when it is done: $(CHECKS)"; \
	export MORLIB_OUTPUTS=$$(mktemp -d); \
	$(call SIDE_BY_SIDE,target) --keep-going -j2 $(CHECKS); \
	status=$$?; rm -rf "$$MORLIB_OUTPUTS"; exit $$status

properties-n-to-z:
	$(BIN)/python -m pytest -q tests/test_[n-z]*.py

properties-a-to-m:
	$(BIN)/python -m pytest -q tests/test_[a-m]*.py

stored:
	MORLIB_PRESET=stored MORLIB_OUTPUTS="$(OUT)/stored" $(BIN)/python -m pytest -q --nbval-lax -p no:cacheprovider notebooks

# The notebooks as committed: executed in place from the stored records, nothing is trained.
notebooks: export MORLIB_PRESET := stored
notebooks: export TQDM_DISABLE := 1
notebooks: export OMP_NUM_THREADS := 1
notebooks: $(VENV)/ready
	@scratch=$$(mktemp -d); \
	MORLIB_OUTPUTS=$$scratch $(BIN)/jupyter nbconvert --log-level ERROR --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False $(NOTEBOOKS); \
	status=$$?; rm -rf $$scratch; exit $$status

# The table of speed, measured again: 40 minutes at most, and run again it goes on where it was. BENCH=--quick takes ten at most,
# BENCH=--growth measures how cost grows, and --reference beside it keeps the record among those that ship.
bench: $(VENV)/ready
	@MORLIB_OUTPUTS="$(OUT)" $(BIN)/python -m suite.cost.bench $(BENCH)

# The records of notebooks 02 to 05 that ship, trained again: hours on 2 cores at the preset cpu. Broken off, it goes on where it was.
reference: export MORLIB_PRESET ?= cpu
reference: $(VENV)/ready
	@mkdir -p "$(OUT)/reference"
	@for notebook in $(wordlist 2,5,$(NOTEBOOKS)); do \
		MORLIB_OUTPUTS="$(OUT)" $(BIN)/papermill $$notebook "$(OUT)/$$(basename $$notebook)" --cwd notebooks -k python3 \
			-p seeds 6 $$([[ $$notebook == *02_* ]] && echo "-p studies run") || exit 1; \
	done
	cp "$(OUT)"/results/*_s[0-9]_*.json "$(OUT)"/routing_findings.json "$(OUT)"/findings_bangla.json "$(OUT)/reference/"

# RESULTS.md and the README's answers, printed from the stored records.
report: $(VENV)/ready
	@$(BIN)/python -m suite.report

# Not compiled: most modules are never imported, and the others are compiled when they are.
$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -r requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) outputs/results outputs/checkpoints outputs/tokenizers outputs/figures
