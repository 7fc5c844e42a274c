"""Benchmarks: speed and memory compared with other libraries; RESULTS.md has the results."""
