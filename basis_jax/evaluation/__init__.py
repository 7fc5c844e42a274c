"""Held-out accuracy: scores and intervals, completions on disk, the report."""
