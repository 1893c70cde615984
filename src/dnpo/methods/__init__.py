"""Code of methods that need more than the parts: one small file for each method. No other code imports it."""
