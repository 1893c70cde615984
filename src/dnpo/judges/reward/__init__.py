"""Reward models as judges, and how to fit one."""
