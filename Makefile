PYTHON ?= python3
BIN := .venv/bin

.PHONY: install torchtune quickstart test test-uv test-long test-processors lint coverage bench memory

NUMERIC := --numprocesses 2 --dist loadfile tests/train/test_loss.py tests/cost/test_memory.py \
	tests/commands/test_training.py tests/commands/test_finetune.py -k '(loss or allocates or batch_1) and not compiled'

UV := tests/commands/test_uv.py

install: .venv/installed

# pip would compile on one core. compileall fails for a file of torch's in the syntax of Python 3.12, which is no harm.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lacuna needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[train,finetune,track,report,chat,bench,dev]'
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	touch $@

torchtune: .venv-torchtune/installed

.venv-torchtune/installed: pyproject.toml
	$(PYTHON) -m venv .venv-torchtune
	.venv-torchtune/bin/pip install --quiet --disable-pip-version-check --editable '.[torchtune]'
	touch $@

quickstart: install
	$(BIN)/python examples/quickstart/prepare.py
	$(BIN)/pretrain @ examples/quickstart/pretrain.toml
	$(BIN)/lacuna run examples/quickstart/experiment.yaml --configs runs/quickstart/configs --jobs 2
	$(BIN)/python examples/quickstart/evaluate.py
	$(BIN)/lacuna report runs/quickstart/configs --metric held_out_accuracy --html runs/quickstart/report.html

test: install torchtune
	$(BIN)/pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder --ignore tests/long --ignore $(UV)

test-uv: install
	$(BIN)/pytest $(UV)

# Random trials, of which LACUNA_TORTURE=word makes others; what every input must have, on many more of them.
test-long: install
	$(BIN)/pytest --numprocesses 2 --dist loadfile tests/long
	$(BIN)/pytest --numprocesses 2 --hypothesis-profile long -m hypothesis

# Without bf16 units, without AVX-512, without AVX; with several threads. Not torch.compile: its cache of kernels does
# not tell ATEN_CPU_CAPABILITY apart, and one that was made for AVX-512 never ends when it is compiled for AVX2.
test-processors: install
	ONEDNN_MAX_CPU_ISA=AVX512_CORE $(BIN)/pytest $(NUMERIC)
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(BIN)/pytest $(NUMERIC)
	ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 $(BIN)/pytest $(NUMERIC)
	OMP_NUM_THREADS=2 $(BIN)/pytest $(NUMERIC)

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports > /dev/null || $(BIN)/lint-imports

coverage: install torchtune
	$(BIN)/coverage run --branch --source src/lacuna/experiment,src/lacuna/config,src/torchtune_config_writer -m pytest \
		tests/config/test_trees.py tests/experiment/test_sweep.py tests/experiment/test_generator.py \
		tests/torchtune_config_writer/test_builder.py tests/torchtune/test_experiments.py \
		-k 'of_the_builder or builder_raises or available or not (test_experiments or real_kill or same_bytes or can_vary)'
	$(BIN)/coverage report --show-missing --fail-under 100 \
		--include '*/trees.py,*/sweep.py,*/schema.py,*/names.py,*/generator.py,*/builder.py'

bench: install torchtune
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/loss_memory.py
	$(BIN)/python benchmarks/finetune.py
	$(BIN)/python benchmarks/generate.py

memory: install
	$(BIN)/python benchmarks/memory.py
