"""Execute a chain of stages: checks before it, screen output, notes, model cards, sweeps."""
