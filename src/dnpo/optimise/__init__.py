"""How a policy is trained: fine-tuning, and on pairs against its reference and the noise on it."""
