"""The documents say what is there: examples run, commands parse, links and names exist, and pages
made from the code are current."""

import functools
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from whole_runs import documented_metrics

from basis_jax import command_line, estimators
from basis_jax.commands import COMMANDS, train
from basis_jax.data.tasks import number_words
from basis_jax.estimators.registry import LIBRARY_ONLY
from basis_jax.runs.identity import MAY_DIFFER
from basis_jax.training.session import open_session

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
PAGES = {path.stem: path.read_text() for path in sorted(DOCS.glob("*.md"))}
DOCUMENTS = {"README.md": README, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text()} | {
    f"docs/{name}.md": text for name, text in PAGES.items()
}


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


# ------------------------------------------------------------------------------------- README
def test_the_estimator_example_runs_and_its_values_are_better_than_the_batch_mean(capsys):
    scope = {}
    exec(blocks(README, "python")[0], scope)
    error = float(capsys.readouterr().out.split()[0])
    assert 0 < error < 0.3 * float(scope["values"].var())


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150 and len(README.split()) <= 1200
    assert max(map(len, README.splitlines())) <= 120


QUESTIONS = {  # what a stranger asks: the page with the answer, and words of the answer
    "my CSV with the columns question and gold": ("your-own-task", "--data.answer-field gold"),
    "which estimator without a table": ("choosing-an-estimator", "--estimator.table-samples 0"),
    "where the baseline is computed": ("how-it-works", "basis_jax/estimators/batchwise.py"),
    "what fits on 24 GB": ("memory", "On 24 GB"),
    "my reward is a Python function": ("your-own-task", "(own-reward.md)"),
    "why did it stop": ("faq", "## My run stopped"),
    "why does it not rise": ("faq", "## My reward does not rise"),
    "how to resume": ("resume", "The same command again resumes the run"),
    "what must not change": ("resume", "## What must not change"),
    "what was measured on what": ("results", "What was measured, on what"),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_answer_is_one_click_from_the_readme(question):
    page, words = QUESTIONS[question]
    assert f"](docs/{page}.md)" in README and words in PAGES[page]


# ------------------------------------------------------------------------------------- paths
def test_the_tree_names_every_room_and_every_module_once():
    tree = DOCUMENTS["CONTRIBUTING.md"].split("```\nbasis_jax/\n")[1].split("\nconfigs/")[0]
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


PATH = r"(?:configs|scripts|studies|benchmarks|tests|results|examples|docs|basis_jax)/[\w/-]+\.\w+"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_in_the_text_exists(document):
    paths = re.findall(rf"(?<![\w/-]){PATH}", DOCUMENTS[document])
    missing = {path for path in paths if not (ROOT / path).exists()}
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document):
    folder = (ROOT / document).parent
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", DOCUMENTS[document])
    missing = {link for link in links if not (folder / link).exists()}
    assert not missing


def test_the_site_shows_every_page():
    shown = set(re.findall(r"([\w-]+)\.md\n", (ROOT / "mkdocs.yml").read_text()))
    assert PAGES.keys() <= shown


@pytest.mark.parametrize("name", ["estimators", "train_tiny"])
def test_the_notebooks_show_what_they_draw(name):
    """Every cell was run, in order, and each picture is there."""
    cells = json.loads((ROOT / "examples" / f"{name}.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        drawn = any("image/png" in output.get("data", {}) for output in cell["outputs"])
        assert drawn == ("plt.subplots" in "".join(cell["source"]))


# ------------------------------------------------------------------------------------- commands
def commands(text):
    """The lines of the shell blocks, those that a backslash continues joined."""
    for block in blocks(text, "bash"):
        yield from re.sub(r"\\\n\s*", "", block).splitlines()


def inline_code(text):
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", outside)]


PROGRAM = r"(?:basis-jax|python scripts/)\s*([\w-]+)(?:\.py)?((?: [^'&#]+| '[^']*')*)"
STARTED = [
    (name.replace("_", "-"), arguments.strip())
    for text in DOCUMENTS.values()
    for line in [*commands(text), *inline_code(text)]
    for name, arguments in re.findall(PROGRAM, re.sub(r" +# .*", "", line))
    if arguments.strip() and not arguments.strip().startswith("--help")
]
"""Every command of this package on a page, also inside another command or a sentence."""


def started(*names):
    return sorted({(name, arguments) for name, arguments in STARTED if name in names})


@pytest.mark.parametrize(
    ("name", "line"), started("train", "evaluate", "reference-stats"), ids=lambda text: text[:120]
)
def test_every_command_of_the_pages_is_accepted(name, line, tmp_path, monkeypatch):
    """Its configuration exists, its fields do, and its values have their types."""
    monkeypatch.chdir(ROOT)
    (example,) = [b for b in blocks(PAGES["getting-started"], "python") if "def config" in b]
    (tmp_path / "gsm8k.py").write_text(example)
    line = line.replace("gsm8k.py", str(tmp_path / "gsm8k.py"))
    line = re.sub(r"\$\([^)]*\)", "HOST", line)
    arguments = [{"S": "0"}.get(word, word) for word in shlex.split(line)]  # a seed
    command = importlib.import_module(f"basis_jax.commands.{name.replace('-', '_')}")
    command_line.parse("", options=command.OPTIONS, flags=train.FLAGS, argv=arguments)


ELSEWHERE = ("MODEL_FOLDER", "Qwen/", "qwen_math", "gsm8k", "mine.jsonl")
"""Models and files that the reader brings."""


@pytest.fixture(scope="module")
def files_of_the_pages(tmp_path_factory):
    """A folder with the files that the commands name: the quickstart's problems as CSV files, the
    examples, what they write, and the page's own estimators."""
    folder = tmp_path_factory.mktemp("pages")
    for name, held_out in (("train.csv", False), ("test.csv", True)):
        rows = [f"{p.prompt},{p.answer}\n" for p in number_words.problems(held_out=held_out)]
        (folder / name).write_text("question,gold\n" + "".join(rows))
    (folder / "examples").symlink_to(ROOT / "examples")
    (own,) = [b for b in blocks(PAGES["estimators"], "python") if b.startswith("# my_estimators")]
    (folder / "my_estimators.py").write_text(own)
    write = [sys.executable, "examples/own_data.py", "problems.jsonl"]
    subprocess.run(write, cwd=folder, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        line
        for _, line in started("train")
        if re.search(r"\.py:|--data\.path", line) and not any(name in line for name in ELSEWHERE)
    ],
    ids=lambda text: text[:120],
)
def test_a_run_with_files_of_its_own_opens_as_the_page_says(line, files_of_the_pages, monkeypatch):
    """Its problems, columns, functions and sizes fit each other."""
    monkeypatch.chdir(files_of_the_pages)
    arguments = [{"S": "0"}.get(word, word) for word in shlex.split(line)]  # a seed
    config, _ = command_line.parse("", options=train.OPTIONS, argv=arguments)
    with open_session(config, lambda line: None, training=True):
        pass


def options_in(line):
    return {word.split("=")[0] for word in shlex.split(line) if word.startswith("--")}


@pytest.mark.parametrize(
    ("name", "line"), started("generate", "plot", "convert"), ids=lambda text: text[:120]
)
def test_every_option_of_the_other_commands_exists(name, line):
    text = (ROOT / "basis_jax" / "commands" / f"{name}.py").read_text()
    for option in options_in(line):
        parameter = option[2:].replace("-", "_")
        assert f'"{option}"' in text or re.search(rf"^    {parameter}: ", text, re.MULTILINE)


def test_the_pages_start_commands_that_there_are():
    assert {name for name, _ in STARTED} == {*COMMANDS}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_field_that_a_page_names_exists(document):
    """As an option, and as ``section.field`` in the text; names of other libraries stand apart."""
    known = {*command_line.field_names(command_line.load_config("quickstart"))}
    sections = "|".join({name.split(".")[0] for name in known if "." in name})
    text = DOCUMENTS[document]
    named = {name.replace("-", "_") for name in re.findall(r"--(?:no-)?(\w+\.[\w-]*\w)", text)}
    for code in inline_code(text) if document != "docs/coming-from.md" else ():
        named |= {*re.findall(rf"(?<![\w./-])((?:{sections})\.[a-z]\w+)(?![\w/(.])", code)}
    files = {name for name in named if name.endswith((".csv", ".jsonl", ".json", ".parquet"))}
    assert named - files <= known | {"data.benchmarks"}  # a module


def test_the_configurations_of_the_pages_are_built(tmp_path):
    found = [b for text in PAGES.values() for b in blocks(text, "python") if "def config" in b]
    assert len(found) == 2
    for number, text in enumerate(found):
        path = tmp_path / f"config_{number}.py"
        path.write_text(text)
        command_line.load_config(path)


STUDY = r"python -m ((?:studies|benchmarks)\.[a-z_]+)([^#&]*)"


@pytest.mark.parametrize(
    ("module", "line"),
    sorted(
        {
            (module, arguments.strip())
            for text in DOCUMENTS.values()
            for code in [*commands(text), *inline_code(text)]
            for module, arguments in re.findall(STUDY, code)
        }
    ),
    ids=lambda text: text[:120],
)
def test_studies_and_benchmarks_take_the_options_of_the_pages(module, line):
    text = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
    overrides = re.search(r"command_line\.parse\(|parse_known_args\(", text)  # fields, tested above
    text += (ROOT / "basis_jax" / "command_line.py").read_text()  # for --config
    for option in options_in(line):
        if overrides and "." in option:
            continue
        parameter = option[2:].replace("-", "_")
        assert f'"{option}"' in text or re.search(rf"^    {parameter}: ", text, re.MULTILINE)


# ------------------------------------------------------------------------------------- from code
def rows_of(page, heading):
    """The cells of each row of the first table under a heading, without its first two lines."""
    table = page.split(f"{heading}\n")[1].split("\n| ", 1)[1].split("\n\n")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]


def test_the_page_about_resuming_names_every_field_that_may_change():
    cells = " ".join(row[0] for row in rows_of(PAGES["resume"], "## What may change"))
    named = {name.removesuffix("*") for name in re.findall(r"`([\w.]+\*?)`", cells)}
    sections = {f"{name}." for name in named if "." not in name} - {"run_dir."}
    fields = {name for name in named if f"{name}." not in sections}
    assert fields | sections == {*MAY_DIFFER, "train.steps"}


@pytest.mark.parametrize(
    "cells", rows_of(PAGES["memory"], "# Memory: what fits on which card"), ids=" ".join
)
def test_the_table_of_cards_is_what_a_dry_run_prints(cells, monkeypatch, capsys):
    card, model, flags, most = cells
    flags = flags.split("`")[1] if flags else ""
    if "--config" not in flags:
        name = f"Qwen/{model.split(',')[0]}-Instruct"
        flags += f" --config gsm8k --model.path {name} --train.microbatch-rollouts auto"
        flags += " --train.sample-rollouts auto"
    chip = {"24 GB": "rtx4090", "80 GB": "h100"}[card]
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setattr("sys.argv", ["", *flags.split(), "--dry-run", "--topology", chip])
    with pytest.raises(SystemExit) as ended:
        train.main()
    shown = re.findall(r": ([\d.]+) GB a device \(", capsys.readouterr().out)
    assert f"{max(map(float, shown)):g} GB" in most
    assert bool(ended.value.code) == ("does not fit" in most)


def test_the_page_of_the_configuration_is_current(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import make_configuration

    made, there = make_configuration.page(), PAGES["configuration"]
    assert made == there, "run python docs/make_configuration.py"
    assert "|  |\n" not in made  # every field says what it means
    sys.modules.pop("make_configuration")


def test_the_page_of_the_estimators_documents_every_public_name_once():
    named = re.findall(r"^::: basis_jax\.estimators\.(\w+)$", PAGES["estimators"], re.MULTILINE)
    assert sorted(named) == sorted(estimators.__all__)


def test_the_choice_is_among_all_estimators_and_says_which_need_a_table():
    page = PAGES["choosing-an-estimator"].split("## Options worth knowing")[0]
    rows = {}
    for line in page.splitlines():
        if re.match(r"\| `", line):
            cells = line.strip("|").split("|")
            rows |= {name: cells[1] for name in re.findall(r"`(\w+)`", cells[0])}
    assert rows.keys() >= estimators.ESTIMATORS.keys() | LIBRARY_ONLY.keys()
    for name, declared in estimators.ESTIMATORS.items():
        assert ("offline table" in rows[name]) == ("table" in declared.needs), name
        assert ("score norms" in rows[name]) == ("score_norms" in declared.needs), name


@functools.cache
def infos(name):
    """The scalars that an estimator reports; nothing is compiled for it."""
    declared = estimators.definition(name)
    group = {"group_size": 4} if "group_size" in declared.needs else {}
    tries = {"k": 2} if name == "pass_at_k" else {}
    estimator = estimators.make(name, **group, **tries)
    signals = estimators.Signals(
        rewards=jnp.zeros(8),
        valid=jnp.ones(8, bool),
        problem_ids=jnp.arange(8),
        lengths=jnp.ones(8, jnp.int32),
        score_norms=jnp.ones(8),
        logprob_sum=jnp.zeros(8),
        start_values=jnp.zeros(8),
        greedy_rewards=jnp.zeros(8),
    )
    state = estimator.init(np.zeros(9, np.int32), np.full(9, 8, np.int32))
    _, estimate = jax.eval_shape(estimator.update, state, signals)
    return {key for key, value in estimate.info.items() if value.ndim == 0}


@pytest.mark.parametrize("name", [*estimators.ESTIMATORS, "spo+least_variance"])
def test_every_number_that_an_estimator_reports_is_among_the_metrics(name):
    assert {f"estimate/{key}" for key in infos(name)} <= documented_metrics()
