"""One process of several, as tests start it: ``one_of_several.py WHAT PORT PROCESSES NUMBER ...``.

What it found out is its last line of output, as JSON.
"""

import json
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np

from basis_jax import command_line, processes
from basis_jax.verify.verdicts import RIGHT, Verifier, verdict_of

SILENCE_S = 12.0  # in place of 30


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
        "differs": lambda: processes.check_same(lambda: {"b": me, "a": 7, "c": [me]}),
    }.items():
        try:
            work()
        except ValueError as error:
            found[name] = str(error)
        except ArithmeticError as error:
            found[name] = f"ZeroDivisionError: {error}"
    return found


def split_params(mesh):
    import tiny

    from basis_jax.model import decoder
    from basis_jax.model.sharding import named_tree

    def put(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])

    layout = named_tree(mesh, decoder.param_axes(tiny.TINY))
    return jax.tree.map(put, tiny.params(), layout)


def exported():
    """Parameters that are split over both processes, written to the folder that is named."""
    import tiny

    from basis_jax.model.sharding import make_mesh
    from basis_jax.weights import huggingface

    params = split_params(make_mesh(data=1, fsdp=2, tensor=2))
    folder = huggingface.save_params(params, tiny.TINY, sys.argv[5])
    return sorted(path.name for path in folder.iterdir())


def sampled():
    """Completions through slots that are refilled, with parameters split over all devices."""
    import tiny

    from basis_jax.config import SamplingSection
    from basis_jax.model.sharding import make_mesh
    from basis_jax.sampling.draw import row_keys
    from basis_jax.sampling.refill import sample_rows

    mesh, prompts = make_mesh(data=1, fsdp=2, tensor=2), tiny.prompts(7)
    with jax.set_mesh(mesh):
        ids = jnp.arange(7, dtype=jnp.int32)
        rollouts = sample_rows(
            split_params(mesh),
            tiny.TINY,
            jax.tree.map(np.asarray, prompts),
            sampling=SamplingSection(max_new_tokens=40),
            eos_ids=(2, 3),
            keys=row_keys(0, "train", 0, problem_ids=ids, samples=ids),
            mesh=mesh,
            rows_at_once=4,
        )
    fields = ("tokens", "completion_lengths", "terminated")
    found = {field: getattr(rollouts, field).tolist() for field in fields}
    return found | {"logprobs": rollouts.sampler_logprobs.tolist()}


class OneTimesOut(Verifier):
    """A verifier that runs into its limit in process 1 alone; there it ``breaks`` for some."""

    def __init__(self, breaks=False):
        self.breaks = breaks

    def grade(self, texts, answers):
        if processes.is_first():
            return [RIGHT] * len(texts)
        if self.breaks:
            raise RuntimeError("the verifier is gone")
        return [verdict_of("timeout", "slow machine")] * len(texts)


class Numbers:
    """A tokenizer."""

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows]


def verdicts():
    """What a process makes of rollouts whose verifier does not say the same in both."""
    import tiny

    from basis_jax import estimators
    from basis_jax.config import SamplingSection
    from basis_jax.data.encoding import EncodedProblems
    from basis_jax.data.problem import Problem
    from basis_jax.model.sharding import make_mesh
    from basis_jax.sampling.rollouts import RolloutSetup, roll_out
    from basis_jax.training.update import make_estimate

    mesh, prompts = make_mesh(), tiny.prompts(6)
    problems = tuple(Problem(prompt=f"{i}", answer="0") for i in range(6))
    encoded = EncodedProblems(problems, *map(np.asarray, (prompts.tokens, prompts.lengths)), {})
    estimator = estimators.make("spo")
    with jax.set_mesh(mesh):
        zeros = np.zeros(6, np.int32)
        state = processes.put_everywhere(mesh, estimator.init(zeros, zeros))
        params = processes.put_everywhere(mesh, tiny.params())

        def grade(verifier):
            setup = RolloutSetup(tiny.TINY, mesh, Numbers(), (2,), verifier, 0, 8)
            every = {"ids": np.arange(6, dtype=np.int32), "samples": np.zeros(6, np.int32)}
            every |= {"sampling": SamplingSection(max_new_tokens=3), "stream": "train", "step": 0}
            return roll_out(params, setup, encoded, **every)

        graded = grade(OneTimesOut())
        state, estimate = processes.on_host(make_estimate(estimator)(state, graded))
        try:
            grade(OneTimesOut(breaks=True))
        except (RuntimeError, ValueError) as error:
            broken = str(error)
    return {
        "kinds": graded.kinds,
        "completions": graded.completions,
        "state": [leaf.tolist() for leaf in jax.tree.leaves(state)],
        "advantages": estimate.advantages.tolist(),
        "broken": broken.removeprefix("RuntimeError: "),
    }


def planned():
    """What a process samples whose plan, which is not pure, asks for another problem in each."""
    from basis_jax import estimators, plans
    from basis_jax.model.sharding import make_mesh
    from basis_jax.training.planned import next_round

    mesh, made = make_mesh(), estimators.make("spo")
    with jax.set_mesh(mesh):
        state = processes.put_everywhere(mesh, made.init(np.arange(6), np.full(6, 8)))
        values = processes.on_host(jax.jit(made.predict)(state))

    def ask(step, belief):
        return plans.of_problems(np.array([processes.index()]), 1)

    setting = plans.Setting(seed=0, prompts=1, group_size=1, sizes=(6,))
    asked = next_round(
        plans.Plan(ask), setting, 0, rounds=[], graded=[], belief=plans.Belief(values)
    )
    return {"problems": asked.problems.tolist(), "values": values.tolist()}


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
