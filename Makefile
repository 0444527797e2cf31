# `make demo` and `make test` are enough on a machine with Python 3.11+, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help install demo serve test check format schema lock dashboards docs clean

help:  ## list what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

install: $(READY)  ## make .venv from the lock, with the penstock command in it

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "penstock needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY)  ## a burst of calls through the gateway and straight to a provider, side by side (KEEP=1 stays up)
	@$(BIN)/penstock demo $(if $(KEEP),--keep)

serve: $(READY)  ## run the gateway (CONFIG=file, else OPENAI_API_KEY / ANTHROPIC_API_KEY from the environment)
	@$(BIN)/penstock serve $(if $(CONFIG),--config $(CONFIG))

test: $(READY)  ## run the tests
	$(BIN)/pytest -n auto --dist loadfile

check: $(READY)  ## all that CI checks besides the tests: style, types, the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## put the code into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(READY)  ## write config/penstock.schema.json anew
	$(BIN)/penstock schema > config/penstock.schema.json

lock:  ## write both locks anew from pyproject.toml (needs uv)
	uv pip compile --universal --generate-hashes --no-emit-index-url --no-annotate --no-header \
		--python-version 3.11 --extra dev --upgrade pyproject.toml -o requirements.lock
	uv pip compile --universal --generate-hashes --no-emit-index-url --no-annotate --no-header \
		--python-version 3.11 --constraint requirements.lock pyproject.toml -o requirements.run.lock

dashboards: $(READY)  ## write grafana/dashboards anew from grafana/pages
	$(BIN)/python -m grafana.build

docs: $(READY)  ## write the tables of docs/ anew from the code
	$(BIN)/python -m tests.docs.tables
	$(BIN)/python -m proxy.telemetry.document > docs/metrics.md

clean:  ## remove what make made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info
