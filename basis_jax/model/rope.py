"""Scaled rotary embeddings, for texts longer than those that a model was trained on.

A frequency is the rotation of one pair of features from one position to the next, in radians. It is
theta^(-2i/d) for pair i of a head of size d. A scaling changes the frequencies (``scale``) and
multiplies sine and cosine by ``amplitude``. The formulas and their options are those of
transformers' ``modeling_rope_utils``.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling (config.json ``rope_type: llama3``).

    Wavelengths above original/low_freq are divided by ``factor``, those below original/high_freq
    are kept, and between them the two are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int
    amplitude: ClassVar[float] = 1.0

    def scale(self, frequency: Float[Array, " half"], theta: float) -> Float[Array, " half"]:
        turns = self.original_max_positions * frequency / (2 * math.pi)
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth = jnp.clip(smooth, 0.0, 1.0)
        return (1 - smooth) * frequency / self.factor + smooth * frequency


@dataclass(frozen=True)
class LinearScaling:
    """Every frequency divided by ``factor`` (``rope_type: linear``; Chen et al. 2023,
    arXiv 2306.15595, eq. 4)."""

    factor: float
    amplitude: ClassVar[float] = 1.0

    def scale(self, frequency: Float[Array, " half"], theta: float) -> Float[Array, " half"]:
        return frequency / self.factor


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (``rope_type: yarn``; Peng et al. 2023, arXiv 2309.00071, section 3).

    f_i' = (1 - g_i) f_i / factor + g_i f_i. g_i is 1 for pairs that turn more than ``beta_fast``
    times within the original length L, and 0 for pairs that turn less than ``beta_slow`` times.
    Between them the paper's g falls linearly in the number of turns. We follow the authors' code
    and transformers, where g falls linearly in i, between the pairs
    i(turns) = d ln(L / (2 pi turns)) / (2 ln theta), rounded outwards with ``truncate``.
    ``amplitude`` is by default the paper's sqrt(1/t) = 0.1 ln(factor) + 1 (eq. 22). It multiplies
    queries and keys, so scores are multiplied by its square.
    """

    factor: float
    original_max_positions: int
    amplitude: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def scale(self, frequency: Float[Array, " half"], theta: float) -> Float[Array, " half"]:
        first, last = (self.pair(b, frequency, theta) for b in (self.beta_fast, self.beta_slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * frequency.shape[0] - 1)
        pairs = jnp.arange(frequency.shape[0], dtype=jnp.float32)
        kept = 1 - jnp.clip((pairs - first) / (last - first or 0.001), 0.0, 1.0)
        return (1 - kept) * frequency / self.factor + kept * frequency

    def pair(self, turns: float, frequency: Float[Array, " half"], theta: float) -> float:
        """The pair, as a real number, that turns ``turns`` times within the original length."""
        ratio = self.original_max_positions / (2 * math.pi * turns)
        return frequency.shape[0] * math.log(ratio) / math.log(theta)
