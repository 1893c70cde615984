"""Code of methods that cannot be composed of the shared parts alone. No other code imports it."""
