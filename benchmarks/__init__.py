"""Benchmarks of speed, memory and methods. Each is one command; see benchmarks/README.md."""
