# Everything needs Python >= 3.10, a C++17 compiler and make; the rest is installed into .venv.
#   make demo    train on handwritten digits: demo/curves.png, demo/train.json
#   make test    the whole test suite (make test-slow: with the long sweeps)
#   make lint    what CI checks of style and types
#   make bench-sgd    the numbers of the README: bench/results/sgd.json, README.md
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h) CMakeLists.txt pyproject.toml constraints.txt

.PHONY: demo test test-slow lint format bench-sgd clean

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
	$(BIN)/clang-format --dry-run -Werror $(filter %.cpp %.h,$(SOURCES))

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.cpp %.h,$(SOURCES))

bench-sgd: .venv/ready
	$(BIN)/python bench/sgd.py --out bench/results/sgd.json --readme README.md

# An editable install: Python files are read from here, the binary is built anew when its sources change.
.venv/ready: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo,test,lint]"
	touch $@

clean:
	rm -rf build dist demo .venv *.egg-info
