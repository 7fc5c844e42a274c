"""What a run keeps in its folder: identity, metrics, checkpoints, curves."""
