"""Split a step's rollouts into the microbatches of its updates, by length."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from basis_jax.config import Config
from basis_jax.losses import loss_weights
from basis_jax.model.sharding import batch_shards, put_rows
from basis_jax.opening.checks import rollouts_per_pass
from basis_jax.sampling.refill import round_up
from basis_jax.sampling.rollouts import Graded, counted_tokens
from basis_jax.types import Batch, Estimate, TokenCredit


def updates_per_step(config: Config) -> int:
    """Number of optimizer updates that the rollouts of one step are split into."""
    rollouts = config.train.prompts_per_step * config.sampling.group_size
    return rollouts // config.train.minibatch_rollouts


def make_batches(
    graded: Graded,
    estimate: Estimate,
    *,
    config: Config,
    score: Callable[[PyTree, Array, Array], Array],
    params: PyTree,
    reference: PyTree | None = None,
    credit: TokenCredit | None = None,
    mesh: Mesh,
) -> list[list[Batch]]:
    """The microbatches of every optimizer update, rows split over the mesh.

    An update takes the next ``train.minibatch_rollouts`` rollouts; ``cut_rows`` sorts them by
    length. The loss weights are those of the whole update, times the plan's weights, which do not
    enter the denominators. With one update per step the policy is still the one that sampled, so
    ``old_logprobs`` need no pass of their own. With several updates all rollouts are scored before
    the first one. ``reference``: the parameters of the reference policy, where
    ``loss.needs_reference``. ``credit``: its advantages stand in place of the estimate's.
    """
    rollouts, rows = graded.rollouts, config.train.minibatch_rollouts
    max_width = rollouts.tokens.shape[1]
    lengths = np.where(graded.valid, rollouts.prompt_lengths + rollouts.completion_lengths, 0)
    mask = counted_tokens(graded)
    off_policy, learnt = updates_per_step(config) > 1, what_is_learnt(estimate, credit)
    updates = []
    for start in range(0, len(graded.valid), rows):
        weights = loss_weights(
            mask[start : start + rows],
            config.loss.aggregation,
            max_length=config.sampling.max_new_tokens,
        )
        if graded.weights is not None:
            weights = weights * graded.weights[start : start + rows, None]
        minibatch = Batch(
            tokens=rollouts.tokens[start : start + rows],
            completion_mask=np.asarray(mask[start : start + rows]),
            loss_weights=np.asarray(weights),
            old_logprobs=None,
            sampler_logprobs=rollouts.sampler_logprobs[start : start + rows],
            rows=np.arange(len(weights), dtype=np.int32),
            **{name: x[start : start + rows] for name, x in learnt.items()},
        )
        micros = []
        for index, width in cut_rows(
            lengths[start : start + rows],
            rows=rollouts_per_pass(config.train, batch_shards(mesh)),
            max_width=max_width,
        ):
            part = put_rows(mesh, take_rows(minibatch, index, width))
            scored = (part.tokens, part.completion_mask)
            old = score(params, *scored) if off_policy else None
            ref = None if reference is None else score(reference, *scored)
            micros.append(replace(part, old_logprobs=old, ref_logprobs=ref))
        updates.append(micros)
    return updates


def what_is_learnt(estimate: Estimate, credit: TokenCredit | None) -> dict[str, Any]:
    """The fields of a ``Batch`` that say what is learnt from every row or token."""
    if credit is None:
        return {"advantages": np.asarray(estimate.advantages)}
    of_critic = {"returns": credit.returns, "old_values": credit.values}
    return {"advantages": credit.advantages} | {k: x for k, x in of_critic.items() if x is not None}


def take_rows(batch: Batch, index: np.ndarray, width: int) -> Batch:
    """The given rows of the batch's host arrays, cut to the first ``width`` positions."""
    return jax.tree.map(lambda x: x[index, :width] if x.ndim == 2 else x[index], batch)


def cut_rows(
    lengths: np.ndarray, *, rows: int, max_width: int, min_width: int = 64
) -> list[tuple[np.ndarray, int]]:
    """(row numbers, width) of every microbatch of an update, the longest rows first.

    The possible widths are ``min_width`` 2^k times 1, 1.25, 1.5 or 1.75, at most ``max_width``. A
    microbatch gets the smallest one that holds its longest row. At full width it has ``rows`` rows.
    A narrower one has ``rows`` 2^k rows, with the largest k that keeps its positions at or below
    ``rows`` x ``max_width``, so a pass never needs more memory than at full width. A microbatch is
    halved while its shorter half fits into half the width. Rows of length 0 contribute nothing:
    they come last, and a microbatch with only such rows is left out.

    Every device has the same number of rows of the same width, so none waits for another. There are
    four widths per doubling: 37 up to 32,768 tokens, about 12 in a step and 36 in a run. Each
    (rows, width) is compiled when it first occurs.
    """
    order = np.argsort(-lengths, kind="stable")
    cuts: list[tuple[np.ndarray, int]] = []
    start = 0
    while start < len(order) and (not cuts or lengths[order[start]] > 0):
        longest = max(1, int(lengths[order[start]]))
        width = min(max_width, *(round_up(longest, min_width * part // 4) for part in (4, 5, 6, 7)))
        max_multiple = min(max_width // width, (len(order) - start) // rows)
        count = rows * 2 ** (max_multiple.bit_length() - 1)
        while count > rows and 2 * lengths[order[start + count // 2]] <= width:
            count //= 2
        cuts.append((order[start : start + count], width))
        start += count
    return cuts
