"""The commands: each composes its settings, builds the parts and runs them."""
