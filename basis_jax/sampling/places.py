"""Assign rows to slots, on the host, for each device separately."""

from collections.abc import Iterator

import numpy as np


def round_robin(free: np.ndarray, per_device: int) -> np.ndarray:
    """The free slots, taking one from each device in turn; a device has ``per_device`` slots."""
    device = free // per_device
    return free[np.lexsort((device, rank_on_device(device)))]


def rank_on_device(device: np.ndarray) -> np.ndarray:
    """Rank of each slot among the slots of its device."""
    order = np.argsort(device, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size) - np.searchsorted(device[order], device[order])
    return rank


def prefill_groups(
    new: np.ndarray, free: np.ndarray, size: int, shards: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (rows to prefill [shards x count], their slots on each device [shards, count]).

    A prefill has as many rows as a quarter of the slots, which bounds its memory, or an eighth, if
    only a few slots are free. Missing rows are copies of a new row; their slot number is beyond the
    last slot, so they are discarded.
    """
    per_device = size // shards
    max_rows = -(-per_device // 4)
    device, within = free // per_device, free % per_device
    rank = rank_on_device(device)
    for start in range(0, int(rank.max(initial=-1)) + 1, max_rows):
        in_group = (rank >= start) & (rank < start + max_rows)
        needed = int(rank[in_group].max()) + 1 - start
        count = max_rows if needed > -(-max_rows // 2) else -(-max_rows // 2)
        index = np.full((shards, count), new[in_group][0])
        into = np.full((shards, count), per_device)
        index[device[in_group], rank[in_group] - start] = new[in_group]
        into[device[in_group], rank[in_group] - start] = within[in_group]
        yield index.ravel(), into.astype(np.int32)
