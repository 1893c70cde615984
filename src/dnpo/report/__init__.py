"""``python -m dnpo.report RUN_OR_SWEEP``: write one HTML page about a run or a sweep.

The page is self-contained: no scripts, no network, inlined pictures. All content of a run (prompts, responses, names,
settings, notes) is shown as plain text. ``selection.py`` finds the runs, and ``groups.py`` groups them by the settings
that vary. ``comparison.py`` and ``figures.py`` make tables and pictures. ``labels.py`` and ``origins.py`` explain the
numbers. ``content.py`` collects everything, and ``page.py`` renders it.
"""
