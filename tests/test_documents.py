"""The README says what is there: its example runs, its tree and its paths are those on disk."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_estimator_example_runs_and_its_values_are_better_than_the_batch_mean(capsys):
    example = README.split("```python\n")[1].split("```")[0]
    scope = {}
    exec(example, scope)
    error = float(capsys.readouterr().out.split()[0])
    assert 0 < error < 0.3 * float(scope["values"].var())


def test_the_tree_names_every_module_once_and_nothing_else():
    tree = README.split("```\nbasis_jax/\n")[1].split("configs/")[0]
    named, folder = [], ""
    for line in tree.splitlines():
        words = re.split("  +", line.strip())[0].split()
        folder = folder if line.startswith("    ") else ""
        named += [folder + word for word in words]
        folder = words[0] if words[0].endswith("/") else folder
    package = ROOT / "basis_jax"
    assert all((package / name).exists() for name in named)
    assert len(named) == len(set(named))
    top = {p.name + "/" * p.is_dir() for p in package.iterdir() if not p.name.startswith("__")}
    inside = {f"estimators/{p.name}" for p in (package / "estimators").glob("*.py")}
    assert set(named) == top | inside - {"estimators/__init__.py"}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_path_in_the_text_exists(document):
    text = (ROOT / document).read_text()
    paths = re.findall(r"(?:configs|scripts|tests|results|basis_jax)/[\w/]+\.(?:py|png|md)", text)
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert paths and not missing
