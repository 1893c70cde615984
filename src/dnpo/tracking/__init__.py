"""Writing to MLflow, and reading it back."""
