"""The structure of the package: imports point up only, small parts, light imports."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "basis_jax"
SOURCES = sorted(path for folder in (PACKAGE, ROOT / "scripts", ROOT / "configs")
                 for path in folder.rglob("*.py"))  # fmt: skip

LAYERS = (
    {"pytree", "types", "masked"},
    {"estimators", "losses", "config"},
    {
        "sharding",
        "model",
        "decoding",
        "costs",
        "compiles",
        "weights",
        "hf",
        "gguf",
        "data",
        "scores",
        "verify",
        "tasks",
    },
    {
        "config_check",
        "logprobs",
        "sampling",
        "refill",
        "rollouts",
        "prompt_features",
        "checkpoint",
        "trained",
    },
    {
        "batches",
        "train",
        "reference_table",
        "evaluate",
        "session",
        "records",
        "plots",
        "command_line",
        "completions",
    },
)
"""A module imports from the layers before its own."""

BESIDE = {
    "types": {"pytree"},
    "model": {"sharding"},
    "decoding": {"model", "sharding"},
    "costs": {"sharding", "model"},
    "weights": {"model"},
    "hf": {"sharding", "model", "weights"},
    "gguf": {"weights"},
    "data": {"tasks", "verify"},
    "refill": {"sampling"},
    "rollouts": {"sampling", "refill"},
    "session": {"reference_table"},
    "evaluate": {"session"},
    "completions": {"evaluate"},
    "plots": {"records"},
}
"""What a module may import from its own layer besides."""

ONLY = {
    "flax": {"model"},
    "optax": {"train"},
    "orbax": {"checkpoint", "trained"},
    "transformers": {"hf"},
    "matplotlib": {"plots"},
}
"""Which modules may import a package that is heavy or could be replaced."""


def module_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """Dotted names that a file imports anywhere in it, lazily too; ``from a import b`` is a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def edges():
    """(module, name it imports from basis_jax) and (module, outside package)."""
    inside, outside = set(), set()
    for path in PACKAGE.rglob("*.py"):
        for name in imported(path):
            top, *rest = name.split(".")
            if top == "basis_jax":
                inside.add((module_of(path), rest[0]))
            else:
                outside.add((module_of(path), top))
    return inside, outside


def test_imports_point_up_only():
    layer = {module: number for number, names in enumerate(LAYERS) for module in names}
    inside, _ = edges()
    unknown = {module for edge in inside for module in edge} - layer.keys() - {"__init__"}
    assert not unknown, f"give {unknown} a layer"
    wrong = [
        f"{module} imports {name}"
        for module, name in sorted(inside)
        if module != name and layer[name] >= layer[module] and name not in BESIDE.get(module, ())
    ]
    assert not wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_names_imported_from_the_package_exist(path):
    """Scripts too, of which some are run by hand only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("basis_jax"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


def test_the_packages_imports_are_no_circle():
    """Where the table above allows imports inside a layer, they still have an order."""
    remaining = {module: set() for names in LAYERS for module in names}
    for module, name in edges()[0]:
        if module != name:
            remaining[module].add(name)
    while free := {module for module, names in remaining.items() if not names & remaining.keys()}:
        remaining = {m: names for m, names in remaining.items() if m not in free}
    assert not remaining


def test_estimators_and_losses_do_not_know_the_config():
    assert not {("estimators", "config"), ("losses", "config")} & edges()[0]


def test_packages_are_imported_where_they_belong():
    _, outside = edges()
    wrong = [f"{m} imports {p}" for m, p in sorted(outside) if p in ONLY and m not in ONLY[p]]
    wrong += [f"{m} imports jax" for m in ("verify", "tasks", "records") if (m, "jax") in outside]
    wrong += [
        f"config imports {package}"
        for module, package in sorted(outside)
        if module == "config" and package not in sys.stdlib_module_names
    ]
    assert not wrong


HEAVY = ["flax", "optax", "orbax", "transformers", "datasets", "matplotlib", "basis_jax.model"]


@pytest.mark.parametrize(
    "module, unwanted",
    [
        ("basis_jax", [*HEAVY, "jax", "numpy"]),
        ("basis_jax.config", [*HEAVY, "jax", "numpy"]),
        ("basis_jax.estimators", HEAVY),
        ("basis_jax.losses", HEAVY),
        ("basis_jax.verify", [*HEAVY, "jax"]),
        ("basis_jax.tasks", [*HEAVY, "jax"]),
        ("basis_jax.records", [*HEAVY, "jax", "tensorboardX", "rich"]),
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
