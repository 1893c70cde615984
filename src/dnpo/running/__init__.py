"""Executing a chain of stages: gate, screen, notes, sweeps."""
