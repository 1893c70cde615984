"""Paired statistics: intervals, tests, win rates and tables of comparisons."""
