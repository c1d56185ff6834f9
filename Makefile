# `make run` trains, measures and draws everything; `make test` checks it. Both set themselves up.
SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
OUT := $(if $(MORLIB_OUTPUTS),$(shell realpath -m -- "$(MORLIB_OUTPUTS)"),$(CURDIR)/outputs)

.PHONY: run paper test notebooks bench reference report clean

run: $(VENV)/ready
	@mkdir -p "$(OUT)"
	@for notebook in $(NOTEBOOKS); do \
		echo "== $$notebook"; \
		MORLIB_OUTPUTS="$(OUT)" $(BIN)/papermill $$notebook "$(OUT)/$$(basename $$notebook)" --cwd notebooks -k python3 || exit 1; \
	done
	@echo; echo "Done. Look at:"; \
	echo "  $(OUT)/*.ipynb           the executed notebooks: tables and figures with what they mean"; \
	echo "  $(OUT)/figures           the figures as PNG"; \
	echo "  $(OUT)/results           one JSON record a run"; \
	echo "  $(OUT)/routing_text.html a text coloured by depth (open it in a browser)"

paper: export MORLIB_PRESET := paper
paper: run

# Style; the properties; the committed notebooks against the stored records; every training path at a test's size.
test: export TQDM_DISABLE := 1
test: export OMP_NUM_THREADS := 1
test: $(VENV)/ready
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet . || { echo "style: ruff check --fix . and ruff format . put most of it right"; exit 1; }
	@scratch=$$(mktemp -d); export MORLIB_OUTPUTS=$$scratch; \
	$(BIN)/python -m pytest -q tests && \
	MORLIB_PRESET=stored $(BIN)/python -m pytest -q --nbval-lax -p no:cacheprovider notebooks && \
	for notebook in $(NOTEBOOKS); do echo "smoke: $$notebook"; \
		MORLIB_PRESET=smoke $(BIN)/jupyter nbconvert --log-level ERROR --to notebook --execute --output-dir $$scratch $$notebook || exit 1; done; \
	status=$$?; rm -rf $$scratch; exit $$status

# The notebooks as committed: executed in place from the stored records, nothing is trained.
notebooks: export MORLIB_PRESET := stored
notebooks: export TQDM_DISABLE := 1
notebooks: export OMP_NUM_THREADS := 1
notebooks: $(VENV)/ready
	@scratch=$$(mktemp -d); \
	MORLIB_OUTPUTS=$$scratch $(BIN)/jupyter nbconvert --log-level ERROR --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False $(NOTEBOOKS); \
	status=$$?; rm -rf $$scratch; exit $$status

# The table of speed, measured again: about ten minutes on 2 quiet cores. BENCH=--reference keeps the record among those that ship.
bench: $(VENV)/ready
	@MORLIB_OUTPUTS="$(OUT)" $(BIN)/python -m suite.cost.bench $(BENCH)

# The records that ship, trained again: hours on 2 cores at the preset cpu. Broken off, it goes on where it was.
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

$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) outputs/results outputs/checkpoints outputs/tokenizers outputs/figures
