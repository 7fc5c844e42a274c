"""Corrections for another sampler: loops in float64, and statistics of a whole update."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_train import CONFIG, assert_same, graded, one_update

from basis_jax.config import Config, LossSection
from basis_jax.corrections import ais_alpha, ais_sums, kept_rows, sampler_weights
from basis_jax.losses import loss_weights
from basis_jax.model.sharding import make_mesh
from basis_jax.opening.checks import check
from basis_jax.saved_config import config_from, renamed
from basis_jax.types import Batch

CAP, FLOOR = 1.5, 0.7


def batch(seed=0, spread=0.4):
    rng = np.random.default_rng(seed)
    mask = rng.random((6, 7)) < 0.6
    old = rng.normal(size=mask.shape).astype(np.float32)
    sampler = np.where(mask, old + spread * rng.normal(size=mask.shape), np.nan)
    return Batch(
        tokens=np.zeros(mask.shape, np.int32),
        completion_mask=mask,
        loss_weights=loss_weights(jnp.asarray(mask), "token_mean", max_length=7),
        advantages=rng.normal(size=6).astype(np.float32),
        old_logprobs=old,
        sampler_logprobs=sampler.astype(np.float32),
    )


def loops(b, correction, alpha=0.0):
    """The factor of every token, one by one."""
    mask = np.asarray(b.completion_mask)
    gap = np.where(mask, np.float64(b.old_logprobs) - np.float64(b.sampler_logprobs), 0)
    found = np.ones(mask.shape)
    for i, t in zip(*np.nonzero(mask), strict=True):
        ratio = np.exp(gap[i, t])
        if correction == "tis":
            found[i, t] = min(ratio, CAP)
        elif correction == "sequence_tis":
            found[i, t] = min(np.exp(gap[i].sum()), CAP)
        elif correction == "icepop":
            found[i, t] = ratio if FLOOR <= ratio <= CAP else 0
        elif correction == "ais":
            found[i, t] = 1 + alpha * (min(ratio, CAP) - 1)
    return found


@pytest.mark.parametrize("correction", ["none", "tis", "sequence_tis", "icepop", "mask", "ais"])
def test_factors_are_those_of_loops(correction):
    b = dataclasses.replace(batch(), ais_alpha=jnp.float32(0.3))
    found = sampler_weights(jnp.asarray(b.old_logprobs), b, correction, cap=CAP, floor=FLOOR)
    expected = loops(b, correction, alpha=0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert correction in ("none", "mask") or len(np.unique(expected.round(6))) > 3


def test_unknown_corrections_and_ais_without_its_number_are_refused():
    with pytest.raises(ValueError, match="none, tis, sequence_tis, icepop, mask, ais"):
        sampler_weights(jnp.zeros((6, 7)), batch(), "mis", cap=2.0)
    with pytest.raises(ValueError, match="needs batch.ais_alpha"):
        sampler_weights(jnp.zeros((6, 7)), batch(), "ais", cap=2.0)


def test_rows_are_kept_by_their_geometric_mean():
    """Ratios 2 and 1/2, and 1.15 twice, are kept; 2 and 1, 1/2 alone and no token are not."""
    gap = np.log(np.float32([[2, 0.5], [2, 1], [0.5, 9], [9, 9], [1.15, 1.15]]))
    mask = jnp.array([[True, True], [True, True], [True, False], [False, False], [True, True]])
    kept = kept_rows(jnp.asarray(gap), mask, floor=0.8, cap=1.2)
    assert kept.tolist() == [True, False, False, False, True]


def alpha_by_hand(gap, advantages, mask, beta, mismatch=0.02, variance=1.2):
    gap, a = np.float64(gap)[mask], np.broadcast_to(advantages[:, None], mask.shape)[mask]
    w = np.minimum(np.exp(gap), CAP)
    ess = (1 + np.var(w, ddof=1) / np.mean(w) ** 2) ** -0.5
    ratio = np.std(a * w, ddof=1) / (np.std(a, ddof=1) + 1e-6)
    over = max(0, (ratio - variance) / variance)
    return np.clip(ess - beta * over, 0, 1) * min(1, np.abs(gap).mean() / mismatch)


@pytest.mark.parametrize(
    ("spread", "beta", "variance"), [(0.4, 1.0, 1.2), (0.01, 1.0, 1.2), (0.6, 2.0, 0.9)]
)
def test_ais_weighs_an_update_by_the_sums_of_its_parts(spread, beta, variance):
    """Two halves against all tokens at once in float64: full correction, little mismatch (below
    mismatch, so that alpha is less), and a variance that counts."""
    b = batch(3, spread)
    gap = np.where(b.completion_mask, b.old_logprobs - b.sampler_logprobs, np.nan)
    halves = [
        ais_sums(
            jnp.asarray(gap[part]),
            jnp.broadcast_to(jnp.asarray(b.advantages[part])[:, None], gap[part].shape),
            jnp.asarray(b.completion_mask[part]),
            cap=CAP,
        )
        for part in (slice(0, 2), slice(2, 6))
    ]
    sums = {name: halves[0][name] + halves[1][name] for name in halves[0]}
    found = ais_alpha(sums, mismatch=0.02, variance=variance, beta=beta)
    expected = alpha_by_hand(gap, b.advantages, b.completion_mask, beta, variance=variance)
    assert float(found) == pytest.approx(expected, rel=1e-4)
    assert 0 < expected < 1


def test_ais_without_mismatch_or_without_tokens_corrects_nothing():
    ones = jnp.ones((2, 3), bool)
    for mask in (ones, ~ones):
        sums = ais_sums(jnp.zeros((2, 3)), jnp.ones((2, 3)), mask, cap=5.0)
        assert float(ais_alpha(sums, mismatch=0.02, variance=1.2, beta=1.0)) == 0


def near_the_trainer(rows=8):
    """Rollouts whose sampler differs a little from the trainer's policy, more in some rows."""
    data = graded(rows)
    r = data.rollouts
    scored, _ = tiny.token_logprobs(tiny.params(), tiny.TINY, jnp.asarray(r.tokens))
    rng = np.random.default_rng(7)
    r.sampler_logprobs[:] = np.asarray(scored) + 0.2 * rng.normal(size=r.tokens.shape)
    return data, np.asarray(scored)


def config_of(correction, aggregation="token_mean"):
    loss = LossSection(
        sampler_correction=correction, sampler_cap=1.05, sampler_floor=0.9, aggregation=aggregation
    )
    return dataclasses.replace(CONFIG, loss=loss)


def live_mask(data):
    r, mask = data.rollouts, np.zeros(data.rollouts.tokens.shape, bool)
    for i in np.flatnonzero(data.valid):
        mask[i, r.prompt_lengths[i] : r.prompt_lengths[i] + r.completion_lengths[i]] = True
    return mask


@pytest.mark.slow
def test_ais_has_one_number_for_an_update_however_it_is_split():
    data, scored = near_the_trainer()
    mask, advantages = live_mask(data), ((data.rewards - 0.4) * data.valid).astype(np.float64)
    gap = np.where(mask, scored - data.rollouts.sampler_logprobs, 0)
    config = config_of("ais")
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, sampler_cap=CAP))
    params, metrics = one_update(config=config, data=data, microbatch=2)
    expected = alpha_by_hand(gap, advantages, mask, beta=1.0)
    assert metrics["sampler/ais_alpha"] == pytest.approx(expected, rel=1e-3)
    whole, _ = one_update(config=config, data=data)
    assert_same(params, whole)
    assert 0 < metrics["sampler/weight_limited"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", ["token_mean", "constant_length"])
def test_masked_rows_leave_the_loss_and_its_denominators(aggregation):
    """The same update as if their rewards could not have been graded."""
    data, scored = near_the_trainer()
    mask = live_mask(data)
    gap = np.where(mask, scored - data.rollouts.sampler_logprobs, 0)
    mean = np.exp(gap.sum(axis=1) / np.maximum(mask.sum(axis=1), 1))
    kept = data.valid & (mean >= 0.9) & (mean <= 1.05)
    assert 1 < kept.sum() < data.valid.sum()
    found, metrics = one_update(config=config_of("mask", aggregation), data=data, microbatch=2)
    plain = dataclasses.replace(CONFIG, loss=LossSection(aggregation=aggregation))
    expected, _ = one_update(config=plain, data=dataclasses.replace(data, valid=kept))
    assert_same(found, expected)
    assert metrics["sampler/weight_limited"] == pytest.approx(1 - mask[kept].sum() / mask.sum())


def test_saved_configs_with_the_old_name_of_the_cap_are_read():
    """A run's config of version 0.2: its tis_cap is a correction now, and 0 was none."""
    old = {"run_dir": "x", "loss": {"objective": "gpg", "tis_cap": 1.5}}
    loss = config_from(old).loss
    assert (loss.objective, loss.sampler_correction, loss.sampler_cap) == ("gpg", "tis", 1.5)
    assert old["loss"]["tis_cap"] == 1.5
    assert config_from({"loss": {"tis_cap": 0.0}}).loss == LossSection()
    assert renamed({"seed": 1}) == {"seed": 1, "loss": {}}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sampler_correction": "mis"}, "loss.sampler_correction is 'mis'; allowed are none, tis"),
        ({"sampler_correction": "icepop", "sampler_floor": 2.0}, "give a floor below the cap"),
        ({"sampler_cap": 0.0}, "loss.sampler_cap is 0.0; give more than 0"),
    ],
)
def test_corrections_that_cannot_work_are_refused(change, sentence):
    config: Config = dataclasses.replace(CONFIG, loss=LossSection(**change))
    with pytest.raises(ValueError, match=sentence):
        check(config, tiny.TINY, make_mesh())


@pytest.mark.parametrize(
    "values, given",
    [
        ({"train": {"steps": {}}}, "steps: dict"),
        ({"train": 3}, "train: int"),
        ({"loss": [1]}, "loss: tuple"),
        ({"eval": {"sets": [1]}}, "sets: item 0"),
    ],
)
def test_a_saved_config_with_values_of_another_type_is_one_sentence(values, given):
    with pytest.raises(ValueError, match=f"the saved config has a wrong {given}"):
        config_from(values)
