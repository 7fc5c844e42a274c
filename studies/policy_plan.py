"""What the policy study does, fixed before its test seeds are run: regimes, methods, rates, seeds.

The endpoint is the accuracy of the last policy at temperature 1, over SAMPLES completions of every
held-out problem. A step has ROLLOUTS rollouts whatever the method (a group of 8 takes an eighth of
the prompts) and is one optimizer update. All methods generate the same number of rollouts, those of
an offline table included: without a table they take EXTRA_STEPS more steps.

The learning rate is tuned for every method in every regime by successive halving over seeds: one
tuning seed at each rate of POWERS, a second one for the better half, and the best mean of both
wins. Where that is the lowest or the highest rate, the next one beyond is added, at most WIDER
times on a side. The test seeds are run at the best rate alone: SEEDS of them, then more until the
half-width of the 95 % interval of the difference to REFERENCE, paired by seed, is below HALF_WIDTH,
or there are MOST_SEEDS.

Changed after ``free`` and most of the tuning of ``single`` had been seen, before any run that it
concerns: ``guess`` and ``hard`` have six methods, and their tuning starts from FEWER_POWERS, the
three rates among which all methods had their best one so far. SGD is also run without a baseline
and with ``measured_mean``: in its metric the gradient study says that training without a baseline
needs twice the rollouts of the value on ``free``, so that here it should fall behind. The score
norms that cost nothing ("natural") are left to the gradient study.

Added when the embedded regimes were finished, before any of its own runs: ``smollm2``, sums as text
for SmolLM2-135M with three methods (configs/smollm2_arithmetic.py says how to get the weights). A
prompt has one right completion of a few tokens there, as in ``single``, so training without a
baseline and with ``measured_mean`` should end above ``value_filter`` at temperature 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from basis_jax import command_line
from basis_jax.config import Config
from studies.policy_statistics import half_width

STEPS, EXTRA_STEPS = 48, 16
ROLLOUTS, PROBLEMS, TABLE_SAMPLES = 128, 256, 8  # 8 x 256 = 16 x 128 offline rollouts
POWERS, WIDER = (-10, -9, -8, -7, -6), 2  # rates of 10^(power / 2)
FEWER_POWERS = {"guess": (-8, -7, -6), "hard": (-8, -7, -6), "smollm2": (-11, -10, -9)}
TUNING_SEEDS = (100, 101)
SEEDS, MOST_SEEDS, HALF_WIDTH = 5, 10, 0.01
SAMPLES = 16
REFERENCE = "value_filter"  # of the paired differences
EMBEDDED = ("free", "single", "guess", "hard")
"""Tasks of ``embedded:steps``, in the order in which they are run; ``free`` is the primary one."""
REGIMES = (*EMBEDDED, "smollm2")


class Method(NamedTuple):
    """An estimator with its published defaults, and what it is given."""

    estimator: str
    table: int = 0  # offline rollouts a problem
    group_size: int = 1
    settings: tuple[tuple[str, Any], ...] = ()
    rate: float = 1.0  # times the learning rate
    regimes: tuple[str, ...] = EMBEDDED


FIRST_TWO = ("free", "single")
SGD = Method(
    "",
    settings=(("optim.b1", 0), ("optim.b2", 0), ("optim.eps", 1)),  # g / (|g| + 1), nearly g
    rate=3e3,
    regimes=("free",),
)
METHODS = {
    "none": Method("reinforce", regimes=REGIMES),
    "batch_mean": Method("batch_mean", regimes=FIRST_TWO),
    "reinforce_pp": Method("reinforce_pp"),
    "value_filter": Method("value_filter", regimes=REGIMES),
    "basis": Method("basis", table=TABLE_SAMPLES),
    "weighted_mean": Method("weighted_mean", regimes=FIRST_TWO),
    "least_variance": Method("value_filter+least_variance", regimes=FIRST_TWO),
    "measured_mean": Method("measured_mean", regimes=REGIMES),
    "grpo_8": Method("grpo", group_size=8),
    "otb_8": Method("otb", group_size=8, regimes=("free",)),
    "none_sgd": SGD._replace(estimator="reinforce"),
    "batch_mean_sgd": SGD._replace(estimator="batch_mean"),
    "least_variance_sgd": SGD._replace(estimator="value_filter+least_variance"),
    "measured_mean_sgd": SGD._replace(estimator="measured_mean"),
}

COMMON: dict[str, Any] = {
    "optim.schedule": "constant",  # a curve may be cut anywhere: no step knows the last one
    "optim.max-grad-norm": 0,
    "loss.kl-coef": 1e-9,  # no force; ``policy/kl_ref`` is then measured
    "data.size": PROBLEMS,
    "train.minibatch-rollouts": ROLLOUTS,
    "train.microbatch-rollouts": ROLLOUTS,
    "train.sample-rollouts": 320,
    "eval.samples": 4,
    "eval.every": 8,
    "checkpoint.every": 100_000,  # the last step only
    "train.patience": 1000,  # a policy that collapses is a result, not an error
}
OWN = {  # what a regime has of its own
    "smollm2": {"eval.size": 320, "train.microbatch-rollouts": 32},
}


@dataclass(frozen=True, order=True)
class Job:
    """One run of the study."""

    regime: str
    method: str
    power: int
    seed: int

    @property
    def rate(self) -> float:
        return METHODS[self.method].rate * 10 ** (self.power / 2)

    @property
    def tuning(self) -> bool:
        return self.seed in TUNING_SEEDS

    @property
    def name(self) -> str:
        """Its folder, below that of the study."""
        return f"{self.regime}/{self.method}/lr_{self.rate:.2e}/seed_{self.seed}"


def arguments(job: Job, out: str, overrides: Sequence[str] = ()) -> list[str]:
    """Of ``basis-jax train``: the whole run."""
    method, embedded = METHODS[job.method], job.regime in EMBEDDED
    task = f"task:steps/{job.regime}" if embedded else "task:arithmetic"
    given = {
        **COMMON,
        **OWN.get(job.regime, {}),
        "data.path": task,
        "eval.sets": task,
        "train.steps": STEPS + (0 if method.table else EXTRA_STEPS),
        "train.prompts-per-step": ROLLOUTS // method.group_size,
        "sampling.group-size": method.group_size,
        "estimator.name": method.estimator,
        "estimator.table-samples": method.table,
        **dict(method.settings),
        "optim.lr": f"{job.rate:.4g}",
        "seed": job.seed,
        "run-dir": f"{out}/{job.name}",
        "eval.every": 0 if job.tuning else COMMON["eval.every"],
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return ["--config", "steps" if embedded else "smollm2_arithmetic", *words, *overrides]


def config_of(job: Job, out: str, overrides: Sequence[str] = ()) -> Config:
    return command_line.parse(__doc__, argv=arguments(job, out, overrides))[0]


# ------------------------------------------------------------------------------ what is left to do
Found = Mapping[tuple[int, int], float]
"""Accuracies of the finished runs of a method in a regime, by (power, seed)."""


def powers_of(regime: str) -> Sequence[int]:
    """The rates with which the tuning of a regime starts."""
    return FEWER_POWERS.get(regime, POWERS)


def tuning(
    found: Found, first_powers: Sequence[int] = POWERS
) -> tuple[int | None, list[tuple[int, int]]]:
    """(the best power, nothing), or (None, the runs that are missing to know it)."""
    first, second = TUNING_SEEDS
    powers = list(first_powers)
    while True:
        missing = [(p, first) for p in powers if (p, first) not in found]
        if missing:
            return None, missing
        better = sorted(powers, key=lambda p: -found[p, first])[: (len(first_powers) + 1) // 2]
        missing = [(p, second) for p in better if (p, second) not in found]
        if missing:
            return None, missing
        best = max(better, key=lambda p: found[p, first] + found[p, second])
        if best == powers[0] and best > first_powers[0] - WIDER:
            powers.insert(0, best - 1)
        elif best == powers[-1] and best < first_powers[-1] + WIDER:
            powers.append(best + 1)
        else:
            return best, []


def testing(regime: str, found: Mapping[str, Found], best: Mapping[str, int]) -> list[Job]:
    """The test runs of a regime that are missing, for the methods whose best power is known."""
    wanted = dict.fromkeys(best, SEEDS)
    for method in best.keys() - {REFERENCE}:
        pairs = [
            (found[method][best[method], seed], found[REFERENCE][best[REFERENCE], seed])
            for seed in range(MOST_SEEDS)
            if REFERENCE in best
            and (best[method], seed) in found[method]
            and (best[REFERENCE], seed) in found[REFERENCE]
        ]
        if len(pairs) >= SEEDS and half_width(np.subtract(*zip(*pairs, strict=True))) > HALF_WIDTH:
            wanted[method] = min(len(pairs) + 1, MOST_SEEDS)
    if REFERENCE in best:
        wanted[REFERENCE] = max(wanted.values())
    return [
        Job(regime, method, best[method], seed)
        for method in METHODS
        for seed in range(wanted.get(method, 0))
        if (best[method], seed) not in found[method]
    ]


def jobs_of(regime: str, found: Mapping[str, Found]) -> list[Job]:
    """All runs of a regime that can be started now: tuning first, and last the methods that are
    tried in one regime only."""
    methods = [name for name, method in METHODS.items() if regime in method.regimes]
    tuned = {method: tuning(found[method], powers_of(regime)) for method in methods}
    missing = [Job(regime, m, p, seed) for m in methods for p, seed in tuned[m][1]]
    best = {method: power for method, (power, _) in tuned.items() if power is not None}
    jobs = missing + testing(regime, found, best)
    return sorted(jobs, key=lambda job: METHODS[job.method].regimes == ("free",))
