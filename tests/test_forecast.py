"""A forecast counts the work that a run does, by figures worked out by hand for a small shape."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from basis_jax import command_line
from basis_jax.commands import dry_run
from basis_jax.config import (
    Config,
    DataSection,
    EstimatorSection,
    LossSection,
    SamplingSection,
    TrainSection,
)
from basis_jax.model import costs
from basis_jax.model.chips import CHIPS, Chip
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.sharding import abstract_mesh
from basis_jax.opening.forecast import described, problem_count, step_bounds

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ModelConfig(
    architecture="llama",
    vocab_size=10,
    embed=4,
    layers=1,
    heads=1,
    kv_heads=1,
    head_dim=4,
    mlp=8,
    max_positions=64,
    tied=True,
    qk_norm=False,
    remat="none",
)
"""Products with 160 weights in the layer and 40 in the output, 16 FLOPs a pair of positions."""

# FLOPs of one row with 3 tokens in the prompt and 2 in the completion
TOKENS = 2 * (2 * 200 + 16 * 4)  # both with the context of 3 + 2 // 2 positions
PROMPT = 2 * 160 * 3 + 2 * 40 + 16 * (1 + 2 + 3)
BEGUN = 2 * 160 * 4 + 2 * 40 + 16 * (1 + 2 + 3 + 4)  # of branches: up to the middle
SCORE = 2 * 160 * 5 + 2 * 40 * 2 + 16 * (1 + 2 + 3 + 4 + 5)
VALUE = 2 * 160 * 5 + 16 * 15
TRAIN = 3 * (2 * 200 * 5 + 16 * 15)
PLAIN = TOKENS + PROMPT + TRAIN


def config_for(*, prompts=8, group=1, minibatch=8, slots=4, plan="uniform", loss=None, **estimator):
    return Config(
        run_dir="",
        sampling=SamplingSection(group_size=group, plan=plan, max_new_tokens=2),
        loss=LossSection(**loss or {}),
        estimator=EstimatorSection(**{"name": "reinforce", "table_samples": 0} | estimator),
        train=TrainSection(
            prompts_per_step=prompts,
            minibatch_rollouts=minibatch,
            microbatch_rollouts=4,
            sample_rollouts=slots,
        ),
    )


def bounds(config, **chip):
    """On a device that does one FLOP a second and everything else in no time."""
    sheet = {"memory": 0, "bandwidth": math.inf, "flops": 1.0, "interconnect": math.inf}
    chip = Chip("slow", **sheet | chip)
    return step_bounds(config, SMALL, abstract_mesh(1, data=1), chip, prompt=3, new=2)


SEQUENCES = {"aggregation": "sequence_mean"}
CASES = {
    "plain": (config_for(), 8 * PLAIN),
    "greedy": (config_for(plan="greedy_beside", name="remax"), 8 * PLAIN + 8 * (TOKENS + PROMPT)),
    "greedy_of_groups": (
        config_for(prompts=4, group=2, plan="greedy_beside", name="remax"),
        8 * PLAIN + 4 * (TOKENS + PROMPT),
    ),
    "sequential": (
        config_for(prompts=2, group=8, minibatch=16, plan="sequential", name="v05_filter"),
        16 * PLAIN,
    ),
    "branch": (  # 9 from each prompt, and from the second token of each rollout
        config_for(prompts=4, group=2, plan="branch", name="vineppo"),
        8 * PLAIN + 4 * 9 * (TOKENS + BEGUN) + 8 * 9 * (TOKENS / 2 + BEGUN),
    ),
    "two_updates": (config_for(minibatch=4), 8 * (PLAIN + SCORE)),
    "reference": (config_for(loss={"kl_coef": 0.1}), 8 * (PLAIN + SCORE)),
    "reference_twice": (config_for(loss={"kl_coef": 0.1}, minibatch=4), 8 * (PLAIN + 2 * SCORE)),
    "ais": (config_for(loss={"sampler_correction": "ais"}), 8 * (PLAIN + SCORE)),
    "ais_knows": (
        config_for(loss={"sampler_correction": "ais"}, minibatch=4),
        8 * (PLAIN + SCORE),
    ),
    "rebel": (
        config_for(group=2, loss={"objective": "rebel"} | SEQUENCES),
        16 * (PLAIN + 2 * SCORE),
    ),
    "rebel_once": (
        config_for(group=2, loss={"objective": "rebel"} | SEQUENCES, minibatch=16),
        16 * PLAIN,
    ),
    "critic": (config_for(name="gae"), 8 * (PLAIN + 2 * VALUE)),
    "critic_twice": (config_for(name="gae", minibatch=4), 8 * (PLAIN + SCORE + 2 * VALUE)),
    "measured": (config_for(name="measured_mean", measure_every=4), 8 * (PLAIN + TRAIN / 2)),
    "measured_once": (
        config_for(name="measured_mean", measure_every=4, minibatch=4),
        8 * (PLAIN + SCORE) + 4 * TRAIN / 2,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_steps_flops_are_those_of_all_that_it_does(case):
    """And so are the seconds of a device with one FLOP a second, in which nothing overlaps."""
    config, flops = CASES[case]
    found = bounds(config)
    assert found.flops == flops
    assert found.seconds == pytest.approx(flops, rel=1e-12)


def test_the_parts_of_a_step_are_told_apart():
    config, _ = CASES["critic_twice"]
    found = bounds(config)
    assert found.sample_seconds == 8 * (TOKENS + PROMPT)
    assert found.passes.seconds == 8 * (SCORE + 2 * VALUE)
    assert found.update.seconds == 8 * TRAIN


def test_greedy_completions_fill_no_more_slots_than_there_are():
    """Decoding reads the weights once a token: 8 rollouts in 4 slots twice, 2 greedy ones once."""
    config = config_for(prompts=2, group=4, plan="greedy_beside", name="remax")
    found = bounds(config, bandwidth=1.0, flops=math.inf).sampling
    four, two = (costs.decode_step(SMALL, rows=rows, context=4).bytes for rows in (4, 2))
    assert found.seconds == 2 * 2 * four + 2 * two


def test_a_measurement_reads_weights_but_no_moments():
    """Two microbatches of an update read 200 weights 4 times; AdamW moves 7 numbers for each of 212
    parameters, once."""
    config = config_for(name="measured_mean", measure_every=4)
    found = bounds(config, bandwidth=1.0, flops=math.inf).update
    assert costs.parameters(SMALL) == 212
    assert found.seconds == 1.5 * 2 * 4 * 200 * 4 + 7 * 212 * 4


def test_a_measurement_sends_gradients_as_an_update_does():
    """2 more in every fourth step, between two groups of devices."""
    sheet = Chip("slow", 0, math.inf, math.inf, interconnect=1.0)
    measured, plain = (
        step_bounds(
            config_for(name=name, measure_every=4),
            SMALL,
            abstract_mesh(2, data=2),
            sheet,
            prompt=3,
            new=2,
        ).update.sending
        for name in ("measured_mean", "reinforce")
    )
    assert measured == 1.5 * plain > 0


def write_set(path, count):
    path.write_text("\n".join(json.dumps({"problem": f"{n}?", "answer": n}) for n in range(count)))
    return str(path)


def test_problems_are_those_of_all_sets(tmp_path):
    """``data.size`` applies to each set, and one set of the hub leaves the number unknown."""
    first, second = write_set(tmp_path / "a.jsonl", 9), write_set(tmp_path / "b.jsonl", 5)

    def count(size=0, **more):
        return problem_count(Config("", data=DataSection(path=first, more_sets=more, size=size)))

    assert count() == 9
    assert count(**{second: 0.5}) == 14
    assert count(size=7, **{second: 0.5}) == 12
    assert count(**{second: 0.5, "openai/gsm8k:main": 1.0}) == 14 + 7473
    assert count(**{"nobody/nothing": 1.0}) is None


def counted(config):
    return "\n".join(described(config))


def test_the_dry_run_says_what_it_counts():
    said = counted(CASES["greedy_of_groups"][0])
    assert "counted in a step: 8 rollouts\n" in said
    assert "4 greedy completions beside them" in said
    assert "updates: 1, each over 8 rollouts" in said
    assert "not counted: evaluations" in said
    passes = "forward passes over the rollouts for old log-probabilities, the critic's values, "
    assert passes + "its updates" in counted(CASES["critic_twice"][0])
    measured = counted(CASES["measured"][0])
    assert "two more gradients of an update every 4 steps" in measured
    assert "forward passes" not in measured


def test_the_most_that_a_plan_may_ask_for_is_counted_and_said():
    config, _ = CASES["sequential"]
    assert "16 rollouts, the most that sequential asks for; it begins with 8\n" in counted(config)
    sampling = dataclasses.replace(config.sampling, plan_options={"first": 2})
    config = dataclasses.replace(config, sampling=sampling)
    assert "it begins with 4\n" in counted(config)
    branched = counted(CASES["branch"][0])
    assert "108 completions from steps of the rollouts, with the tokens of 72 whole" in branched
    assert "whole ones: 9 from each of 2 steps, the most" in branched
    own = dataclasses.replace(sampling, plan=f"{EXAMPLES}/own_plan.py:hard_again", plan_options={})
    said = counted(dataclasses.replace(config, sampling=own))
    assert "16 rollouts, the most that the plan may ask for\n" in said
    assert "grading, completions for the credit of your own plan" in said


def test_a_table_is_counted_in_steps_with_their_greedy_completions():
    """80 problems x 8 rollouts, and 8 rollouts with 8 greedy completions a step."""
    config = config_for(plan="greedy_beside", name="basis", table_samples=8)
    config = dataclasses.replace(config, data=DataSection(path="nobody/nothing", size=80))
    lines = []
    request = dry_run.Request(config, SMALL, prompt_width=3, rows=8, available=0)
    dry_run.report_table(request, abstract_mesh(1, data=1), CHIPS["h100"], lines.append)
    assert "640 rollouts, as many as 40 steps of sampling" in lines[0]


def test_the_flagship_scores_its_rollouts_once():
    assert "for old log-probabilities\n" in counted(command_line.load_config("qwen_math"))
