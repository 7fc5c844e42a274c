"""Does the method with less gradient noise end higher? Both studies side by side, by rank.

    python -m studies.noise_and_accuracy

For each regime of the policy study: the rollouts that a method needs in AdamW's metric, at the
start of training, relative to the best method (results/gradient_study.json), beside the final
accuracy at temperature 1 of the policy that it trained with AdamW (results/policy_study.json), and
Spearman's rank correlation of the two. BASIS has a table of 8 in training and one of 16 in the
gradient study.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import spearmanr

from basis_jax import command_line

ROWS = {  # method of the policy study: estimator, table and group size in the gradient study
    "none": ("none", 0, 1),
    "batch_mean": ("batch mean", 0, 1),
    "reinforce_pp": ("REINFORCE++", 0, 1),
    "value_filter": ("value_filter", 0, 1),
    "basis": ("basis", 16, 1),
    "weighted_mean": ("weighted_mean", 0, 1),
    "least_variance": ("least_variance value_filter", 0, 1),
    "measured_mean": ("measured_mean", 0, 1),
    "grpo_8": ("grpo", 0, 8),
    "otb_8": ("otb", 0, 8),
}


class Both(NamedTuple):
    noise: dict[str, float]
    accuracy: dict[str, float]
    correlation: float


def both(gradients: Mapping[str, Any], policies: Mapping[str, Any]) -> dict[str, Both]:
    """By regime, what the two reports say of every method that both have."""
    parts = {part["name"]: part for part in gradients["parts"]}
    found = {}
    for regime, trained in policies["regimes"].items():
        rows = {
            (row["method"], row["n"], row["G"]): row["first adamw"]["to_best"][0]
            for row in reversed(parts[regime]["rows"])  # the first of a method: free score norms
        }
        methods = [m for m in ROWS if "mean" in trained["methods"].get(m, {})]
        noise = {m: rows[ROWS[m]] for m in methods}
        accuracy = {m: trained["methods"][m]["mean"]["accuracy"]["mean"] for m in methods}
        ranked = spearmanr(list(noise.values()), list(accuracy.values()))
        found[regime] = Both(noise, accuracy, float(ranked.statistic))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gradients", type=Path, default=Path("results/gradient_study.json"))
    parser.add_argument("--policies", type=Path, default=Path("results/policy_study.json"))
    given = parser.parse_args()
    reports = (json.loads(path.read_text()) for path in (given.gradients, given.policies))
    for regime, (noise, accuracy, correlation) in both(*reports).items():
        print(f"{regime}: rank correlation {correlation:.2f}")
        for method in sorted(noise, key=lambda m: noise[m]):
            print(f"    {method:16}{noise[method]:6.2f}{accuracy[method]:8.1%}")


if __name__ == "__main__":
    command_line.run(main)
