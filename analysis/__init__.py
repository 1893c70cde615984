"""Figures and tables of the DNPO paper, drawn from tracked runs. ``python -m analysis list=true`` lists them.

Each figure or table has a script that selects runs, computes numbers and draws. The scripts share ``selection.py`` (the
runs that are compared, and notes on the others), ``results.py`` (numbers with intervals), ``comparing.py`` (rows of
tables), ``costs.py`` (what methods cost), ``watched.py`` (what is shown in addition to gains), ``fronts.py`` (Pareto
fronts), ``densities.py`` and ``branching.py`` (each shared by two figures), ``drawing.py`` (the style of all figures),
``published.py`` (the numbers that the paper prints), ``keeping.py`` (files and MLflow), ``floats.py`` (LaTeX) and
``command.py`` (the command line). ``claims*.py`` assess the papers' claims.
"""
