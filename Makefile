# All targets use one environment, .venv/ in this checkout, and create it when it is missing.
#
#   make serve PORT=9000 MODEL=path ARGS="--max-batch 16"    also HOST, DEVICE, THREADS, STATE_DIR, ADAPTER_DIR, CONFIG
#   make test                   all tests; ARGS="tests/adapters -k rank" selects some
#   make test-fast              a selection of unit tests that takes less than a minute
#   make lint                   ruff, mypy, import-linter, clang-format and known vulnerabilities of dependencies
#   make format                 fix what ruff can fix, and format
#   make docs                   build the documentation site and check its links
#   make bench ARGS=...         time decode steps
#   make soak MINUTES=30        load on a server while adapters are published and removed
#   make fuzz FUZZ_MINUTES=10   generated requests against the API, generated files against every parser
#   make dashboard              server, Prometheus and Grafana in Docker: PORT, MODEL, ALLOWED_HOSTS, EXTRAS=s3, SERVER=server-gpu
#   make clean                  remove the environment and everything that was built
#   TORCH_INDEX=URL             package index for torch, for example the one of its CPU builds; default: pip's own
#   PYTHON=path                 Python interpreter, 3.11 or later

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

VENV := .venv
BIN := $(VENV)/bin
TORCH_INDEX ?=
PYTHON ?= $(firstword $(foreach p,python3 python3.11 python3.12 python3.13 python3.14,$(shell \
  $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(p))))
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Settings for `make serve`. PORT may come from the environment. The other names are too common, so they count only on
# the command line of make.
from_command_line = $(if $(findstring command,$(origin $(1))),$($(1)))
setting = $(if $(findstring command,$(origin $(1))),--$(2) "$($(1))")
flags = $(if $(PORT),--port "$(PORT)") $(call setting,HOST,host) $(call setting,MODEL,model) \
  $(call setting,DEVICE,device) $(call setting,THREADS,threads) $(call setting,STATE_DIR,state-dir) \
  $(call setting,ADAPTER_DIR,adapter-dir) $(call setting,CONFIG,config)

.PHONY: help serve test test-fast fuzz soak bench lint clang-format audit format docs dashboard clean
help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' $(MAKEFILE_LIST)

serve: $(VENV)/.installed
	exec $(BIN)/loramux serve $(flags) $(ARGS)

# Two workers. End-to-end tests are distributed by file, because the tests of a file share a server.
test: $(VENV)/.installed-dev
ifeq ($(ARGS),)
	$(BIN)/python -m pytest -n 2 -m "not e2e"
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m e2e
else
	$(BIN)/python -m pytest $(ARGS)
endif

# Packages whose tests need no server, no child process and no large model.
FAST := tests/adapters tests/server/tasks tests/server/test_settings.py tests/server/test_metrics.py
test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n 2 -m "not e2e" $(FAST) $(ARGS)

# Generated requests for every operation of the OpenAPI document (FUZZ examples each), then generated files for every
# parser, FUZZ_MINUTES each.
FUZZ ?= 550
FUZZ_MINUTES ?= 10
PARSERS := tests/adapters/test_peft_fuzz.py tests/server/model/test_gguf_fuzz.py tests/server/tasks/test_task_fuzz.py
fuzz: $(VENV)/.installed-dev
	FUZZ_EXAMPLES=$(FUZZ) $(BIN)/python -m pytest -s --hypothesis-profile=fuzz -p no:cacheprovider \
	  tests/server/api/test_schemathesis.py
	for parser in $(PARSERS); do for (( end = SECONDS + 60 * $(FUZZ_MINUTES); SECONDS < end; )); do \
	  FUZZ_EXAMPLES=2000 $(BIN)/python -m pytest -q --hypothesis-profile=fuzz -p no:cacheprovider $$parser; \
	done; done

MINUTES ?= 30
soak: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES) $(ARGS)

bench: $(VENV)/.installed-dev
	$(BIN)/loramux bench steps $(ARGS)

lint: $(VENV)/.installed-dev clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python deploy/audit.py $(AUDIT)

clang-format:
	@if command -v clang-format >/dev/null; then \
	  clang-format --dry-run -Werror server/kernels/cpu/*.cpp server/kernels/cpu/*.h; \
	else echo "clang-format is not installed: the C++ sources are not checked"; fi

# Known vulnerabilities of the installed packages. AUDIT="--ignore-vuln ID" ignores one.
audit: $(VENV)/.installed-dev
	$(BIN)/python deploy/audit.py $(AUDIT)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict

# Create keys, then start the server, Prometheus and Grafana in containers. SERVER=server-gpu starts the server with a
# GPU. Both servers use the same port and state, so the other one is removed, but only after the image has been built.
SERVER ?= server
# Compose gets only the variables that are set here, so that values in .env still count.
compose_variables := PORT MODEL ALLOWED_HOSTS EXTRAS TORCH_INDEX
compose_value = $(if $(filter PORT TORCH_INDEX,$(1)),$($(1)),$(call from_command_line,$(1)))
compose_env = env $(foreach name,$(compose_variables),$(if $(call compose_value,$(name)),,-u $(name))) \
  $(foreach name,$(compose_variables),$(if $(call compose_value,$(name)),$(name)="$(call compose_value,$(name))"))
port = $(or $(PORT),$(shell sed -n 's/^PORT=//p' .env 2>/dev/null),8000)
dashboard:
	deploy/make-keys
	@command -v docker >/dev/null || { echo "docker with its compose plugin is required" >&2; exit 1; }
	$(compose_env) docker compose build $(SERVER)
	-docker compose rm --stop --force $(filter-out $(SERVER),server server-gpu)
	$(compose_env) docker compose up --detach $(SERVER) prometheus grafana
	@echo "loramux     http://127.0.0.1:$(port)   keys: deploy/secrets/api_keys, admin_keys"
	@echo "Prometheus  http://127.0.0.1:9090"
	@echo "Grafana     http://127.0.0.1:3000   user: admin, password: deploy/secrets/grafana_password"

clean:
	rm -rf $(VENV) build site *.egg-info server/kernels/cpu/*.so

# Stamp files record what is installed; nothing is installed twice. If two makes run at the same time, one waits for the
# other. They lock the Makefile, where flock and the file system allow it.
locked = exec 9<$(firstword $(MAKEFILE_LIST)); if command -v flock >/dev/null; then flock 9 || :; fi;

$(VENV)/.made:
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is required; choose one with PYTHON=" >&2; exit 1; }
	@$(locked) if [ -e $(VENV) ] && [ ! -x $(BIN)/python ]; then echo "$(VENV) is not a virtual environment; make clean removes it" >&2; exit 1; fi
	@$(locked) [ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "the venv module is missing (Debian: apt install python3-venv)" >&2; exit 1; }
	touch $@

NATIVE := $(wildcard setup.py server/kernels/cpu/*.cpp server/kernels/cpu/*.h server/kernels/cpu/*.py)
# If a compiler is installed later, the package is installed again, with the native kernels.
NATIVE += $(if $(shell command -v "$${CXX:-g++}"),$(VENV)/.compiler)

$(VENV)/.compiler: $(VENV)/.made
	touch $@

$(VENV)/.torch: $(VENV)/.made
	$(if $(TORCH_INDEX),$(locked) $(PIP) install --index-url "$(TORCH_INDEX)" torch)
	touch $@

$(VENV)/.installed: pyproject.toml $(NATIVE) $(VENV)/.torch
	$(locked) $(PIP) install -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(NATIVE) $(VENV)/.torch
	$(locked) $(PIP) install -e '.[dev]'
	touch $(VENV)/.installed $@
