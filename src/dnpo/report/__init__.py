"""``python -m dnpo.report RUN_OR_SWEEP``: one HTML page that says what a run or a sweep did and what came out.

The page stands alone: no script, no network, pictures inlined. Everything that a run brings along (prompts, responses,
names, settings, notes) is text on it. ``selection.py`` finds what was asked for, ``groups.py`` sorts runs by what
varies, ``comparison.py`` and ``figures.py`` make tables and pictures of them, ``labels.py`` and ``origins.py`` say what
the numbers rest on, ``content.py`` gathers it all, and ``page.py`` writes it out.
"""
