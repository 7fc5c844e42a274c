"""BASIS in JAX: reinforcement learning for language models with one rollout per prompt."""

__version__ = "0.2.0"
