"""The policy: its weights, tokenizer, packed batches and log-probabilities."""
