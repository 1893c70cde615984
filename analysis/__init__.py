"""The figures and tables of the DNPO paper, from tracked runs. ``python -m analysis --list`` says which.

A script a figure or table: select runs, make numbers of them, draw. What they share: ``selection.py`` (which runs, and
what has to be said of them), ``results.py`` (numbers with intervals), ``comparing.py`` (rows of tables),
``densities.py`` and ``branching.py`` (what two figures each share), ``drawing.py`` (how all pictures look),
``published.py`` (the paper's own numbers), ``keeping.py`` (files and MLflow), ``command.py`` (the command line).
"""
