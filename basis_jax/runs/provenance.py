"""Origin of a result: commit, uncommitted changes, versions."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def provenance(*more: str) -> dict[str, Any]:
    """The origin in every written result: commit, uncommitted changes and versions.

    ``more``: further packages whose versions are included. The version is None if a package is not
    installed.
    """
    return {**_commit(), "versions": _versions(("basis-jax", *PACKAGES, *more))}


def _commit() -> dict[str, Any]:
    """Commit of this source tree and whether it has uncommitted changes; None if not known."""
    root = Path(__file__).resolve().parents[2]
    unknown = {"commit": None, "uncommitted_changes": None}
    if not (root / ".git").exists():  # installed: a repository around it is not ours
        return unknown
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        return unknown
    return {"commit": commit, "uncommitted_changes": bool(status)}


def _versions(packages: tuple[str, ...]) -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions
