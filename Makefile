# Every command of the project. Rules of this file:
#
# * Each target makes what it needs: a fresh clone with Python, its venv module and make is enough.
# * The environment holds exactly requirements/dev.txt, for the interpreter that PYTHON names.
# * What `make help` prints is the text after `##`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCK_UV := uv==0.13.9

PROTOS := $(wildcard protos/peermem/*/*.proto)
SERVICES := $(shell grep -l '^service ' $(PROTOS))
GENERATED := service/peermem/v1 service/peermem/etcd

# The stamps carry the Python version, so that another PYTHON makes another environment.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
LOCKED := $(VENV)/.locked-$(VERSION)
READY := $(VENV)/.ready-$(VERSION)
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet

comma := ,

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

.PHONY: help venv demo test chaos soak fuzz lab lab-soak image image-test bench screenshots check fix protos lock clean
.PHONY: check-lint check-format check-types check-imports check-contract check-generated

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "  make %-10s %s\n", $$1, $$2 }'

demo: $(READY) ## Move a file between two nodes and compare it (FILE=path)
	$(BIN)/python -m bench.demo $(if $(FILE),"$(FILE)")

test: $(READY) ## Run the tests (ARGS="-k tcp" goes to pytest)
	$(BIN)/python -m pytest $(ARGS)

lab: $(READY) ## Run the tests that need RDMA NICs and BARs, on a machine that is emulated (ARGS=--help tells how)
	$(BIN)/python -m tests.lab $(ARGS)

lab-soak: $(READY) ## Run the lab's soak whole: a quarter of an hour
	$(BIN)/python -m tests.lab --soak --only soak $(ARGS)

chaos: $(READY) ## Break real daemons and jobs at random and check every byte (ARGS="--seed N --seconds S")
	$(BIN)/python -m tests.chaos $(ARGS)

soak: $(READY) ## The same for half an hour without ending a daemon: do they grow?
	$(BIN)/python -m tests.chaos --soak --seconds 1800 $(ARGS)

fuzz: $(READY) ## Try thousands of malformed inputs on every parser that faces a socket (EXAMPLES=N for each test)
	FUZZ_EXAMPLES=$(or $(EXAMPLES),1000) $(BIN)/python -m pytest --timeout 1800 $(ARGS) \
		tests/directory/test_records.py $(wildcard tests/*_fuzz.py tests/*/*_fuzz.py)

# What builds the image: buildah, podman or docker, whichever is there.
ENGINE ?= $(or $(firstword $(foreach engine,buildah podman docker,$(shell command -v $(engine)))),docker)
RELEASE = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

image: ## Build the container image peermem:VERSION (ENGINE=docker chooses what builds it)
	$(ENGINE) build --tag peermem:$(RELEASE) --build-arg VERSION=$(RELEASE) \
		--build-arg REVISION=$(or $(shell git rev-parse HEAD 2>/dev/null),unknown) \
		$(if $(PIP_INDEX_URL),--build-arg PIP_INDEX_URL=$(PIP_INDEX_URL)) \
		$(if $(PIP_CERT),--secret id=authorities$(comma)src=$(PIP_CERT) --build-arg PIP_CERT=/run/authorities.pem) \
		$(ARGS) .

image-test: $(READY) ## Build the image from nothing but Debian, run daemons from it and look at what it holds (root)
	PEERMEM_BUILD_IMAGE=1 $(BIN)/python -m pytest tests/deploy/test_image.py $(ARGS)

bench: $(READY) ## Measure speed and size, beside other engines (ARGS=--help tells how)
	$(BIN)/python -m bench.run $(ARGS)

screenshots: $(READY) ## Take the pictures of the daemon's page that docs/ holds, of real daemons under load
	$(BIN)/python -m tests.api.page $(ARGS)

check: $(READY) ## Run every check of the code, all of them even if one fails
	@$(MAKE) --keep-going --jobs=1 check-lint check-format check-types check-imports check-contract check-generated

check-lint: $(READY)
	$(BIN)/ruff check

check-format: $(READY)
	$(BIN)/ruff format --check

check-types: $(READY)
	$(BIN)/mypy

check-imports: $(READY)
	$(BIN)/lint-imports --no-logo

check-contract: $(READY)
	$(BIN)/buf lint protos

check-generated: $(READY)
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && \
	$(call generate,$$fresh) && \
	(for each in $(GENERATED); do \
		diff -rq --exclude=__init__.py --exclude=__pycache__ "$$fresh/$${each#service/}" $$each || exit 1; \
	done) && \
	echo "$(GENERATED) is what protos/ generates." || \
	{ echo "$(GENERATED) differs from what protos/ generates: run 'make protos'." >&2; exit 1; }

fix: $(READY) ## Format the code and mend what ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

protos: $(READY) ## Generate service/peermem/v1 and etcd from protos/
	rm -f $(addsuffix /*_pb2*,$(GENERATED))
	$(call generate,service)

# Messages of every file; gRPC code only of those that have a service.
define generate
$(BIN)/python -m grpc_tools.protoc -Iprotos --plugin=$(BIN)/protoc-gen-mypy --plugin=$(BIN)/protoc-gen-mypy_grpc \
	--python_out=$(1) --mypy_out=quiet:$(1) $(PROTOS) && \
$(BIN)/python -m grpc_tools.protoc -Iprotos --plugin=$(BIN)/protoc-gen-mypy --plugin=$(BIN)/protoc-gen-mypy_grpc \
	--grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) $(SERVICES)
endef

lock: ## Pin what pyproject.toml asks for (ARGS=--upgrade takes newer releases)
	@tools=$$(mktemp -d) && trap 'rm -rf "$$tools"' EXIT && \
	$(PYTHON) -m venv "$$tools" && "$$tools/bin/pip" install --quiet $(LOCK_UV) && \
	compile="$$tools/bin/uv pip compile --no-config --quiet --no-header --generate-hashes --universal \
		--python-version 3.11 --fork-strategy fewest pyproject.toml --extra daemon $(ARGS)" && \
	$$compile --output-file requirements/runtime.txt && \
	$$compile --group dev --constraint requirements/runtime.txt --output-file requirements/dev.txt && \
	$$compile --group test --constraint requirements/dev.txt --output-file requirements/lab.txt && \
	$$compile --extra spiffe --constraint requirements/dev.txt --output-file requirements/image.txt

venv: $(READY) ## Make the environment (PYTHON=python3.13 chooses the interpreter)

$(READY): $(LOCKED) pyproject.toml
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(LOCKED): requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
		echo "peermem needs Python 3.11, 3.12 or 3.13, and '$(PYTHON)' is not one: name one, as in 'make PYTHON=python3.12'." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' can't make virtual environments: run 'apt-get install python3-venv', then this again." >&2; exit 1; }
	@echo "Making $(VENV) with Python $(VERSION): a minute, the first time."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install --require-hashes --requirement requirements/dev.txt
	@touch $@

clean: ## Remove the environment and everything that was generated beside it
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find service tests bench -name __pycache__ -prune -exec rm -rf {} +
