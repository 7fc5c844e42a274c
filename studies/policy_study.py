"""Which estimator teaches fastest: held-out accuracy at equal generated rollouts, in four regimes.

    python -m studies.policy_study --out runs/policy_study --workers 2
    python -m studies.policy_study --regimes smollm2 --out runs/policy_study --workers 2

Methods, endpoint, learning rates and seeds stand in ``policy_plan``, which was committed before the
test seeds were run. The command runs what is missing in OUT, in as many processes as --workers
says, each on cores of its own, and writes --report.json and .png; the same command again goes on
where a killed one stopped. ``--known results/policy_study.json`` takes the runs of an earlier
report as finished, and the new report holds them too: so the study goes on without their folders.
``--only-report`` runs nothing. Other options override the config of every run (``--eval.size 40``).

- accuracy: of the last policy, at temperature 1, over 16 completions of each held-out problem;
- equal steps: the accuracy curve at the last step of the methods with an offline table;
- KL: mean per token of the step's rollouts against the policy before training (k3);
- sharpening: the policy before training at its best temperature, what rescaling its logits gives;
- intervals: 95 % Student t over seeds, for these held-out problems; differences are paired by seed
  (same data order, same evaluation noise) and not corrected for their number.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from basis_jax import command_line
from basis_jax.files import replace_file
from studies import policy_report
from studies.policy_plan import EMBEDDED, REGIMES, Job, config_of
from studies.policy_runs import Reported, measure, work


def main() -> None:
    options, overrides = parse()
    earlier = json.loads(Path(options.known).read_text()) if options.known else None
    known: Mapping[str, Reported] = earlier["regimes"] if earlier else {}
    if not options.only_report:
        run_workers(options, overrides, known)
    if not options.worker:
        start_measured(options.out, [r for r in options.regimes if r not in known], overrides)
        policy_report.write(options.out, options.regimes, Path(options.report), earlier)


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The study's own options, and the rest: overrides of every run's config."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind, allow_abbrev=False)
    parser.add_argument("--out", default="runs/policy_study", help="folder of the runs")
    parser.add_argument("--report", default="results/policy_study", help="the .json and the .png")
    parser.add_argument("--known", default="", help="a report whose runs are not run again")
    parser.add_argument("--regimes", nargs="+", default=list(EMBEDDED), choices=list(REGIMES))
    parser.add_argument("--workers", type=int, default=1, help="processes side by side")
    parser.add_argument("--only-report", action="store_true", help="run nothing")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_known_args(argv)


def run_workers(
    options: argparse.Namespace, overrides: Sequence[str], known: Mapping[str, Reported]
) -> None:
    """Work in this process, or in ``--workers`` processes that share the cores evenly."""
    if options.workers < 2:
        report = functools.partial(print, flush=True)
        work(options.out, options.regimes, overrides, report, known=known)
        return
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    command = [sys.executable, "-m", "studies.policy_study", *sys.argv[1:], "--worker"]
    workers = []
    for number in range(options.workers):
        own = cores[number :: options.workers]
        workers.append(
            subprocess.Popen(
                [*command, "--workers", "1"],
                env=environment(options.out),
                preexec_fn=(lambda own=own: os.sched_setaffinity(0, own)) if own else None,
            )
        )
    if any([worker.wait() for worker in workers]):
        sys.exit("error: a worker failed; its last lines say why, and the same command goes on")


def environment(out: str) -> dict[str, str]:
    """Ours, with compiled programs kept between the runs: same programs, same numbers."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(Path(out).resolve() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return cache | os.environ


def start_measured(out: str, regimes: Sequence[str], overrides: Sequence[str]) -> None:
    """The policy before training, in every regime: OUT/REGIME/start.json."""
    for regime in regimes:
        path = Path(out, regime, "start.json")
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            config = config_of(Job(regime, "none", 0, 0), out, overrides)
            replace_file(path, json.dumps(measure(config, None)) + "\n")


if __name__ == "__main__":
    command_line.run(main)
