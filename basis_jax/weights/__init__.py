"""Weights from files and into files: Hugging Face folders, GGUF, checkpoints of a run."""
