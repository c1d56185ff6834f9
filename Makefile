# `make run` trains, measures and draws everything; `make test` checks it. Both set themselves up.
SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
OUT := $(if $(MORLIB_OUTPUTS),$(abspath $(MORLIB_OUTPUTS)),$(CURDIR)/outputs)

.PHONY: run paper test smoke bench reference report clean

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

test: export MORLIB_PRESET := smoke
test: export TQDM_DISABLE := 1
test: export OMP_NUM_THREADS := 1
test: $(VENV)/ready
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet . || { echo "style: ruff check --fix . and ruff format . put most of it right"; exit 1; }
	@scratch=$$(mktemp -d); \
	MORLIB_OUTPUTS=$$scratch $(BIN)/python -m pytest -q tests && \
	MORLIB_OUTPUTS=$$scratch $(BIN)/python -m pytest -q --nbval-lax -p no:cacheprovider notebooks; \
	status=$$?; rm -rf $$scratch; exit $$status

# The notebooks as committed: executed in place with the smoke preset.
smoke: export MORLIB_PRESET := smoke
smoke: export TQDM_DISABLE := 1
smoke: export OMP_NUM_THREADS := 1
smoke: $(VENV)/ready
	@scratch=$$(mktemp -d); \
	MORLIB_OUTPUTS=$$scratch $(BIN)/jupyter nbconvert --to notebook --execute --inplace $(NOTEBOOKS); \
	status=$$?; rm -rf $$scratch; exit $$status

# The table of speed goals, measured again: about ten minutes on 2 quiet CPU cores. `make bench BENCH=--reference` keeps the record among those that ship.
bench: $(VENV)/ready
	@MORLIB_OUTPUTS="$(OUT)" $(BIN)/python bench.py $(BENCH)

# The records that ship, six seeds a model and as many in the studies as notebook 02 says, into outputs/reference (hours on 2 CPU cores at the cpu preset, see the README's table of costs; broken off, it goes on where it was).
reference: export MORLIB_PRESET ?= cpu
reference: $(VENV)/ready
	@mkdir -p "$(OUT)/reference"
	@for notebook in $(wordlist 2,5,$(NOTEBOOKS)); do \
		MORLIB_OUTPUTS="$(OUT)" $(BIN)/papermill $$notebook "$(OUT)/$$(basename $$notebook)" --cwd notebooks -k python3 -p seeds 6 $$([[ $$notebook == *02_* ]] && echo "-p studies run") || exit 1; \
	done
	cp "$(OUT)"/results/{exp1,exp2,bangla,vocabulary,pareto,estimators,recursions,collapse,sources}_*_s[0-9]_*.json "$(OUT)"/routing_findings.json "$(OUT)/reference/"

# The README's table of results, printed from the stored records.
report: $(VENV)/ready
	@$(BIN)/python report.py

$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) outputs/results outputs/checkpoints outputs/tokenizers outputs/figures
