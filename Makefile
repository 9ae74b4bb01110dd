# `make run` and `make test` set up everything they need in .venv; no root, no GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
RUN ?= default
TORCH ?= 2.13.0

.PHONY: run test setup bench bench-costs bench-gpu bench-peers figures lint format test-torch test-asan clean

run: $(STAMP)
	$(BIN)/python -m sparsekit.cli job --name $(RUN)

test: $(STAMP)
	$(BIN)/python -m pytest

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy setuptools wheel ninja
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

bench: $(STAMP)
	$(BIN)/python -m benchmarks.layers
	$(BIN)/python -m pytest benchmarks/test_micro.py --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

# README's table and picture.
figures: $(STAMP)
	$(BIN)/python -m benchmarks.figures

# Other engines, each in an environment of its own; DeepSparse's licence is for evaluation. PEERS="--batch 1" for less.
bench-peers: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[export]'
	test -d .venv-onnx || ($(PYTHON) -m venv .venv-onnx && .venv-onnx/bin/pip install --quiet onnx onnxruntime openvino)
	test -d .venv-deepsparse || ($(PYTHON) -m venv .venv-deepsparse && \
	  .venv-deepsparse/bin/pip install --quiet deepsparse==1.8.0 'numpy<2' 'onnx<1.15')
	$(BIN)/python -m benchmarks.peers $(PEERS)

bench-costs: $(STAMP)
	$(BIN)/python -m benchmarks.costs

# Builds the CUDA kernels, times every kernel beside what docs/gpu.md predicts, and fills that document.
bench-gpu: $(STAMP)
	SPARSEKIT_CUDA=1 $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(BIN)/python -m benchmarks.gpu --json benchmarks/results/gpu.json
	$(BIN)/python -m benchmarks.gpu --docs

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.* csrc/*/*.*

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.* csrc/*/*.*

# The file that was built against torch in .venv, unchanged, under another torch: what the stable ABI promises.
test-torch: $(STAMP)
	test -d $(VENV)-torch-$(TORCH) || $(PYTHON) -m venv $(VENV)-torch-$(TORCH)
	$(VENV)-torch-$(TORCH)/bin/python -m pip install --quiet torch==$(TORCH) numpy safetensors pytest hypothesis
	rm -rf build/torch && mkdir -p build/torch && cp -r sparsekit build/torch/ && cp -r kernels build/torch/sparsekit/
	PYTHONPATH=$(CURDIR)/build/torch:$(CURDIR) $(VENV)-torch-$(TORCH)/bin/pytest -p no:cacheprovider

# Every op of every ISA on the random shapes, under AddressSanitizer and UndefinedBehaviorSanitizer.
test-asan: $(STAMP)
	rm -rf build/asan && mkdir -p build/asan
	CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -g -O1" \
	LDFLAGS="-fsanitize=address,undefined" \
	  $(BIN)/python setup.py -q build_ext --build-temp build/asan/tmp --build-lib build/asan
	cp -r sparsekit/*.py sparsekit/*/ kernels build/asan/sparsekit/
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH=$(CURDIR)/build/asan $(BIN)/pytest -s -p no:cacheprovider tests/ops/test_kernels.py tests/engine/test_chains.py

clean:
	rm -rf build dist *.egg-info sparsekit/_C*.so $(VENV) $(VENV)-torch-*
