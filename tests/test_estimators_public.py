"""The public face of the estimators: names, modules and examples are what the documents show."""

import doctest
import importlib
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from basis_jax import estimators
from basis_jax.estimators import rows

MODULES = [module.name for module in pkgutil.iter_modules(estimators.__path__)]


@pytest.mark.parametrize("module", MODULES)
def test_no_public_function_hides_a_module_of_the_same_name(module):
    assert getattr(estimators, module) is importlib.import_module(f"basis_jax.estimators.{module}")


# ------------------------------------------------------------------------------------- examples
PUBLIC = {f"estimators.{name}": getattr(estimators, name) for name in estimators.__all__}
PUBLIC |= {f"estimators.rows.{name}": getattr(rows, name) for name in rows.__all__}
OF_TYPES = {f"estimators.{name}" for name in ("Estimate", "Measurement", "Signals")}
"""Shown by the package's own example."""
NOT_CALLED = {"estimators.ESTIMATORS", "estimators.rows"}  # a table and a module


def check_example(text, name):
    """Run the ``>>>`` lines of a docstring as shown, after the lines that the package names."""
    scope, failures = {}, []
    test = doctest.DocTestParser().get_doctest(text, scope, name, None, None)
    with np.printoptions():  # what the lines set ends with the block
        exec(textwrap.dedent(estimators.__doc__.split("begin after these lines:\n")[1]), test.globs)
        doctest.DocTestRunner(verbose=False).run(test, out=failures.append)
    assert test.examples and not failures, "".join(failures)


COMPILED_LONG = ("estimators.basis", "estimators.value_filter_update", "estimators.least_variance")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in COMPILED_LONG else name
        for name in sorted(PUBLIC.keys() - OF_TYPES - NOT_CALLED)
    ],
)
def test_every_public_name_has_an_example_that_runs_as_shown(name):
    """It calls the name itself, and prints what the docstring says it prints."""
    text = PUBLIC[name].__doc__
    calls = [line for line in text.splitlines() if ">>>" in line or "..." in line]
    assert any(name in line for line in calls)
    check_example(text, name)


def test_the_package_shows_the_types_the_table_and_the_module_that_have_no_example_of_their_own():
    for name in OF_TYPES | NOT_CALLED - {"estimators.rows"}:
        assert name in estimators.__doc__
    check_example(estimators.__doc__, "estimators")
    assert re.search("module ``rows``", estimators.__doc__)


INSIDE = {"by_reference.load", "by_reference.fingerprint", "declare.declared_by"}
INSIDE |= {"weighted.usable", "weighted.effective", "measured.used_baseline"}
INSIDE |= {"critic.start_advantages"}
INSIDE |= {
    f"value_filter.{name}"
    for name in (
        *("single_filter_init", "single_filter_update", "read_batch", "cross_fit", "expected"),
        *("own_posterior", "surprising", "widened"),
    )
}
"""Functions that only the other modules of the package call."""


@pytest.mark.parametrize("module", MODULES)
def test_no_function_has_to_be_imported_from_a_module(module):
    functions = vars(importlib.import_module(f"basis_jax.estimators.{module}")).items()
    here = {n for n, f in functions if inspect.isfunction(f) and f.__module__.endswith(module)}
    public = {n for n in here if {f"estimators.{n}", f"estimators.{module}.{n}"} & PUBLIC.keys()}
    private = {n for n in here if n.startswith("_") or f"{module}.{n}" in INSIDE}
    assert here == public | private and not public & private


# ------------------------------------------------------------------------------- docs/estimators.md
PAGE = (Path(__file__).parent.parent / "docs" / "estimators.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.slow
def test_the_estimators_are_called_as_the_page_shows():
    """The first two blocks, in one scope; each call of the first gives one advantage per row."""
    scope = {}
    calls = [line for line in BLOCKS[0].splitlines() if line.startswith("estimators.")]
    exec("\n".join(line for line in BLOCKS[0].splitlines() if line not in calls), scope)
    assert len(calls) == 6
    for call in calls:
        estimate = eval(call, scope)
        assert estimate.advantages.shape == (512,) and np.any(estimate.advantages)
    exec(BLOCKS[1], scope)
    assert np.any(scope["estimate"].advantages)
    for text in (PAGE, (Path(__file__).parent.parent / "README.md").read_text()):
        assert f"the {len(estimators.ESTIMATORS)} names" in text or (
            f"the {len(estimators.ESTIMATORS)} in `estimators.ESTIMATORS`" in text
        )


def test_the_pages_own_estimators_are_made_as_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = BLOCKS[2].splitlines()[0].removeprefix("# ")
    Path(name).write_text(BLOCKS[2])
    made = PAGE[PAGE.index('estimators.make("my') :].split("`")[0]
    assert f'"{name}:' in made and f"--estimator.name {name}:shifted_mean" in PAGE
    signals = estimators.Signals(
        rewards=jnp.float32([1, 0]),
        valid=jnp.array([True, True]),
        problem_ids=jnp.array([2, 0]),
        lengths=jnp.array([3, 4]),
    )
    _, e = eval(made).update((), signals)
    np.testing.assert_allclose(e.values, [0.1, 1.1])
    last = estimators.make(f"{name}:last_reward", first=0.25)
    state, e = last.update(last.init(np.int32([4, 0, 0]), np.int32([8, 0, 0])), signals)
    assert e.values.tolist() == [0.25, 0.5] and state.tolist() == [0, 0.25, 1]
