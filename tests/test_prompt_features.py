"""Features of a prompt: of the prompt alone, and of one scale."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from basis_jax.data.encoding import EncodedProblems
from basis_jax.data.problem import Problem
from basis_jax.model import decoder
from basis_jax.model.sharding import make_mesh
from basis_jax.training import prompt_features

ROWS = 11


def encoded(tokens, lengths):
    count = len(tokens)
    problems = tuple(Problem(prompt=f"p{i}", answer=str(i)) for i in range(count))
    return EncodedProblems(problems=problems, tokens=tokens, lengths=lengths, counts={})


@pytest.fixture(scope="module")
def problems():
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 12, (ROWS, 7)).astype(np.int32)
    return encoded(tokens, rng.integers(2, 8, ROWS).astype(np.int32))


def features(problems, *, devices=1, **options):
    mesh = make_mesh(devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        return prompt_features.prompt_features(
            tiny.params(), tiny.TINY, problems, mesh=mesh, **options
        )


@pytest.mark.slow
def test_the_states_are_those_of_the_lower_half_of_the_model(problems):
    states = prompt_features.middle_states(
        tiny.params(), tiny.TINY, problems.tokens, problems.lengths
    )
    half = dataclasses.replace(tiny.TINY, layers=tiny.TINY.layers // 2)
    params = tiny.params()
    params = {**params, "layers": jax.tree.map(lambda x: x[: half.layers], params["layers"])}
    hidden, _ = decoder.forward(params, half, jnp.asarray(problems.tokens))
    last = np.asarray(hidden)[np.arange(ROWS), problems.lengths - 1]
    np.testing.assert_allclose(states, last, rtol=1e-5, atol=1e-5)


def test_features_do_not_depend_on_batches_devices_or_padding(problems):
    alone = features(problems, size=3, rows_at_once=ROWS)
    np.testing.assert_allclose(features(problems, size=3, rows_at_once=4), alone, atol=2e-4)
    np.testing.assert_allclose(features(problems, size=3, devices=4), alone, atol=2e-4)
    beyond = np.arange(7)[None] >= problems.lengths[:, None]
    padded = encoded(
        np.pad(np.where(beyond, 1, problems.tokens), ((0, 0), (0, 3))), problems.lengths
    )
    np.testing.assert_allclose(features(padded, size=3), alone, atol=2e-4)


def test_features_are_the_best_projection_of_the_states_in_squared_distance(problems):
    """Centred, uncorrelated, and with the largest variances: the leading singular values."""
    made = features(problems, size=4)
    assert made.shape == (ROWS, 4) and made.dtype == np.float32
    states = np.float64(
        prompt_features.middle_states(tiny.params(), tiny.TINY, problems.tokens, problems.lengths)
    )
    largest = np.linalg.svd(states - states.mean(0), compute_uv=False)[:4]
    np.testing.assert_allclose(made.sum(0), 0, atol=1e-3)
    np.testing.assert_allclose(made.T @ made, np.diag(largest**2), atol=1e-3 * largest[0] ** 2)


def test_problems_beyond_the_sample_are_projected_alike(problems, monkeypatch):
    monkeypatch.setattr(prompt_features, "SAMPLE", 6)
    first = encoded(problems.tokens[:6], problems.lengths[:6])
    made = features(problems, size=3, rows_at_once=3)
    np.testing.assert_allclose(made[:6], features(first, size=3), atol=2e-4)
    assert np.isfinite(made).all()


def test_equal_prompts_have_features_zero():
    mean, directions = prompt_features.principal(np.ones((5, 4), np.float32), 2)
    assert np.array_equal((np.ones((5, 4)) - mean) @ directions, np.zeros((5, 2)))


@pytest.mark.parametrize("size", [0, ROWS])
def test_more_features_than_problems_can_tell_are_refused(problems, size):
    with pytest.raises(ValueError, match=f"estimator.features is {size} for 11 problems"):
        features(problems, size=size)
