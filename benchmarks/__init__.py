"""Speed and memory, compared with a plain implementation and with TRL. Each has one command; see docs/speed.md."""
