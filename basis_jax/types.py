"""The types that the parts of a training step pass to each other.

Axes: N rollouts, B prompts, G rollouts per prompt (N = B * G, a prompt's rollouts adjacent),
P prompt positions, T positions (prompt then completion, padded on the right), M problems.
Entry t of every ``[N T]`` array is about token t.
"""

from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from basis_jax.pytree import pytree

AnyArray = Array | np.ndarray
"""An array on a device or on the host: prompts are made and rollouts verified on the host."""


@pytree
class Prompts:
    """Tokenised prompts, padded on the right. Positions beyond ``lengths`` are ignored.

    With ``begun``, the last ``begun`` tokens of a row are the beginning of its completion, which
    the sampler continues. They count in the limit on new tokens, and P is then the width of a
    prompt and its whole completion.
    """

    tokens: Int[AnyArray, "N P"]
    lengths: Int[AnyArray, " N"]
    problem_ids: Int[AnyArray, " N"]  # row of the problem in the data set, 0..M-1
    begun: Int[AnyArray, " N"] | None = None  # None: no row has begun

    @property
    def begun_lengths(self) -> Int[AnyArray, " N"]:
        """``begun``, or 0 for every row."""
        return self.lengths * 0 if self.begun is None else self.begun

    def row_length(self, new_tokens: int) -> int:
        """T, the width of the rollouts, with at most ``new_tokens`` tokens in a completion."""
        return self.tokens.shape[1] + (new_tokens if self.begun is None else 0)


@pytree
class Rollouts:
    """Prompts followed by their completions, which begin at token ``prompt_lengths``."""

    tokens: Int[AnyArray, "N T"]
    prompt_lengths: Int[AnyArray, " N"]
    completion_lengths: Int[AnyArray, " N"]  # sampled tokens, including the EOS
    sampler_logprobs: Float[AnyArray, "N T"]  # 0 outside the completion
    score_norms: Float[AnyArray, " N"]  # sum over the completion of |onehot - p|^2: see draw
    terminated: Bool[AnyArray, " N"]  # True: ended with an EOS; False: cut at the length limit
    problem_ids: Int[AnyArray, " N"]


@pytree
class Signals:
    """Everything that an estimator sees of a batch of rollouts."""

    rewards: Float[Array, " N"]
    valid: Bool[Array, " N"]  # False: the verifier failed; ignore the row
    problem_ids: Int[Array, " N"]
    lengths: Int[Array, " N"]  # completion tokens
    score_norms: Float[Array, " N"] | None = None  # like |gradient of log p(completion)|^2
    logprob_sum: Float[Array, " N"] | None = None  # log p(completion), as it was sampled
    start_values: Float[Array, " N"] | None = None  # values of the prompts, by a critic or plan
    greedy_rewards: Float[Array, " N"] | None = None  # of the prompt's greedy completion, or NaN


@pytree
class Estimate:
    """The result of an estimator. ``advantages`` are rewards - baselines, up to normalisation."""

    advantages: Float[Array, " N"]
    values: Float[Array, " N"]  # estimates of the expected reward
    baselines: Float[Array, " N"]  # what was subtracted; most estimators subtract the values
    info: dict[str, Shaped[Array, "..."]]


@pytree
class Measurement:
    """Unbiased estimates of sums over an update's rollouts: see ``estimators.measured``. w is the
    squared norm of a rollout's gradient in the optimizer's metric."""

    product: Float[Array, ""]  # sum w (r - b)
    square: Float[Array, ""]  # sum w


@pytree
class Batch:
    """One microbatch. Its ``loss_weights`` include the loss's denominators for the whole update."""

    tokens: Int[AnyArray, "N T"]
    completion_mask: Bool[AnyArray, "N T"]
    loss_weights: Float[AnyArray, "N T"]
    advantages: Float[AnyArray, " N"] | Float[AnyArray, "N T"]
    old_logprobs: Float[AnyArray, "N T"] | None  # None: strictly on-policy, old = current
    sampler_logprobs: Float[AnyArray, "N T"]
    ref_logprobs: Float[AnyArray, "N T"] | None = None  # None: no reference
    rows: Int[AnyArray, " N"] | None = None  # numbers of the rollouts in their update
    row_offsets: Float[Array, " N"] | None = None  # added to the residuals of a regression
    ais_alpha: Float[Array, ""] | None = None  # of the whole update
    returns: Float[AnyArray, "N T"] | None = None  # what a critic's values are fitted to
    old_values: Float[AnyArray, "N T"] | None = None  # a critic's values before the step


@pytree
class TokenCredit:
    """What is learnt from every token of a step, if it is not one number per rollout: made by a
    critic, or by a rollout plan that samples from the middle of completions."""

    advantages: Float[AnyArray, "N T"]
    start_values: Float[AnyArray, " N"]  # of the prompts
    returns: Float[AnyArray, "N T"] | None = None  # what a critic's values are fitted to
    values: Float[AnyArray, "N T"] | None = None  # of a critic


@pytree
class TrainState:
    """Everything that a step changes, and the frozen parameters.

    A checkpoint holds the former, so that training continues bit for bit. The frozen parameters are
    in the model's folder.
    """

    step: Int[Array, ""]
    params: Any  # the trained parameters: all, or the adapters
    opt_state: Any
    estimator_state: Any
    frozen: Any = None  # the base model's, if adapters are trained
    critic: Any = None  # the value head and its moments: see training.critic
