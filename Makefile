# Everything a fresh machine needs: `make demo` and `make test` set themselves up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VARIANTS := vanilla clipped gated
DEMO := runs/demo

.PHONY: demo test lint types soak clean

$(STAMP): requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# Trains vanilla, clipped and gated BERT on embedded text, evaluates FP and INT8, draws the report.
demo: $(STAMP)
	@for variant in $(VARIANTS); do \
	  $(BIN)/python train.py --config=configs/quickstart.py:$$variant --workdir=$(DEMO)/$$variant || exit $$?; \
	done
	@$(BIN)/python eval.py $(foreach v,$(VARIANTS),--workdir=$(DEMO)/$(v)) --quant=w8a8,w6a6 \
	  --json=$(DEMO)/results.json --markdown=$(DEMO)/results.md --report=$(DEMO)/report.html
	@echo "Wrote $(DEMO)/results.json and $(DEMO)/report.html"

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# Minutes-long tests, run before a release.
soak: $(STAMP)
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV) runs
