.PHONY: install check test quick run results

install:  ## set up, in the virtual environment that is active
	python -m pip install -c constraints.txt -e ".[dev]"

check:  ## what takes seconds: lint, format, types, what imports what
	ruff check .
	ruff format --check .
	mypy
	lint-imports

quick:  ## the tests without whole runs
	python -m pytest -n auto --dist loadgroup -m "not long"

test: check  ## everything that CI runs
	python -m pytest -n auto --dist loadgroup

run:  ## the main job
	python -m dnpo.train

FORECAST := $(patsubst %,forecast=%,$(wildcard docs/results/plan.csv))

results:  ## hours: run what the claims still lack, then write docs/results, the figures and the reports of the sweeps
	dnpo claims run=true jobs=2 measured=docs/results/claims.json out=docs/results page=docs/results.md $(FORECAST)
	dnpo figures all
	set -e; for sweep in main ablation fixed_vs_trainable saturation; do dnpo report $$sweep; done
