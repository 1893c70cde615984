"""``python -m dnpo.report RUN_OR_SWEEP``: write one HTML page about a run or a sweep.

The page is self-contained: no scripts, no network, inlined pictures. All content of a run (prompts, responses, names,
settings, notes) is shown as plain text. ``selection.py`` finds the runs, ``groups.py`` groups them by what varies,
``comparison.py`` and ``figures.py`` make tables and pictures, ``labels.py`` and ``origins.py`` explain the numbers,
``content.py`` gathers everything, and ``page.py`` renders it.
"""
