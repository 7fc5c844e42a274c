"""Measure this machine's peak rates, the ceilings of which benchmarks give shares."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def quickest(function: Callable[..., Array], *args: Array, repeats: int = 7) -> float:
    """Seconds of the fastest of ``repeats`` calls, without compilation."""
    jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function(*args))
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def flops_per_s(dtype: str) -> float:
    """2 n^3 divided by the seconds of a product of two n x n matrices."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), dtype)
    return 2 * size**3 / quickest(jax.jit(jnp.matmul), a, a)


def bytes_per_s() -> float:
    """Bytes of float32 numbers read per second, in a product of a matrix with a vector."""
    size = 2**28 if jax.default_backend() == "cpu" else 2**32
    matrix = jnp.ones((size // 4 // 4096, 4096), jnp.float32)
    return size / quickest(jax.jit(jnp.dot), matrix, jnp.ones(4096, jnp.float32))


def measured(dtype: str) -> dict[str, float]:
    return {"flops_per_s": flops_per_s(dtype), "bytes_per_s": bytes_per_s()}
