"""Train a policy: fine-tuning, and preference training against a reference with noise."""
