# Needs Python >= 3.10 and a C++17 compiler; the rest is installed into .venv. CONTRIBUTING.md says more.
PYTHON ?= python3
WORKERS ?= 2
SECONDS ?= 60
BIN := .venv/bin
# Idle OpenMP threads of one test process must not spin on the cores of the other. tests/conftest.py orders the files.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
SOURCES := $(filter-out %.py,$(wildcard csrc/*.* csrc/*/*.*)) CMakeLists.txt pyproject.toml constraints.txt
FORMATTED := $(filter %.cpp %.h %.cu %.cuh,$(SOURCES) $(wildcard tests/simt/*.* tests/fuzz/*.cpp bench/*.cpp))
# The files for clang-tidy.
FILES ?= $(filter-out csrc/cuda/%,$(filter %.cpp,$(SOURCES)))
KERNEL_TESTS := tests/ops --ignore=tests/ops/test_schemas.py \
  $(patsubst %,tests/noise/test_%.py,moments running_moments) \
  $(patsubst %,tests/optim/test_%.py,clipping lr_multipliers low_precision_options checkpoints random_sweep)

CUDA_PYTEST = CI=true NORMKERN_CUDA_BINARY=$$(ls $(CURDIR)/build/cuda/_C*.so) $(BIN)/python -m pytest

.PHONY: help demo test test-slow test-backpack test-zoo instructions bench bench-compare papers lint format stubs docs dist cuda sanitize fuzz clean \
  bench-all bench-noise bench-models bench-ddp lint-python lint-cpp lint-texts lint-stubs lint-tidy

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/ready ## train a small ResNet on handwritten digits; curves and numbers go into demo/
	$(BIN)/python -m normkern train --out demo/

test: .venv/ready ## run the tests (WORKERS=n: in n processes; SLOW=1: the long sweeps too)
	$(PYTEST) $(if $(SLOW),,-m "not slow")

test-slow: ## the same as make test SLOW=1
	$(MAKE) test SLOW=1

instructions: .venv/ready ## count the instructions of hot paths; more than 5 % over the budgets fails (WRITE=1: write budgets)
	cd tests && $(abspath $(BIN)/python) -m instructions $(if $(WRITE),--write,--json ../build/instructions.json)

test-backpack: $(if $(BACKPACK),.venv/backpack-ready) ## run BackPACK's own tests on GradientNoise (BACKPACK=folder: a checkout)
	@test -d "$(BACKPACK)" || { echo "make test-backpack expected BACKPACK=folder, a checkout of BackPACK:"; \
	  echo "  git clone https://github.com/f-dangel/backpack build/backpack"; \
	  echo "  make test-backpack BACKPACK=build/backpack"; exit 1; }
	here=$(CURDIR) && cd "$(BACKPACK)" && PYTHONPATH=$$here:$$here/tests/backpack:$$PWD OMP_WAIT_POLICY=passive \
	  $(abspath $(BIN))/python -m pytest -n $(WORKERS) -q -p adapter \
	  $(addprefix test/extensions/firstorder/,batch_l2_grad sum_grad_squared variance)

test-zoo: .venv/zoo-ready ## measure GradientNoise on published models (NEW=1: all of them anew)
	$(if $(NEW),rm -f build/zoo.jsonl)
	cd tests && for i in $$(seq $(WORKERS)); do HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
	  $(abspath $(BIN))/python -m zoo --part $$((i - 1))/$(WORKERS) & done; wait
	cd tests && $(abspath $(BIN))/python -m zoo --docs

bench: ## measure speed; fill the tables of docs (QUICK=1: 1 minute, to build/; ONLY=noise, models, ddp)
bench: bench-$(or $(ONLY),all)

bench-compare: .venv/bench-ready ## list what became slower between two results (OLD=a.json NEW=b.json)
	$(BIN)/python -m bench.compare $(OLD) $(NEW)

papers: .venv/ready ## test the claims of four papers (QUICK=1: two minutes, into build/; DATA=folder: on CIFAR-10)
	$(BIN)/python -m experiments.papers $(if $(QUICK),--quick) $(if $(DATA),--data "$(DATA)")

lint: ## check style and types (ONLY=python, cpp, texts, stubs; ONLY=tidy FILES=a.cpp: clang-tidy)
lint: $(addprefix lint-,$(or $(ONLY),python cpp texts stubs))

format: .venv/ready ## format Python and C++, and apply ruff's fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

stubs: .venv/ready ## write normkern/_C.pyi, after a change of what the binding exports
	$(BIN)/python csrc/stubs.py

docs: .venv/docs-ready ## build the site, build/docs/index.html (FIGURES=all, svag, ..: draw; OUTPUTS=1: run examples)
	$(if $(FIGURES),$(BIN)/python docs/figures $(filter-out all,$(FIGURES)))
	$(if $(OUTPUTS),for example in examples/*.py examples/notebooks/*.py; do OMP_NUM_THREADS=1 $(BIN)/python $$example \
	  > $$(dirname $$example)/outputs/$$(basename $$example .py).txt || exit 1; done)
	$(BIN)/python -m sphinx -W --keep-going -q docs build/docs

dist: .venv/dist-ready ## build what a release uploads, into dist/, and test it in an empty environment
	.ci/dist

cuda: build/cuda/ready ## compile kernels for every GPU and check their machine code (SWEEP=1: every type and mutant)
	$(CUDA_PYTEST) tests/test_cuda_build.py $(if $(SWEEP),tests/simt,-m "not slow" tests/simt/test_sass.py tests/simt/test_ptx.py)
	$(if $(SWEEP),$(CUDA_PYTEST) -k simt tests/ops tests/noise/test_moments.py)
	$(if $(SWEEP),cd tests && \
	  $(abspath $(BIN))/python -m simt.sass_check $(CURDIR)/build/cuda/_C*.so --docs ../docs/cuda.md)

sanitize: build/sanitize-address/ready build/sanitize-thread/ready ## run tests of kernels and threads under sanitizers
	tests/sanitized/run address $(BIN)/python -m pytest -s -m "not slow" $(KERNEL_TESTS)
	tests/sanitized/run thread $(BIN)/python -m pytest -s -k "not fork and not interpreter and not pool and not worker" \
	  tests/optim/test_threads_and_forks.py tests/optim/test_threads.py

fuzz: build/sanitize-address/ready ## run ops and checkpoints on random bytes under the address sanitizer (SECONDS=n: each)
	$(BIN)/python -m pip install --quiet "atheris>=3.0"
	for what in ops checkpoints; do \
	  (cd tests && sanitized/run address $(abspath $(BIN))/python -m fuzz $$what ../build/fuzz/$$what -max_len=160 \
	    -max_total_time=$(SECONDS) -timeout=60 -rss_limit_mb=0 -artifact_prefix=../build/fuzz/$$what-) || exit 1; \
	done

clean: ## remove everything that was built, and .venv
	rm -rf build dist demo .venv *.egg-info

# The parts of lint and bench.
lint-python: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lint-cpp: .venv/ready
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

lint-texts: .venv/ready
	$(BIN)/codespell
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows $(wildcard .github/workflows/*.yml)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms \
	  $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/zizmor --offline --quiet .github

lint-stubs: .venv/ready
	$(BIN)/python csrc/stubs.py --check

# Nothing is built: every file is compiled with the same few options, the loops as for the widest level.
lint-tidy: .venv/tidy-ready
	printf '%s\n' $(FILES) | xargs -I FILE -P 2 $(BIN)/clang-tidy --quiet FILE -- -std=c++17 -DNK_ISA=v4 \
	  $(if $(filter x86_64,$(shell uname -m)),-march=x86-64-v4) $$($(BIN)/python -m pybind11 --includes)

BENCH_RESULTS := $(if $(QUICK),build,bench/results)
BENCH = mkdir -p $(BENCH_RESULTS) && \
  $(BIN)/python -m pytest -c bench/pytest.ini bench --benchmark-quiet $(if $(QUICK),--quick)
README := $(if $(QUICK),,--readme docs/benchmarks.md)
# A quick run goes without other packages: what it needs itself is in .venv already.
BENCH_READY := .venv/$(if $(QUICK),,bench-)ready

bench-all: $(BENCH_READY)
	$(BENCH) --benchmark-json=$(BENCH_RESULTS)/bench.json
	$(BIN)/python -m bench.report $(BENCH_RESULTS)/bench.json --plot $(if $(QUICK),build,docs)/bench.png $(README)
	$(if $(QUICK),,$(BIN)/python docs/tables.py)

bench-noise: $(BENCH_READY)
	$(BENCH) -k "bench_noise or moments" --benchmark-json=$(BENCH_RESULTS)/noise.json
	$(BIN)/python -m bench.report $(BENCH_RESULTS)/noise.json $(README)

# On one thread; networks of transformers, timm and peft are left out where these are not installed.
bench-models: $(BENCH_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.noise_models $(if $(QUICK),--only LSTM --seconds 2) \
	  --json $(BENCH_RESULTS)/noise_models.json $(README)

bench-ddp: $(BENCH_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 2 -m bench.ddp_noise \
	  $(if $(QUICK),--quick) --json $(BENCH_RESULTS)/ddp_noise.json $(README)

# An editable install: Python files are read from here, the binary is built anew when its sources change.
.venv/ready: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo,test,lint]"
	touch $@

# timm and Ultralytics need torchvision, whose wheels do not load beside every torch and then break all that import it: tests
# and benchmarks have a stub.
WITHOUT_BROKEN_TORCHVISION = $(BIN)/python -c "import torchvision" 2> /dev/null || \
  $(BIN)/python -m pip uninstall --quiet --yes torchvision

# Large peers are optional: the rows of those that cannot be installed say so.
.venv/bench-ready: pyproject.toml constraints.txt | .venv/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt --group bench
	$(BIN)/python -m pip install --quiet -c constraints.txt --group bench-peers || echo "bench: going on without some peers"
	$(WITHOUT_BROKEN_TORCHVISION)
	touch $@

# tidy, dist, docs, cmake, backpack, frameworks: the dependency groups of pyproject.toml.
.venv/%-ready: pyproject.toml constraints.txt | .venv/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt --group $*
	touch $@

# Ultralytics needs OpenCV, which needs libraries of a desktop, or else its edition without windows.
.venv/frameworks-ready .venv/zoo-ready: pyproject.toml constraints.txt | .venv/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt --group $(patsubst .venv/%-ready,%,$@)
	$(WITHOUT_BROKEN_TORCHVISION)
	$(if $(findstring frameworks,$@),$(BIN)/python -c "import cv2" 2> /dev/null || { \
	  $(BIN)/python -m pip uninstall --quiet --yes opencv-python && \
	  $(BIN)/python -m pip install --quiet --force-reinstall --no-deps opencv-python-headless; })
	touch $@

# A preset of CMakePresets.json: a binary of its own in build/, beside the installed one.
$(patsubst %,build/%/ready,cuda sanitize-address sanitize-thread): build/%/ready: .venv/ready .venv/cmake-ready \
  CMakePresets.json tests/fuzz/edges.cpp
	$(BIN)/cmake --preset $* -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/$*
	touch $@
