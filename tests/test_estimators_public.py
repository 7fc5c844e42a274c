"""The public face of the estimators: names, modules and examples are what the documents show."""

import importlib
import pkgutil

import pytest

from basis_jax import estimators

MODULES = [module.name for module in pkgutil.iter_modules(estimators.__path__)]


@pytest.mark.parametrize("module", MODULES)
def test_no_public_function_hides_a_module_of_the_same_name(module):
    assert getattr(estimators, module) is importlib.import_module(f"basis_jax.estimators.{module}")
