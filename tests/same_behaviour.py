"""Do two commits behave alike? The check for moving code without changing what it does.

    python tests/same_behaviour.py 7dfe39e            # HEAD against an older commit
    python tests/same_behaviour.py 7dfe39e --only source

It compares, and exits with 1 where something differs:

- source: every top-level statement of the package, scripts and studies is there once again, imports
  and module docstrings aside, in whatever file it stands now; and of every test function only
  imports changed;
- tests: at least as many tests are collected;
- run: ten quickstart steps write the same metrics (wall times and compile counts aside), the same
  samples and the same checkpoint, bit for bit;
- programs: every program that these steps compile is the same StableHLO text, without source
  locations and names of functions;
- resume: the older commit's checkpoint of step 5, resumed by the newer one, ends with the same
  metrics, samples and checkpoint.

Results of the older commit are kept in ``--work``, so that the next comparison takes half the time.
Both commits run in the environment that starts this script.
"""

import argparse
import ast
import collections
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("basis_jax", "scripts", "studies", "benchmarks", "configs")
STEPS, MIDDLE = 10, 5
LOCATION = re.compile(r' loc\((?:#loc\d*|unknown|"[^"]*"(?:\([^()]*\))?)\)')
CHANGING = ("time/", "throughput/", "compile/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old")
    parser.add_argument("new", nargs="?", default="HEAD")
    parser.add_argument("--work", type=Path, default=Path("/tmp/same_behaviour"))
    parser.add_argument("--only", nargs="*", default=["source", "tests", "run", "resume"])
    options = parser.parse_args()
    old, new = (export(commit, options.work) for commit in (options.old, options.new))
    differences = []
    if "source" in options.only:
        differences += compare_sources(old, new) + compare_tests(old, new)
    if "tests" in options.only:
        differences += compare_counts(collected(old), collected(new))
    if {"run", "resume"} & set(options.only):
        before = trained(old, old / "run")
        if "run" in options.only:
            after = trained(new, new / "run")
            differences += compare_runs(before, after)
            differences += compare_counters("program", programs(before), programs(after))
        if "resume" in options.only:
            differences += compare_runs(before, resumed(new, before, new / "resumed"))
    print("\n".join(differences) or f"{options.new} behaves as {options.old}")
    sys.exit(1 if differences else 0)


def export(commit: str, work: Path) -> Path:
    """The files of a commit in a folder named after it."""
    name = git("rev-parse", "--short", commit)
    folder = work / name
    if not folder.exists():
        folder.mkdir(parents=True)
        archive = subprocess.run(
            ["git", "-C", ROOT, "archive", commit], check=True, capture_output=True
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    return folder


def git(*command: str) -> str:
    done = subprocess.run(["git", "-C", ROOT, *command], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def statements(tree: Path) -> collections.Counter:
    """Top-level statements of all files, imports and docstrings of modules left out."""
    found = collections.Counter()
    for path in (p for folder in FOLDERS for p in (tree / folder).rglob("*.py")):
        body = [n for n in ast.parse(path.read_text()).body if not is_import(n)]
        if body and isinstance(body[0], ast.Expr):
            body = body[1:]
        found.update(ast.unparse(without_imports(node)) for node in body)
    return found


def is_import(node: ast.AST) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def without_imports(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [n for n in node.body if not is_import(n)] or [ast.Pass()]
    return tree


def compare_sources(old: Path, new: Path) -> list[str]:
    return compare_counters("statement", statements(old), statements(new))


def compare_counters(kind: str, old: collections.Counter, new: collections.Counter) -> list[str]:
    """Items that one side has more often than the other."""
    gone, come = old - new, new - old
    return [f"{kind} gone: {str(item)[:300]}" for item in gone] + [
        f"{kind} new: {str(item)[:300]}" for item in come
    ]


def compare_tests(old: Path, new: Path) -> list[str]:
    """Test functions of the older commit that are gone or have another body."""
    before, after = functions(old / "tests"), functions(new / "tests")
    return [f"test changed: {name}" for name in before if after.get(name) != before[name]]


def functions(folder: Path) -> dict[str, str]:
    found = {}
    for path in folder.glob("test_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                found[f"{path.name}:{node.name}"] = ast.unparse(without_imports(node))
    return found


def collected(tree: Path) -> int:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"],
        cwd=tree,
        env=environment(tree),
        capture_output=True,
        text=True,
    )
    match = re.search(r"(\d+) tests? collected", done.stdout)
    return int(match.group(1)) if match else 0


def compare_counts(old: int, new: int) -> list[str]:
    print(f"tests collected: {old} then, {new} now")
    return [f"{new} tests are collected, {old} were"] if new < old else []


def environment(tree: Path, **more: str) -> dict[str, str]:
    settings = {"PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu", "PYTHONHASHSEED": "0"}
    return {**os.environ, **settings, **more}


def train(tree: Path, run_dir: Path, **more: str) -> None:
    command = [sys.executable, tree / "scripts/train.py", "--config", "configs/quickstart.py"]
    command += ["--run-dir", run_dir, "--train.steps", str(STEPS)]
    command += ["--checkpoint.every", str(MIDDLE), "--checkpoint.keep", "2"]
    subprocess.run(
        list(map(str, command)),
        cwd=tree,
        env=environment(tree, **more),
        check=True,
        stdout=subprocess.DEVNULL,
    )


def trained(tree: Path, run_dir: Path) -> Path:
    """The folder of a run of ten steps, and the programs that it compiled beside it."""
    if not (run_dir / "curves.png").exists():
        shutil.rmtree(run_dir, ignore_errors=True)
        train(tree, run_dir, JAX_DUMP_IR_TO=str(run_dir.with_name("programs")))
    return run_dir


def resumed(tree: Path, before: Path, run_dir: Path) -> Path:
    """A copy of the run without its last checkpoint, resumed by the code of ``tree``."""
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(before, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / str(STEPS))
    train(tree, run_dir)
    return run_dir


def compare_runs(old: Path, new: Path) -> list[str]:
    differences = []
    for before, after in zip(metrics(old), metrics(new), strict=True):
        keys = [k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k)]
        differences += [
            f"{new}: {key} of step {before['step']} is {after.get(key)}, was {before.get(key)}"
            for key in keys
        ]
    if (old / "samples.jsonl").read_bytes() != (new / "samples.jsonl").read_bytes():
        differences.append(f"{new}: samples.jsonl differs")
    then, now = state_hashes(old), state_hashes(new)
    return differences + [
        f"{new}: checkpoint leaf {name} differs"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]


def metrics(run_dir: Path) -> list[dict]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith(CHANGING)} for line in lines]


def state_hashes(run_dir: Path) -> dict[str, str]:
    """sha256 of every leaf of the last checkpoint, by its name."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    state = ocp.StandardCheckpointer().restore(run_dir / "checkpoints" / str(STEPS) / "state")
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
        for path, leaf in leaves
    }


def programs(run_dir: Path) -> collections.Counter:
    """Name and hash of every dumped program; names of functions inside are replaced by numbers."""
    found = collections.Counter()
    for path in run_dir.with_name("programs").glob("*.mlir"):
        text = re.sub(r"^#loc.*\n", "", path.read_text(), flags=re.MULTILINE)
        text = LOCATION.sub("", text)
        numbers: dict[str, str] = {}
        text = re.sub(r"@[\w.]+", lambda m, n=numbers: n.setdefault(m.group(), f"@{len(n)}"), text)
        found[hashlib.sha256(text.encode()).hexdigest()] += 1
    return found


if __name__ == "__main__":
    main()
