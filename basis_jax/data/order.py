"""The order in which a run visits its problems."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32


def prompts_by_set(weights: Sequence[float], total: int) -> list[int]:
    """How many of a step's prompts come from each set: in proportion to the weights, with the
    largest remainders rounded up. Raises ValueError if a set gets none."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: (counts[k] - exact[k], k))
    for k in by_remainder[: total - sum(counts)]:
        counts[k] += 1
    if 0 in counts:
        raise ValueError(
            f"train.prompts_per_step is {total} and data.more_sets leaves a set no prompt of a "
            f"step (weights {', '.join(f'{weight:g}' for weight in weights)}); raise "
            "train.prompts_per_step or the smallest weight"
        )
    return counts


def step_problems(
    seed: int, step: int, *, batch_size: int, sizes: Sequence[int], weights: Sequence[float]
) -> Int32[np.ndarray, " {batch_size}"]:
    """Rows of the problems of step ``step``, from sets that follow one another. Each set has an
    order of its own (``batch_indices``), and the step mixes them.

    Raises ValueError as ``batch_indices`` and ``prompts_by_set``.
    """
    if len(sizes) == 1:
        return batch_indices(seed, step, batch_size=batch_size, size=sizes[0])
    counts = prompts_by_set(weights, batch_size)
    starts = np.cumsum([0, *sizes[:-1]])
    rows = [
        start + batch_indices(seed, step, batch_size=count, size=size, number=k)
        for k, (start, count, size) in enumerate(zip(starts, counts, sizes, strict=True))
    ]
    mixed = np.random.default_rng([seed, step, len(sizes), 1]).permutation(np.concatenate(rows))
    return mixed.astype(np.int32)


def batch_indices(
    seed: int, step: int, *, batch_size: int, size: int, number: int = 0
) -> Int32[np.ndarray, " {batch_size}"]:
    """Rows of the problems of step ``step`` (from 0). They depend on the arguments only.

    Epoch e visits the permutation of generator (seed, e) in size // batch_size batches; the rest of
    the permutation is not used. So no batch holds a problem twice, and the position in the data is
    one integer. ``number`` is that of the set, from 0; sets have different orders. Raises
    ValueError if a batch is larger than the data set.
    """
    if not 1 <= batch_size <= size:
        raise ValueError(
            f"train.prompts_per_step is {batch_size} but there are {size} training problems"
            f"{f' in set {number + 1}' if number else ''}; choose at most that many"
        )
    epoch, batch = divmod(step, size // batch_size)
    of_set = [number] if number else []
    order = np.random.default_rng([seed, epoch, *of_set]).permutation(size)
    return order[batch * batch_size : (batch + 1) * batch_size].astype(np.int32)
