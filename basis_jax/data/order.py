"""The order in which a run visits its problems."""

import numpy as np
from jaxtyping import Int32


def batch_indices(
    seed: int, step: int, *, batch_size: int, size: int
) -> Int32[np.ndarray, " {batch_size}"]:
    """Rows of the problems of step ``step`` (from 0), a function of its arguments.

    Epoch e visits the permutation of generator (seed, e) in size // batch_size batches, the rest of
    it unused, so no batch holds a problem twice and the position in the data is one integer.
    Raises ValueError where a batch is larger than the data set.
    """
    if not 1 <= batch_size <= size:
        raise ValueError(
            f"train.prompts_per_step is {batch_size} but there are {size} training problems; "
            "choose at most that many"
        )
    epoch, batch = divmod(step, size // batch_size)
    order = np.random.default_rng([seed, epoch]).permutation(size)
    return order[batch * batch_size : (batch + 1) * batch_size].astype(np.int32)
