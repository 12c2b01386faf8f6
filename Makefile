.DEFAULT_GOAL := help
.PHONY: help gen gen-check lint types contracts envoy check test fmt
BIN := .venv/bin

gen gen-check fmt lint types contracts envoy: .venv/synced

# ./dev syncs only when what these two say has changed: the time says that it has looked.
.venv/synced: uv.lock pyproject.toml
	./dev --help >/dev/null && touch $@

help: ## Show what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 16

gen: ## Generate stubs and the descriptor set from proto/
	$(BIN)/python -m cli.generate

gen-check: ## Fail when gen/ is not what proto/ says
	$(BIN)/python -m cli.generate --check

fmt: ## Format Python and contracts
	$(BIN)/ruff format . && $(BIN)/ruff check --fix . && $(BIN)/buf format -w proto

lint: ## Lint Python and contracts
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/buf lint && $(BIN)/buf format -d --exit-code proto

types: ## Check types
	$(BIN)/mypy

contracts: ## Fail when a contract breaks its callers (compared with main)
	$(BIN)/python -m cli.generate --breaking

check: lint types gen-check contracts envoy ## What CI runs besides the tests

envoy: ## Validate the gateway's configuration
	$(BIN)/python -m cli.envoy_config --validate edge/envoy.yaml

test: ## Run the tests (the same as ./dev test)
	./dev test
