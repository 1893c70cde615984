"""Paired statistics: intervals, tests, win rates, tables of comparisons."""
