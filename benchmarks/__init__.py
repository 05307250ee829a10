"""Benchmarks of ModularBase against llama.cpp, run by ``python -m benchmarks``."""
