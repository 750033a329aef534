"""Benchmarks: each writes a JSON to results/."""
