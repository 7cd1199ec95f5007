# One environment for all: .venv/ in this checkout. Nothing has to be done first.
#
#   make serve PORT=9000 MODEL=path ARGS="--max-batch 16"     also HOST, DEVICE, THREADS, STATE_DIR, ADAPTER_DIR, CONFIG
#   make test ARGS="tests/adapters -k rank"                   without ARGS all tests
#   make bench ARGS=...      times of decode steps            make soak MINUTES=30     traffic while adapters come and go
#   make fuzz FUZZ_MINUTES=10    made-up requests and files   make lint                style, types and known vulnerabilities
#   make dashboard           with Prometheus and Grafana, in Docker: PORT, MODEL, ALLOWED_HOSTS, EXTRAS=s3, SERVER=server-gpu
#   make clean               without the environment
#   TORCH_INDEX   an index to install torch from, such as that of its CPU builds; empty is pip's own configuration
#   PYTHON        an interpreter, 3.11 or later

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

# Settings that may be given as variables. PORT also from the environment; the others are too common a name for that.
given = $(if $(findstring command,$(origin $(1))),$($(1)))
typed = $(if $(findstring command,$(origin $(1))),--$(2) "$($(1))")
flags = $(if $(PORT),--port "$(PORT)") $(call typed,HOST,host) $(call typed,MODEL,model) \
  $(call typed,DEVICE,device) $(call typed,THREADS,threads) $(call typed,STATE_DIR,state-dir) \
  $(call typed,ADAPTER_DIR,adapter-dir) $(call typed,CONFIG,config)

.PHONY: help serve test fuzz soak lint audit format dashboard clean bench
help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' $(MAKEFILE_LIST)

serve: $(VENV)/.installed
	exec $(BIN)/loramux serve $(flags) $(ARGS)

# Two at a time; those on the embedded base by files, whose tests share servers.
test: $(VENV)/.installed-dev
ifeq ($(ARGS),)
	$(BIN)/python -m pytest -n 2 -m "not e2e"
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m e2e
else
	$(BIN)/python -m pytest $(ARGS)
endif

# Made-up requests over the whole OpenAPI document (FUZZ examples of each kind), and made-up files for every reader,
# for FUZZ_MINUTES each.
FUZZ ?= 550
FUZZ_MINUTES ?= 10
READERS := tests/adapters/test_peft_fuzz.py tests/server/model/test_gguf_fuzz.py tests/server/tasks/test_task_fuzz.py
fuzz: $(VENV)/.installed-dev
	FUZZ_EXAMPLES=$(FUZZ) $(BIN)/python -m pytest -s --hypothesis-profile=fuzz -p no:cacheprovider \
	  tests/server/api/test_schemathesis.py
	for reader in $(READERS); do for (( end = SECONDS + 60 * $(FUZZ_MINUTES); SECONDS < end; )); do \
	  FUZZ_EXAMPLES=2000 $(BIN)/python -m pytest -q --hypothesis-profile=fuzz -p no:cacheprovider $$reader; \
	done; done

# 32 clients against the embedded base while adapters come and go, for MINUTES.
MINUTES ?= 30
soak: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES) $(ARGS)

bench: $(VENV)/.installed-dev
	$(BIN)/loramux bench steps $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python deploy/audit.py $(AUDIT)

# Known vulnerabilities of what is installed, where the network tells of any. AUDIT="--ignore-vuln ID" leaves one out.
audit: $(VENV)/.installed-dev
	$(BIN)/python deploy/audit.py $(AUDIT)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Keys, then server, Prometheus and Grafana in containers. SERVER=server-gpu for the one with a GPU; the other has the same
# port and state, and is ended as soon as there is an image to start.
SERVER ?= server
# Compose is told what is given here alone, so that .env has the rest.
passed := PORT MODEL ALLOWED_HOSTS EXTRAS TORCH_INDEX
asked = $(if $(filter PORT TORCH_INDEX,$(1)),$($(1)),$(call given,$(1)))
told = env $(foreach name,$(passed),$(if $(call asked,$(name)),,-u $(name))) \
  $(foreach name,$(passed),$(if $(call asked,$(name)),$(name)="$(call asked,$(name))"))
port = $(or $(PORT),$(shell sed -n 's/^PORT=//p' .env 2>/dev/null),8000)
dashboard:
	deploy/make-keys
	@command -v docker >/dev/null || { echo "docker with its compose plugin is needed" >&2; exit 1; }
	$(told) docker compose build $(SERVER)
	-docker compose rm --stop --force $(filter-out $(SERVER),server server-gpu)
	$(told) docker compose up --detach $(SERVER) prometheus grafana
	@echo "loramux     http://127.0.0.1:$(port)   keys: deploy/secrets/api_keys, admin_keys"
	@echo "Prometheus  http://127.0.0.1:9090"
	@echo "Grafana     http://127.0.0.1:3000   admin, password: deploy/secrets/grafana_password"

clean:
	rm -rf $(VENV) build *.egg-info server/kernels/cpu/*.so

# The stamps are newer than all that decides what is installed, so a second run installs nothing. Of two at the same
# time one waits for the other: where there is flock, and a file system that has locks, the Makefile is
# what they lock.
alone = exec 9<$(firstword $(MAKEFILE_LIST)); if command -v flock >/dev/null; then flock 9 || :; fi;

$(VENV)/.made:
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed; name one with PYTHON=" >&2; exit 1; }
	@$(alone) if [ -e $(VENV) ] && [ ! -x $(BIN)/python ]; then echo "$(VENV) is no environment; make clean removes it" >&2; exit 1; fi
	@$(alone) [ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no venv (Debian: apt install python3-venv)" >&2; exit 1; }
	touch $@

NATIVE := $(wildcard setup.py server/kernels/cpu/*.cpp server/kernels/cpu/*.h server/kernels/cpu/*.py)
# A compiler that came after the package has it installed once more, with the kernels.
NATIVE += $(if $(shell command -v "$${CXX:-g++}"),$(VENV)/.compiler)

$(VENV)/.compiler: $(VENV)/.made
	touch $@

$(VENV)/.torch: $(VENV)/.made
	$(if $(TORCH_INDEX),$(alone) $(PIP) install --index-url "$(TORCH_INDEX)" torch)
	touch $@

$(VENV)/.installed: pyproject.toml $(NATIVE) $(VENV)/.torch
	$(alone) $(PIP) install -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(NATIVE) $(VENV)/.torch
	$(alone) $(PIP) install -e '.[dev]'
	touch $(VENV)/.installed $@
