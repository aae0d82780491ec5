# make demo, make test: see the README. Environments are made once, in the
# user's cache folder, by .dev_scripts/make_env.py.
SHELL := /bin/bash

# any Python will do to start: make_env.py finds the right one
STARTER := $(shell for p in "$$PYTHON" python3.11 python3 python; do \
	[ -n "$$p" ] && "$$p" -c 'import sys; assert sys.version_info > (3, 6)' \
	2>/dev/null && echo "$$p" && break; done)
MAKE_ENV := $(or $(STARTER),echo 'Python 3.11 is needed and no Python 3 was \
	found; install it with its headers.' >&2; exit 2; :) \
	.dev_scripts/make_env.py

# e.g. make test TESTS="tests/test_merge.py" PYTEST_ARGS="-x -k lora"; without
# arguments two processes share the test files
TESTS ?= tests
PYTEST_ARGS ?= -n 2 --dist loadfile
DEMO_ARGS ?=

.PHONY: help demo test test-classic lint format env env-classic env-lint \
	clean distclean

help:
	@echo 'make demo          environment, then the demo on generated data'
	@echo 'make test          environment, then the tests (TESTS=, PYTEST_ARGS=)'
	@echo 'make test-classic  the same on torch 2.1 and the classic libraries'
	@echo 'make lint          checks the style; make format fixes it'
	@echo 'make clean         removes what these made in the checkout'
	@echo 'make distclean     removes the cached environments, too'

demo: env
	.venv/bin/python tools/demo.py $(DEMO_ARGS)

test: env
	.venv/bin/python -m pytest $(TESTS) $(PYTEST_ARGS)

test-classic: env-classic
	.venv-classic/bin/python -m pytest $(TESTS) $(PYTEST_ARGS)

lint: env-lint
	@.venv-lint/bin/python .dev_scripts/lint.py

format: env-lint
	@.venv-lint/bin/python .dev_scripts/lint.py --fix

env:
	@$(MAKE_ENV) maintained

env-classic:
	@$(MAKE_ENV) classic

env-lint:
	@$(MAKE_ENV) lint

# Only what is ours: the demo's results and generated data, caches, links to
# environments (never a folder of that name), build results.
clean:
	rm -rf work_dirs/demo data/shapes_v1 build dist mmpeft.egg-info .pytest_cache
	@rmdir work_dirs data 2>/dev/null || true
	@for link in .venv .venv-classic .venv-lint; do \
		if [ -L $$link ]; then rm -v $$link; fi; done
	@find mmpeft tools tests configs benchmarks .dev_scripts -name __pycache__ \
		-type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	@$(MAKE_ENV) --remove-all
