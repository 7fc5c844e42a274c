"""What travels between the parts of a training step.

Axes: N rollouts, B prompts, G rollouts per prompt (N = B * G, a prompt's rollouts adjacent),
P prompt positions, T positions (prompt then completion, padded on the right), M problems.
Every ``[N T]`` array is token-aligned: entry t says something about token t.
"""

from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from basis_jax.pytree import pytree

AnyArray = Array | np.ndarray
"""On a device or on the host: prompts come from the host, rollouts are verified there."""


@pytree
class Prompts:
    """Tokenised prompts, padded on the right; what stands beyond ``lengths`` is ignored."""

    tokens: Int[AnyArray, "N P"]
    lengths: Int[AnyArray, " N"]
    problem_ids: Int[AnyArray, " N"]  # row of the problem in the data set, 0..M-1


@pytree
class Rollouts:
    """Prompts with what the policy wrote after them, from token ``prompt_lengths`` on."""

    tokens: Int[AnyArray, "N T"]
    prompt_lengths: Int[AnyArray, " N"]
    completion_lengths: Int[AnyArray, " N"]  # sampled tokens, the EOS included
    sampler_logprobs: Float[AnyArray, "N T"]  # 0 outside the completion
    score_norms: Float[AnyArray, " N"]  # sum over the completion of |onehot - p|^2: see draw
    terminated: Bool[AnyArray, " N"]  # True: ended with an EOS; False: cut at the length limit
    problem_ids: Int[AnyArray, " N"]


@pytree
class Signals:
    """All that an estimator sees of a batch of rollouts."""

    rewards: Float[Array, " N"]
    valid: Bool[Array, " N"]  # False: the verifier failed; the row says nothing
    problem_ids: Int[Array, " N"]
    lengths: Int[Array, " N"]  # completion tokens
    score_norms: Float[Array, " N"] | None = None  # like |gradient of log p(completion)|^2
    logprob_sum: Float[Array, " N"] | None = None  # log p(completion), as it was sampled


@pytree
class Estimate:
    """What an estimator returns: ``advantages = rewards - baselines`` up to its normalisation."""

    advantages: Float[Array, " N"]
    values: Float[Array, " N"]  # estimates of the expected reward
    baselines: Float[Array, " N"]  # what was subtracted; most estimators subtract the values
    info: dict[str, Shaped[Array, "..."]]


@pytree
class Measurement:
    """Sums over an update's rollouts, with w the squared length of a rollout's gradient in the
    optimizer's metric, estimated without bias: see ``estimators.measured``."""

    product: Float[Array, ""]  # sum w (r - b)
    square: Float[Array, ""]  # sum w


@pytree
class Batch:
    """One microbatch. ``loss_weights`` carry every denominator of the loss, those of its update."""

    tokens: Int[AnyArray, "N T"]
    completion_mask: Bool[AnyArray, "N T"]
    loss_weights: Float[AnyArray, "N T"]
    advantages: Float[AnyArray, " N"]
    old_logprobs: Float[AnyArray, "N T"] | None  # None: strictly on-policy, old = current
    sampler_logprobs: Float[AnyArray, "N T"]
    ref_logprobs: Float[AnyArray, "N T"] | None = None  # None: no KL term
    rows: Int[AnyArray, " N"] | None = None  # numbers of the rollouts in their update


@pytree
class TrainState:
    """All that a step changes, which a checkpoint must hold for training to continue bit for bit,
    and the frozen parameters beside it, which the model's folder holds."""

    step: Int[Array, ""]
    params: Any  # those that are trained: all, or the adapters
    opt_state: Any
    estimator_state: Any
    frozen: Any = None  # the base model under adapters
