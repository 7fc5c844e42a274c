"""Benchmarks: speed and memory beside other libraries; RESULTS.md holds what they said."""
