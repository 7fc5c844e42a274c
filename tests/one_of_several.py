"""One process of several, as tests start it: ``one_of_several.py WHAT PORT PROCESSES NUMBER ...``.

What it found out is its last line of output, as JSON.
"""

import json
import os
import signal
import sys

import jax
import numpy as np

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from basis_jax import command_line, processes  # noqa: E402

SILENCE_S = 6.0  # in place of 30


def values():
    """Every function on values that differ between the processes."""
    from basis_jax.model.sharding import make_mesh, put_rows

    me = processes.index()
    rows = np.arange(24.0, dtype=np.float32).reshape(8, 3)
    split = put_rows(make_mesh(), rows)
    found = {
        "exchanged": processes.exchange(lambda: f"{me}" * (2000 * me + 1))[1][:3],
        "by_first": processes.by_first(lambda: {"text": "\ud800 first", "process": me}),
        "largest": processes.largest(me),
        "rows_here": sum(s.data.shape[0] for s in split.addressable_shards),
        "whole": processes.on_host(split).tolist() == rows.tolist(),
        "owned": processes.owned(np.arange(5)).tolist(),
    }
    for name, work in {
        "raised": lambda: processes.exchange(lambda: 1 // (1 - me)),
        "refused": lambda: processes.by_first(lambda: int("no number")),
        "differs": lambda: processes.check_same({"b": me, "a": 7, "c": [me]}),
    }.items():
        try:
            work()
        except ValueError as error:
            found[name] = str(error)
        except ArithmeticError as error:
            found[name] = f"ZeroDivisionError: {error}"
    return found


def failing():
    """Process 1 fails while process 0 waits for it."""
    if processes.index() == 1:
        raise ValueError("the model's folder is gone")
    processes.barrier()


def failing_first():
    if processes.is_first():
        raise ValueError("the model's folder is gone")
    processes.barrier()


def killed():
    processes.barrier()
    if processes.index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    processes.barrier()


def killed_first():
    processes.barrier()
    if processes.is_first():
        os.kill(os.getpid(), signal.SIGKILL)
    processes.barrier()


def main():
    what, port, number_of, number = sys.argv[1:5]
    with processes.joined(number_of, f"localhost:{port}", number, silence_s=SILENCE_S):
        print(json.dumps(globals()[what]()), flush=True)


if __name__ == "__main__":
    command_line.run(main)
