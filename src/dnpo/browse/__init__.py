"""A page on this machine that shows the rows of runs: held-out answers side by side, and training pairs.

``runs.py`` finds runs and their stages. ``held.py`` and ``pairs.py`` read the rows, with functions of ``texts.py``.
``server.py`` serves the page.
"""
