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


def test_the_tree_names_every_room_and_every_module_once():
    tree = README.split("```\nbasis_jax/\n")[1].split("\nconfigs/")[0]
    named, room = [], ""
    for line in tree.splitlines():
        if started := re.match(r"  (\w+/) ", line):
            room = started.group(1)
            named.append(room)
        elif line.startswith("  ") and line[2] != " ":
            room = ""
        named += [room + name for name in re.findall(r"\w+\.py|(?<=; )\w+/", line)]
    package = ROOT / "basis_jax"
    there = [p.relative_to(package) for p in package.rglob("*.py") if p.stem != "__init__"]
    whole = {"verify", "tasks"}  # rooms whose modules are not named one by one
    modules = {str(p) for p in there if not whole & set(p.parts)}
    rooms = {f"{p.parts[0]}/" for p in there if len(p.parts) > 1}
    assert len(named) == len(set(named))
    models = {"weights/quickstart_model/", "weights/steps_model/"}
    assert set(named) == modules | rooms | models | {"data/tasks/"}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_path_in_the_text_exists(document):
    text = (ROOT / document).read_text()
    paths = re.findall(
        r"(?:configs|scripts|studies|benchmarks|tests|results|basis_jax)/[\w/]+\.(?:py|png|md)",
        text,
    )
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert paths and not missing
