"""The files in a run folder: identity, metrics, checkpoints, curves."""
