"""The structure of the package: rooms import only rooms below them, small parts, light imports."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "basis_jax"
FOLDERS = ("basis_jax", "scripts", "studies", "benchmarks", "configs")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

WORDS = {
    "config",
    "saved_config",
    "types",
    "pytree",
    "masked",
    "losses",
    "corrections",
    "files",
    "references",
}
WORDS |= {"processes"}
"""Modules that stand alone: what everybody speaks."""

ROOMS = {
    "pytree": set(),
    "masked": set(),
    "config": set(),
    "saved_config": {"config"},
    "files": set(),
    "references": set(),
    "processes": set(),
    "types": {"pytree"},
    "losses": {"types"},
    "corrections": {"types"},
    "estimators": {"types", "pytree", "masked", "references"},
    "verify": {"references"},
    "model": {"pytree"},
    "weights": {"files", "model", "processes"},
    "data": {"config", "files", "verify"},
    "sampling": {"config", "types", "pytree", "masked", "model", "data", "processes"},
    "runs": {"config", "saved_config", "files", "types", "references", "processes"},
    "plans": {"types", "references", "estimators", "data", "sampling"},
    "opening": WORDS | {"estimators", "verify", "model", "weights", "data", "sampling", "plans"},
    "evaluation": WORDS | {"verify", "model", "weights", "data", "sampling", "runs", "opening"},
}
ROOMS["training"] = {*ROOMS} - {"training"}
ROOMS["command_line"] = {"config", "files"}
ROOMS["commands"] = {*ROOMS} - {"commands"}
"""Which rooms (folders, or modules that stand alone) a room may import from. No exceptions."""

ONLY = {
    "flax": {"model.decoder"},
    "optax": {
        "training.critic",
        "training.measure",
        "training.moments",
        "training.start",
        "training.update",
    },
    "orbax": {"runs.checkpoint", "weights.trained"},
    "transformers": {"weights.huggingface"},
    "matplotlib": {"runs.plots"},
}
"""Which modules may import a package that is heavy or could be replaced."""


def module_of(path):
    """``model.decoder`` for basis_jax/model/decoder.py, ``estimators`` for its __init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def room_of(module):
    return module.split(".")[0]


def imported(path):
    """Dotted names that a file imports anywhere in it, lazily too; ``from a import b`` is a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def edges():
    """(module, module of the package it imports) and (module, outside package)."""
    modules = {module_of(path) for path in PACKAGE.rglob("*.py")}
    inside, outside = set(), set()
    for path in PACKAGE.rglob("*.py"):
        for name in imported(path):
            top, _, rest = name.partition(".")
            if top != "basis_jax":
                outside.add((module_of(path), top))
                continue
            while rest not in modules:  # a name inside a module
                rest = rest.rpartition(".")[0]
            inside.add((module_of(path), rest))
    return inside, outside


def test_rooms_import_only_rooms_below_them():
    rooms = {room_of(module_of(path)) for path in PACKAGE.rglob("*.py")} - {""}
    assert rooms == ROOMS.keys()
    wrong = [
        f"{module} imports {name}"
        for module, name in sorted(edges()[0])
        if name and room_of(name) not in {room_of(module), *ROOMS[room_of(module)]}
    ]
    assert not wrong


def test_neither_the_table_of_rooms_nor_the_modules_inside_one_have_a_circle():
    inside = {(module, name) for module, name in edges()[0] if module != name and name}
    between = {(room, below) for room, allowed in ROOMS.items() for below in allowed}
    for graph in (inside, between):
        remaining = {node: set() for edge in graph for node in edge}
        for node, below in graph:
            remaining[node].add(below)
        while free := {node for node, below in remaining.items() if not below & remaining.keys()}:
            remaining = {n: below for n, below in remaining.items() if n not in free}
        assert not remaining


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_names_imported_from_the_package_exist(path):
    """Scripts too, of which some are run by hand only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in FOLDERS:
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


def test_packages_are_imported_where_they_belong():
    _, outside = edges()
    wrong = [f"{m} imports {p}" for m, p in sorted(outside) if p in ONLY and m not in ONLY[p]]
    without_jax = ("verify", "data", "files", "config", "runs.identity", "runs.metrics")
    wrong += [
        f"{module} imports jax"
        for module, package in sorted(outside)
        if package == "jax" and (module in without_jax or room_of(module) in without_jax)
    ]
    wrong += [
        f"{module} imports {package}"
        for module, package in sorted(outside)
        if module in ("config", "files") and package not in sys.stdlib_module_names
    ]
    assert not wrong


HEAVY = ["flax", "optax", "orbax", "transformers", "datasets", "matplotlib"]
HEAVY += ["basis_jax.model.decoder"]


@pytest.mark.parametrize(
    "module, unwanted",
    [
        ("basis_jax", [*HEAVY, "jax", "numpy"]),
        ("basis_jax.config", [*HEAVY, "jax", "numpy"]),
        ("basis_jax.estimators", HEAVY),
        ("basis_jax.losses", HEAVY),
        ("basis_jax.verify", [*HEAVY, "jax"]),
        ("basis_jax.data.tasks", [*HEAVY, "jax"]),
        ("basis_jax.commands", [*HEAVY, "jax", "numpy"]),
        ("basis_jax.runs.metrics", [*HEAVY, "jax", "tensorboardX", "rich"]),
    ],
)
def test_a_light_import_stays_light(module, unwanted):
    code = f"import sys, {module}; print([m for m in {unwanted!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_importing_starts_no_device_and_prints_nothing():
    """No flags, meshes, jits or downloads at module level, in any module."""
    files = PACKAGE.rglob("*.py")
    parts = (p.relative_to(ROOT).with_suffix("").parts for p in files)
    names = sorted(".".join(part).removesuffix(".__init__") for part in parts)
    code = (
        f"import os; before = dict(os.environ); import {', '.join(names)}; import jax\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized(), 'a device was started'\n"
        "assert not jax.config.jax_enable_x64 and before == dict(os.environ)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_one_module_alone_knows_that_there_are_several_processes():
    known = r"jax\.distributed|multihost_utils|\bprocess_(index|count|allgather)\b"
    knowing = {module_of(p) for p in PACKAGE.rglob("*.py") if re.search(known, p.read_text())}
    assert knowing == {"processes"}


def test_no_module_is_a_drawer_for_anything():
    drawers = {"utils", "common", "core", "helpers", "base", "misc"}
    assert not [p for p in ROOT.joinpath("basis_jax").rglob("*") if p.stem in drawers]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small(path):
    """400 lines a module, 60 a function, 150 a main."""
    text = path.read_text()
    large = [f"{path.name} has {text.count(chr(10))} lines"] if text.count("\n") > 400 else []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef):
            continue
        lines = node.end_lineno - node.lineno + 1
        if lines > (150 if node.name == "main" else 60):
            large.append(f"{node.name} has {lines} lines")
    assert not large
