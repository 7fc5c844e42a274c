"""The public face of the estimators: names, modules and examples are what the documents show."""

import doctest
import importlib
import inspect
import pkgutil
import re
import textwrap

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
OF_TYPES = {"estimators.Estimate", "estimators.Signals"}  # shown by the package's own example
NOT_CALLED = {"estimators.ESTIMATORS", "estimators.rows"}  # a table and a module


def check_example(text, name):
    """Run the ``>>>`` lines of a docstring as shown, after the lines that the package names."""
    scope, failures = {}, []
    test = doctest.DocTestParser().get_doctest(text, scope, name, None, None)
    with np.printoptions():  # what the lines set ends with the block
        exec(textwrap.dedent(estimators.__doc__.split("begin after these lines:\n")[1]), test.globs)
        doctest.DocTestRunner(verbose=False).run(test, out=failures.append)
    assert test.examples and not failures, "".join(failures)


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - OF_TYPES - NOT_CALLED))
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


INSIDE = {"by_reference.load", "by_reference.fingerprint", "declare.declared_by", "declare.near"}
"""Functions that only the other modules of the package call."""


@pytest.mark.parametrize("module", MODULES)
def test_no_function_has_to_be_imported_from_a_module(module):
    functions = vars(importlib.import_module(f"basis_jax.estimators.{module}")).items()
    here = {n for n, f in functions if inspect.isfunction(f) and f.__module__.endswith(module)}
    public = {n for n in here if {f"estimators.{n}", f"estimators.{module}.{n}"} & PUBLIC.keys()}
    private = {n for n in here if n.startswith("_") or f"{module}.{n}" in INSIDE}
    assert here == public | private and not public & private
