.PHONY: install check test quick run

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
