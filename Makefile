# make setup   .venv/bin/{sheep,dog,collie,sheepfs}, ready to use
# make compile the hot path again, after a change, trained (setup has done it once; minutes)
# make demo    a cluster of six nodes on this machine, a volume, a node that dies and comes back (KEEP=1: leave it running)
# make test    lint and every test; make lint, make unit: parts of it
# make bench   IOPS, MB/s and server CPU per operation against three nodes
# make bench-matrix   every kind of load, beside another server with PEER_SHEEP=/path/to/bin
# make bench-all      everything that docs/performance.md shows, and its charts: two hours of a quiet machine
# make soak    the tests that take long; other crashes of a store each time, or those of STORE_CRASH_SEED=...
#
# PYTHON=...   the interpreter to build .venv with (3.11 or newer)
# ARGS=...     further arguments for pytest: make test ARGS='-k story'

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
MARK := $(VENV)/.done

ifndef PYTHON
PYTHON := $(shell for p in /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
# none yet: on a fresh Debian the packages bring it
PYTHON := $(or $(PYTHON),/usr/bin/python3)
endif
export PYTHON

QEMU52 ?= $(HOME)/.cache/qemu-5.2-sheepdog
export QEMU52

PYTEST = $(BIN)/python -m pytest $(ARGS)
# Tests at a time, whole files to each: most of them wait for processes, and each has ports and directories of its own.
WORKERS ?= 2
# the lowest first: that is where to look when several fail
TESTS = tests/unit tests/wire tests/sim tests/process tests/frontends

.PHONY: help setup compile lint unit test qemu52 demo bench bench-matrix bench-all soak clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

setup: $(MARK)-setup $(MARK)-compiled $(MARK)-native

$(MARK)-setup: pyproject.toml packaging/install-packages
	packaging/install-packages setup
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with PYTHON=")'
	test -x $(BIN)/python && $(BIN)/python -c '' || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[sheepfs,zookeeper,iscsi,erasure,test]'
	$(BIN)/python -m compileall -q cluster frontends tools || true
	@touch $@

# Once: who changes the sources afterwards runs them as they are, until `make compile`.
$(MARK)-compiled: | $(MARK)-setup
	$(BIN)/python packaging/compile --if-changed || [ -z "$$CI" ]
	@touch $@

# Seconds, so after each change.
$(MARK)-native: cluster/client/native.py cluster/client/native.pxd | $(MARK)-setup
	$(BIN)/python packaging/compile-native --if-changed || [ -z "$$CI" ]
	@touch $@

compile: $(MARK)-setup $(MARK)-native
	$(BIN)/python packaging/compile --if-changed

$(MARK)-demo-packages: $(MARK)-setup
	packaging/install-packages --optional demo
	@touch $@

$(MARK)-test-packages: $(MARK)-setup
	packaging/install-packages --optional test
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: setup
	$(PYTEST) tests/unit tests/wire tests/sim

# QEMU 5.2 is the newest that speaks the native protocol and that Debian still has the source of. Built once, cached outside the tree.
# Where it cannot be built, the tests that use it are skipped and say so (in CI that is a failure).
qemu52: $(MARK)-setup
	tests/support/build-qemu52 $(QEMU52) || [ -z "$$CI" ]

test: lint $(MARK)-test-packages qemu52
	$(PYTEST) -n $(WORKERS) --dist loadfile -m 'not soak' $(TESTS)

soak: setup $(MARK)-test-packages qemu52
	seed=$${STORE_CRASH_SEED:-$$(shuf -i 1-1000000000 -n 1)}; echo "STORE_CRASH_SEED=$$seed"; \
	STORE_CRASH_SEED=$$seed $(PYTEST) -m soak --timeout 7200 $(TESTS)

demo: setup $(MARK)-demo-packages
	@$(BIN)/python -m tests.support.demo

bench: setup compile qemu52
	@$(BIN)/python -m tests.bench.run $(ARGS)
	@[ -n "$(ARGS)" ] || { echo; $(BIN)/python -m tests.bench.doors; echo; $(BIN)/python -m tests.bench.verified; }

bench-matrix: setup compile
	@$(BIN)/python -m tests.bench.matrix $(ARGS)

# The results are in bench-results.
bench-all: bench
	@$(BIN)/python -m tests.bench.run --durable
	@$(BIN)/python -m tests.bench.run --coded
	@$(BIN)/python -m tests.bench.run --recovery
	@$(BIN)/python -m tests.bench.run --administration
	@$(BIN)/python -m tests.bench.cache
	@$(BIN)/python -m tests.bench.many --charts docs/charts
	@$(BIN)/python -m tests.bench.scale
	@$(BIN)/python -m tests.bench.cluster_scale
	@$(BIN)/python -m tests.bench.matrix --syscalls --charts docs/charts

clean:
	rm -rf $(VENV) build dist bench-results .pytest_cache .mypy_cache .ruff_cache .hypothesis
