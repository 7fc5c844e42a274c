import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

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


COMPILE = """
import jax
from basis_jax.runs.compiles import count_compiles, keep_compiled
keep_compiled()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
with count_compiles() as compiles:
    jax.jit(lambda x: 2 * x)(1.0)
assert compiles.take()["compile/programs"] == 1
"""


@pytest.mark.parametrize("kept", ["home", "variable", "no", "unwritable"])
def test_programs_are_kept_where_it_is_said(tmp_path, kept):
    """In the home folder, or where JAX's variable says; not where they are not wanted or cannot
    be; counted as before."""
    unset = ("BASIS_JAX_KEEP_COMPILED", "JAX_COMPILATION_CACHE_DIR")
    environment = {k: v for k, v in os.environ.items() if k not in unset} | {"HOME": str(tmp_path)}
    folder = tmp_path / ".cache" / "basis_jax" / "compiled"
    if kept == "variable":
        folder = tmp_path / "elsewhere"
        environment["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    if kept == "no":
        environment["BASIS_JAX_KEEP_COMPILED"] = "no"
    if kept == "unwritable":
        (tmp_path / ".cache").write_text("")
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = {"no": "", "unwritable": "warning: compiled programs are not kept"}
    assert done.stdout.startswith(said.get(kept, f"compiled programs are kept in {folder} ("))
    assert done.stdout.count("\n") == (kept != "no")
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - {tmp_path / ".cache"}
    assert bool(written) == (kept in ("home", "variable"))
    assert all(folder in path.parents for path in written)
