# make demo    prepare a small corpus, train runs/demo on it, let the model continue a prompt: under 200 s on 2 cores
# make test    run the tests: under 10 minutes on 2 cores, no network, no GPU
# make mutants break the code in known ways, one by one, and check that a test fails for each: 10 minutes on 2 cores
# make torture kill a run 200 times and compare how it ends, then let each call on files fail and cut the power at each:
#              5 minutes and 1 hour on 2 cores
# make bench   time the training step of the demo and of GPT-2 small against a plain one: 10 minutes on 2 cores
# make gpu     run the acceptance run on a CUDA GPU, offline, into gpu-results/: 4 parts of at most 8 minutes
# make cuda-check  run the GPU path on tensors without data, with a CUDA build of PyTorch: 3 GB to download, no GPU
# make slurm   train in a SLURM of two nodes on this machine, requeued and out of time: 17 minutes; Debian, as root
# make docs    write docs/code.md and docs/keys.md from the code: 2 seconds
# make lint    check style
# All but gpu create .venv first if there is none; PYTHON=python3.12 chooses its Python (3.11 or later).

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
DEMO_DATA := datasets/local/python-docs

.PHONY: demo test mutants torture bench gpu cuda-check slurm docs lint
.DELETE_ON_ERROR:

demo: .venv/ready $(DEMO_DATA)/meta.json
	$(BIN)/python ddp_train.py demo datasets
	@echo
	@echo "The demo model continues 'Return the':"
	@$(BIN)/python test_smoke.py $(DEMO)/model.json $(DEMO)/checkpoints/best/model.safetensors \
		--prompt "Return the" --tokens 300 --temperature 0.5 --seed 42
	@echo
	@echo "Chart:      $(DEMO)/training-run-chart.png"
	@echo "Checkpoint: $(DEMO)/checkpoints/$$(readlink $(DEMO)/checkpoints/best || cat $(DEMO)/checkpoints/best)"

test: .venv/ready-test
	$(BIN)/python -m pytest

mutants: .venv/ready-test
	$(BIN)/python tests/mutants.py

torture: .venv/ready-test
	PYTHONPATH=. $(BIN)/python tests/torture.py "$$(mktemp -d)" --kills 200
	PYTHONPATH=. $(BIN)/python tests/faults.py "$$(mktemp -d)"

bench: .venv/ready
	$(BIN)/python benchmarks/throughput.py demo
	$(BIN)/python benchmarks/throughput.py original --microbatch 2 --dropout 0

# Nothing can be installed without a network, so without a .venv this uses the Python at hand.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py all

cuda-check:
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install --quiet torch==2.14.1 -e . pytest
	.venv-cuda/bin/python -m pytest -o addopts= --noconftest -q tests/cuda_check.py
	PYTHONPATH=. .venv-cuda/bin/python tests/cuda_lowering.py

slurm: .venv/ready-test
	$(BIN)/python -m pytest -o addopts= -v -s tests/slurm_check.py

docs: .venv/ready
	$(BIN)/python docs/make_pages.py

lint: .venv/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(DEMO_DATA)/meta.json: | .venv/ready
	$(BIN)/python prepare_datasets.py python-docs $(DEMO_DATA) --tokenizer bytes --validation-fraction 0.05

.venv/ready: pyproject.toml requirements.lock
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Error: Python 3.11 or later is needed; make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c requirements.lock -e .
	touch $@

.venv/ready-test: .venv/ready
	$(BIN)/python -m pip install --quiet -c requirements.lock -e ".[test]"
	touch $@
