"""Find an estimator by reference: ``FILE.py:NAME``, or ``package.module:NAME`` (``references``)."""

from typing import Any

from basis_jax import references
from basis_jax.estimators.declare import declared_by
from basis_jax.references import FORMS as FORMS


def load(reference: str) -> Any:
    """What the reference names. Raises ValueError as ``references.load``."""
    return references.load(reference, "estimator", lambda x: declared_by(x) is not None)


def fingerprint(reference: str) -> str:
    """SHA-256 in hex of the file that the reference names. Raises ValueError as
    ``references.fingerprint``."""
    return references.fingerprint(reference, "estimator")
