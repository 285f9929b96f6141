# Everything needs Python >= 3.10, a C++17 compiler and make; the rest is installed into .venv.
#   make demo    train on handwritten digits: demo/curves.png, demo/train.json
#   make test    the whole test suite, in two processes (WORKERS=n: in so many; make test-slow: with the long sweeps)
#   make sanitize    the kernels and threads under the address, undefined-behaviour and thread sanitizers (minutes to build)
#   make fuzz    a minute of arguments and checkpoints that nobody would write, each (SECONDS=n: n seconds)
#   make lint    what CI checks of style and types: lint-python, lint-cpp, lint-texts, lint-stubs (make format: what can be
#                put right by itself; make hooks: the same before every commit, by pre-commit)
#   make tidy    clang-tidy over csrc/ (make tidy TIDY=csrc/binding/pass.cpp: one file)
#   make stubs   normkern/_C.pyi from the binary, after a change of what csrc/binding/bind.cpp binds
#   make dist    what a release uploads, into dist/: built from the unpacked sdist, checked, and tried in an empty environment
#   make cuda    kernels for every GPU architecture, into build/cuda/ (make cuda-build: only that), and their machine code
#                checked (make cuda-sweep: with every type and every kernel broken on purpose, and docs/cuda.md's table)
#   make bench   speed: bench/results/bench.json, the README's table, docs/bench.png (make bench QUICK=1: a minute, into build/)
#   make bench-noise    the part about single gradients' noise: bench/results/noise.json, the README's table of it
#   make bench-scale    what DDPNoise costs between two processes, and bfloat16 weights on digits: their JSON, table, plot
#   make papers  the claims of four papers on networks of one's own: experiments/papers/results/ (an hour; an interrupted run
#                continues; make papers QUICK=1: two minutes, into build/papers/; DATA=folder: CIFAR-10 in torchvision's layout)
#   make bench-compare OLD=a.json NEW=b.json    what got slower
#   make docs    the documentation site: build/docs/index.html (make docs-figures: its pictures anew;
#                make docs-outputs: what the examples print)
#   make clean   removes what was built, and .venv
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
# Threads of one process that spin while they wait are threads of the other that do not run.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
SOURCES := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/cuda/*) CMakeLists.txt pyproject.toml constraints.txt

FORMATTED := $(filter %.cpp %.h %.cu %.cuh,$(SOURCES)) $(wildcard tests/simt/*.cpp tests/simt/*.h tests/simt/*.cu)

.PHONY: demo test test-slow sanitize fuzz lint lint-python lint-cpp lint-texts lint-stubs format hooks tidy stubs dist cuda-build cuda cuda-sweep bench bench-noise bench-scale bench-compare papers docs docs-figures docs-outputs clean

demo: .venv/ready
	$(BIN)/python -m normkern train --out demo/

test: .venv/ready
	$(PYTEST) -m "not slow"

test-slow: .venv/ready
	$(PYTEST)

comma := ,
# A binary that watches itself, in a folder of its own: what is installed stays as it is. tests/sanitized puts it in place.
SANITIZED = $(CURDIR)/build/sanitize-$(1)
WATCHED = PYTHONPATH=$(CURDIR)/tests/sanitized NORMKERN_BINARY=$$(ls $(call SANITIZED,$(1))/_C*.so) OMP_NUM_THREADS=2 \
  LD_PRELOAD="$$($(CXX) -print-file-name=$(2)) $$($(CXX) -print-file-name=libstdc++.so)"
# Python leaks by design; a mismatch or a memory larger than there is shall be torch's error, as it is without a sanitizer.
ASAN := ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1
# What libgomp, torch and Python do among themselves is not ours; where ours begins and ends is said in csrc/cpu/cpu.cpp.
TSAN := TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1
KERNEL_TESTS := $(wildcard $(addprefix tests/test_,ops*.py moments.py outer*.py clip.py lr_multipliers.py rounding.py norm_sums.py \
  embedding_moments.py bitwise.py running_moments.py precision.py optim_checkpoints.py robustness_sweep.py robustness_large.py))
THREAD_TESTS := tests/optim/test_threads_and_forks.py tests/optim/test_threads.py

build/sanitize-%/ready: .venv/ready tests/fuzz/edges.cpp
	$(BIN)/python -m pip install --quiet cmake ninja "pybind11>=3.0"
	$(BIN)/cmake -S . -B build/sanitize-$* -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DCMAKE_BUILD_TYPE=Debug \
	  -DNORMKERN_CUDA=OFF -DNORMKERN_SANITIZE=$(if $(filter address,$*),address$(comma)undefined,$*) \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/sanitize-$*
	touch $@

sanitize: build/sanitize-address/ready build/sanitize-thread/ready
	$(ASAN) $(call WATCHED,address,libasan.so) $(BIN)/python -m pytest -s -m "not slow" $(KERNEL_TESTS)
	$(TSAN) $(call WATCHED,thread,libtsan.so) $(BIN)/python -m pytest -s -k "not fork and not interpreter and not pool and not worker" $(THREAD_TESTS)

# Under the address sanitizer, and guided by the edges of the binding that a string of bytes reaches.
SECONDS ?= 60
fuzz: build/sanitize-address/ready
	$(BIN)/python -m pip install --quiet "atheris>=3.0"
	for what in ops checkpoints; do \
	  (cd tests && $(ASAN) $(call WATCHED,address,libasan.so) $(abspath $(BIN)/python) -m fuzz $$what ../build/fuzz/$$what \
	    -max_total_time=$(SECONDS) -max_len=160 -rss_limit_mb=0 -timeout=60 -artifact_prefix=../build/fuzz/$$what-) || exit 1; \
	done

lint: lint-python lint-cpp lint-texts lint-stubs

lint-python: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lint-cpp: .venv/ready
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

lint-texts: .venv/ready
	$(BIN)/codespell
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows $(wildcard .github/workflows/*.yml)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/wish.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/zizmor --offline --quiet .github

lint-stubs: .venv/ready
	$(BIN)/python csrc/stubs.py --check

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

hooks: .venv/ready
	$(BIN)/python -m pip install --quiet "pre-commit>=4"
	$(BIN)/pre-commit install

stubs: .venv/ready
	$(BIN)/python csrc/stubs.py

# The loops as they are compiled for the widest level. Nothing is built: every file is compiled with the same few options.
TIDY ?= $(wildcard csrc/binding/*.cpp csrc/core/*.cpp csrc/cpu/*.cpp)
tidy: .venv/tidy-ready
	printf '%s\n' $(TIDY) | xargs -I FILE -P 2 $(BIN)/clang-tidy --quiet FILE -- -std=c++17 -DNK_ISA=v4 \
	  $(if $(filter x86_64,$(shell uname -m)),-march=x86-64-v4) $$($(BIN)/python -m pybind11 --includes)

# `python -m build` makes the wheel from the sdist, unpacked in a folder without git, with tools of its own.
dist: .venv/dist-ready
	rm -rf dist build/dist
	$(BIN)/check-manifest
	NORMKERN_CUDA=OFF $(BIN)/python -m build --outdir build/dist
	mkdir dist && mv build/dist/*.tar.gz dist/
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --wheel-dir dist build/dist/*.whl
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(BIN)/python -m venv build/dist/empty
	build/dist/empty/bin/python -m pip install --quiet -c constraints.txt dist/*.whl pytest
	build/dist/empty/bin/pytest tests/smoke
	ls -l dist

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
	  tests/ops/test_sgd.py tests/ops/test_pairs.py tests/ops/test_gauge.py tests/ops/test_bitwise.py tests/noise/test_moments.py \
	  tests/ops/test_norm_sums.py tests/ops/test_embedding_moments.py
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

bench-scale: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 2 -m bench.ddp_noise \
	  --json bench/results/ddp_noise.json --readme README.md
	$(BIN)/python -m experiments.low_precision --json experiments/results/low_precision.json --plot docs/low_precision.png \
	  --readme README.md

bench-compare: .venv/ready .venv/bench-ready
	$(BIN)/python -m bench.compare $(OLD) $(NEW)

papers: .venv/ready
	$(BIN)/python -m experiments.papers $(if $(QUICK),--quick) $(if $(DATA),--data "$(DATA)")

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
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo,test,lint]"
	touch $@

# Peers with large packages are welcome, not needed: where one cannot be had, its rows say so.
.venv/bench-ready: pyproject.toml constraints.txt | .venv/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench]"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench-peers]" || echo "bench: going on without some peers"
	touch $@

.venv/tidy-ready: pyproject.toml | .venv/ready
	$(BIN)/python -m pip install --quiet --group tidy
	touch $@

.venv/dist-ready: pyproject.toml | .venv/ready
	$(BIN)/python -m pip install --quiet --group dist
	touch $@

.venv/docs-ready: pyproject.toml constraints.txt | .venv/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt --group docs
	touch $@

clean:
	rm -rf build dist demo .venv *.egg-info
