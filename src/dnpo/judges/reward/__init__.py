"""Reward models as judges, and fitting them to preferences."""
