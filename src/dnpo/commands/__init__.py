"""The commands. Each composes its settings, builds the parts and runs them."""
