# Everything needs Python >= 3.10, a C++17 compiler and make; the rest is installed into .venv.
#   make demo    train on handwritten digits: demo/curves.png, demo/train.json
#   make test    the whole test suite (make test-slow: with the long sweeps)
#   make lint    what CI checks of style and types
#   make cuda    kernels for every GPU architecture, into build/cuda/ (make cuda-build: only that), and their machine code
#                checked (make cuda-sweep: with every type and every kernel broken on purpose, and docs/cuda.md's table)
#   make bench   speed: bench/results/bench.json, the README's table, docs/bench.png (make bench QUICK=1: a minute, into build/)
#   make bench-noise    the part about single gradients' noise: bench/results/noise.json, the README's table of it
#   make bench-compare OLD=a.json NEW=b.json    what got slower
#   make docs    the documentation site: build/docs/index.html (make docs-figures: its pictures anew;
#                make docs-outputs: what the examples print)
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*) CMakeLists.txt pyproject.toml constraints.txt

.PHONY: demo test test-slow lint format cuda-build cuda cuda-sweep bench bench-noise bench-compare docs docs-figures docs-outputs clean

demo: .venv/ready
	$(BIN)/python -m normkern train --out demo/

test: .venv/ready
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(filter %.cpp %.h %.cu %.cuh,$(SOURCES)) $(wildcard tests/simt/*.cpp tests/simt/*.h tests/simt/*.cu)

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.cpp %.h %.cu %.cuh,$(SOURCES)) $(wildcard tests/simt/*.cpp tests/simt/*.h tests/simt/*.cu)

# In a folder of its own: what is installed keeps kernels for the GPU that is here, if there is one.
cuda-build: .venv/ready
	@command -v nvcc > /dev/null || { echo "make $@: expected nvcc on the path, found none: it is part of the CUDA toolkit, 12.8 or newer" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet cmake ninja "pybind11>=3.0"
	$(BIN)/cmake -S . -B build/cuda -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DCMAKE_BUILD_TYPE=Release \
	  -DNORMKERN_CUDA=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/cuda

cuda: cuda-build
	CI=true NORMKERN_CUDA_BINARY=$$(ls $(CURDIR)/build/cuda/_C*.so) $(BIN)/python -m pytest tests/test_cuda_build.py tests/simt/test_sass.py

cuda-sweep: cuda
	CI=true NORMKERN_CUDA_BINARY=$$(ls $(CURDIR)/build/cuda/_C*.so) $(BIN)/python -m pytest tests/simt \
	  tests/test_ops.py tests/test_ops_pairs.py tests/test_ops_gauge.py tests/test_bitwise.py tests/test_moments.py \
	  tests/test_norm_sums.py tests/test_embedding_moments.py
	cd tests && $(abspath $(BIN)/python) -m simt.sass_check $(CURDIR)/build/cuda/_C*.so --docs ../docs/cuda.md

ifdef QUICK
BENCH_JSON := build/bench.json
BENCH_TO := --plot build/bench.png
else
BENCH_JSON := bench/results/bench.json
BENCH_TO := --plot docs/bench.png --readme README.md
endif

bench: .venv/ready .venv/bench-ready
	mkdir -p $(dir $(BENCH_JSON))
	$(BIN)/python -m pytest -c bench/pytest.ini bench --benchmark-quiet $(if $(QUICK),--quick) --benchmark-json=$(BENCH_JSON)
	$(BIN)/python -m bench.report $(BENCH_JSON) $(BENCH_TO)

# Of these alone, in half the time: bench/results/noise.json and the table of single gradients.
bench-noise: .venv/ready .venv/bench-ready
	$(BIN)/python -m pytest -c bench/pytest.ini bench -k "bench_noise or moments" --benchmark-quiet \
	  --benchmark-json=bench/results/noise.json
	$(BIN)/python -m bench.report bench/results/noise.json --readme README.md

bench-compare: .venv/ready .venv/bench-ready
	$(BIN)/python -m bench.compare $(OLD) $(NEW)

docs: .venv/docs-ready
	$(BIN)/python -m sphinx -W --keep-going -q docs build/docs

docs-figures: .venv/ready
	$(BIN)/python docs/figures $(FIGURES)

docs-outputs: .venv/ready
	@mkdir -p examples/outputs
	for example in examples/*.py; do \
	  OMP_NUM_THREADS=1 $(BIN)/python $$example > examples/outputs/$$(basename $$example .py).txt || exit 1; done

# An editable install: Python files are read from here, the binary is built anew when its sources change.
.venv/ready: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo,test,lint]"
	touch $@

# Peers with large packages are welcome, not needed: where one cannot be had, its rows say so.
.venv/bench-ready: pyproject.toml constraints.txt | .venv/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench]"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench-peers]" || echo "bench: going on without some peers"
	touch $@

.venv/docs-ready: pyproject.toml constraints.txt | .venv/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf build dist demo .venv *.egg-info
