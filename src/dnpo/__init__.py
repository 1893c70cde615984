"""A laboratory for LLM self-improvement with synthetic preference data."""

__version__ = "0.1.0"
