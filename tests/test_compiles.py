import jax
import jax.numpy as jnp

from basis_jax.runs.compiles import count_compiles


def test_every_program_is_counted_once_in_the_step_that_compiled_it():
    ones, twos = jnp.ones(3), jnp.ones((2, 2))
    jax.block_until_ready((ones, twos))
    double = jax.jit(lambda x: 2 * x)
    with count_compiles() as compiles:
        double(ones)
        first = compiles.take()
        double(ones)
        again = compiles.take()
        double(twos)
        new_shape = compiles.take()
    assert [x["compile/programs"] for x in (first, again, new_shape)] == [1, 0, 1]
    assert min(first["compile/seconds"], new_shape["compile/seconds"]) > 0
    assert again["compile/seconds"] == 0


def test_nothing_is_counted_after_the_block():
    with count_compiles() as compiles:
        pass
    jax.jit(lambda x: 3 * x)(1.0)
    assert compiles.take()["compile/programs"] == 0
