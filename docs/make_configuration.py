"""Write docs/configuration.md: every field of the configuration, read off basis_jax/config.py.

    python docs/make_configuration.py

A field's text is the string below it in that file, its range that of basis_jax/opening/ranges.py.
"""

import ast
import dataclasses
from pathlib import Path

from basis_jax.config import Config
from basis_jax.opening.ranges import RANGES

ROOT = Path(__file__).resolve().parent.parent
SOURCE, PAGE = ROOT / "basis_jax" / "config.py", ROOT / "docs" / "configuration.md"
START = """# Configuration

<!-- Made by `python docs/make_configuration.py` from basis_jax/config.py; do not edit. -->

A run is described by one `Config`. A file with a function `config()` returns it: `--config FILE`,
or the name of a packaged one (`basis-jax --help` lists them). Any field can be changed on the
command line: `--optim.lr 3e-6`, `--data.problem-field question` (with dashes or underscores),
`--estimator.options KEY VALUE ...`. A misspelt field is refused with the ones that are near.
`basis-jax train --help` lists them all.

The defaults below are those of the classes; a config file sets its own. Which fields may change
when a run is resumed: [resume](resume.md).
"""


def described() -> dict[str, tuple[str, dict[str, str]]]:
    """For each class of config.py its docstring, and the text below each of its fields."""
    found = {}
    for node in ast.parse(SOURCE.read_text()).body:
        if isinstance(node, ast.ClassDef):
            texts = {}
            for field, below in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    said = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                    text = str(below.value.value) if said else ""  # type: ignore[union-attr]
                    texts[field.target.id] = " ".join(text.split())
            found[node.name] = (ast.get_docstring(node) or "", texts)
    return found


def table(section: object, prefix: str) -> list[str]:
    """The fields of a section as a table; sections inside it are left out."""
    _, texts = described()[type(section).__name__]
    lines = ["| field | default | allowed | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        name, value = f"{prefix}{field.name}", getattr(section, field.name)
        if not dataclasses.is_dataclass(value):
            allowed = str(RANGES.get(name, ""))
            text = texts[field.name].replace("``", "`").replace("|", "\\|")
            lines.append(f"| `{name}` | `{shown(value)}` | {allowed} | {text} |")
    return lines


def shown(value: object) -> str:
    """A default as it is written on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "(none)"
    return "(none)" if value in ("", {}) else str(value)


def page() -> str:
    config = Config(run_dir="(required)")
    parts = [START, "## The run\n", *table(config, ""), ""]
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        if dataclasses.is_dataclass(section):
            about = " ".join(described()[type(section).__name__][0].split()).replace("``", "`")
            parts += [f"## {field.name}\n", *([about, ""] if about else [])]
            parts += [*table(section, f"{field.name}."), ""]
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")
