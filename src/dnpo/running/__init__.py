"""Execute a chain of stages: the checks before it, screen output, notes, model cards and sweeps."""
