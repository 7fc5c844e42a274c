"""Estimators of the user's own: what they declare, how a reference is loaded, what is refused."""

import hashlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from basis_jax import estimators
from basis_jax.config import EstimatorSection
from basis_jax.estimators import Definition, Signals
from basis_jax.training.session import make_estimator

FILE = """
import jax.numpy as jnp
from basis_jax import estimators


@estimators.stateless(needs=("rewards", "valid"))
def shifted(rewards, *, valid=None, shift=0.0):
    rewards, valid = estimators.rows.read(rewards, valid)
    values = jnp.full_like(rewards, shift)
    return estimators.rows.estimate(rewards - values, values, valid)


def start(successes, trials, *, features=None, first=0.5):
    rate = jnp.where(trials > 0, successes / jnp.maximum(trials, 1), first)
    return rate if features is None else rate + features[:, 0]


@estimators.stateful(
    start, needs=("rewards", "valid", "problem_ids"), takes=("table", "features")
)
def last_reward(state, signals, *, rate):
    rewards, valid = estimators.rows.read(signals.rewards, signals.valid)
    values = state[signals.problem_ids]
    state = state.at[signals.problem_ids].add(rate * jnp.where(valid, rewards - values, 0))
    return state, estimators.rows.estimate(rewards - values, values, valid)


def undeclared(rewards):
    return estimators.reinforce(rewards)


number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The file my_file.py in the current directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my_file.py"
    path.write_text(FILE)
    return path


def signals(rewards, ids, valid=None):
    n = len(rewards)
    return Signals(
        rewards=jnp.asarray(rewards, jnp.float32),
        valid=jnp.ones(n, bool) if valid is None else jnp.asarray(valid),
        problem_ids=jnp.asarray(ids, jnp.int32),
        lengths=jnp.arange(1, n + 1),
    )


# --------------------------------------------------------------------------------- declarations
def test_a_stateless_function_gets_exactly_what_it_declares():
    """Signals by their names, the table's rows of its problems, and its options."""
    seen = {}

    def spy(rewards, lengths, *, successes, trials, weight=1.0):
        seen.update(lengths=lengths, successes=successes, trials=trials, weight=weight)
        return estimators.reinforce(rewards)

    declared = Definition(spy, needs=("rewards", "lengths", "table"))
    assert declared.options == ("weight",) and declared.name == "spy"
    estimator = estimators.make(declared, weight=2.0)
    assert estimator.needs_table and estimator.takes_table
    state = estimator.init(np.float32([5, 6, 7]), np.float32([8, 9, 10]))
    estimator.update(state, signals([1, 0], [2, 0]))
    assert seen["weight"] == 2.0 and seen["lengths"].tolist() == [1, 2]
    assert seen["successes"].tolist() == [7, 5] and seen["trials"].tolist() == [10, 8]


def test_what_is_only_taken_is_not_needed():
    def spy(rewards, *, successes, trials, group_size):
        return estimators.reinforce(rewards)

    estimator = estimators.make(Definition(spy, needs=["rewards"], takes=["table", "group_size"]))
    assert not estimator.needs_table and estimator.takes_table and estimator.group_size == 1
    needed = Definition(spy, needs=["rewards", "group_size"], takes=["table"])
    assert estimators.make(needed, group_size=3).group_size == 3
    with pytest.raises(ValueError, match="spy compares the rollouts of a prompt .* 2 or more"):
        estimators.make(needed, group_size=1)
    with pytest.raises(ValueError, match="spy needs the option 'group_size'"):
        estimators.make(needed)


def test_a_decorated_function_stays_the_function_and_can_be_made():
    def rows(rewards, *, valid=None):
        return estimators.reinforce(rewards, valid=valid)

    assert estimators.stateless(needs=("rewards", "valid"))(rows) is rows
    assert jax.jit(rows)(jnp.float32([1, 0])).advantages.tolist() == [1, 0]
    invalid = signals([1, np.nan], [0, 1], valid=[True, False])
    assert estimators.make(rows).update((), invalid)[1].advantages.tolist() == [1, 0]


def of_rows(rewards, lengths, *, valid=None, scale=1.0):
    return estimators.reinforce(rewards)


def of_state(state, signals, *, rate=0.1, score=None):
    return state, estimators.reinforce(signals.rewards)


def start(successes, trials):
    return ()


@pytest.mark.parametrize(
    ("declaration", "words"),
    [
        (lambda: Definition(of_rows, needs="rewards"), r"give a tuple: needs=\('rewards',\)"),
        (lambda: Definition(of_rows, needs=("reward",)), "'reward', .* did you mean rewards"),
        (lambda: Definition(of_rows, needs=("rewards", "valid")), "parameter 'lengths' that noth"),
        (lambda: Definition(of_rows, needs=("rewards", "lengths")), "'valid' but neither needs"),
        (
            lambda: Definition(of_rows, needs=("rewards", "lengths", "valid", "table")),
            "no parameter 'successes'",
        ),
        (
            lambda: Definition(of_rows, needs=("rewards", "lengths", "valid", "features")),
            "'features', which only an init gets",
        ),
        (
            lambda: Definition(of_state, start, needs=("rewards",), takes=("features",)),
            "of_state has no parameter 'features'",
        ),
        (
            lambda: Definition(of_state, start, needs=("rewards",), options=("rat",)),
            "'rat' but has no such .* did you mean rate",
        ),
    ],
)
def test_a_declaration_that_does_not_match_the_functions_is_refused(declaration, words):
    with pytest.raises(ValueError, match=words):
        declaration()


def test_a_listed_option_leaves_the_other_parameters_to_callers_of_the_library():
    declared = Definition(of_state, start, needs=("rewards",), options=("rate",))
    assert estimators.option_names(declared) == {"rate"}
    assert estimators.option_names("spo") == {"decay", "convention", "low", "high"}


def wrong_rows(rewards):
    return {"advantages": rewards}


def wrong_shape(rewards):
    return estimators.reinforce(jnp.concatenate([rewards, rewards]))


def wrong_state(state, signals):
    return jnp.zeros(3), estimators.reinforce(signals.rewards)


def wrong_pair(state, signals):
    return estimators.reinforce(signals.rewards)


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        (
            Definition(wrong_rows, needs=("rewards",)),
            "wrong_rows returned type dict; a func",
        ),
        (Definition(wrong_pair, start, needs=("rewards",)), "wrong_pair returned type Estimate"),
        (Definition(wrong_shape, needs=("rewards",)), r"advantages float32\[2\] for 1 rows"),
        (Definition(wrong_state, start, needs=("rewards",)), r"turned a state .*float32\[3\]"),
    ],
)
def test_an_update_that_returns_something_else_is_refused_before_a_run(declared, words):
    with pytest.raises(ValueError, match=words):
        estimators.make(declared)


# ----------------------------------------------------------------------------------- references
def test_an_own_file_is_made_as_a_built_in_name_is(own):
    estimator = estimators.make("my_file.py:shifted", shift=0.25)
    _, e = jax.jit(estimator.update)(
        estimator.init(np.zeros(3), np.zeros(3)), signals([1, 0], [0, 1])
    )
    assert e.advantages.tolist() == [0.75, -0.25] and not estimator.takes_table

    estimator = estimators.make(f"{own}:last_reward", rate=1.0)  # a whole path, too
    assert estimator.takes_table and not estimator.needs_table
    state = estimator.init(np.float32([4, 0, 0]), np.float32([4, 2, 0]))
    state, e = jax.jit(estimator.update)(state, signals([0, 1], [0, 2]))
    assert e.values.tolist() == [1, 0.5] and state.tolist() == [0, 0, 1]


def test_a_module_on_the_import_path_is_named_with_dots(tmp_path, monkeypatch):
    package = tmp_path / "own_package_for_this_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "rules.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    name = "own_package_for_this_test.rules:shifted"
    assert estimators.option_names(name) == {"shift"}
    digest = hashlib.sha256(FILE.encode()).hexdigest()
    assert estimators.source_fingerprint(name) == digest
    for module in ("own_package_for_this_test", "own_package_for_this_test.rules"):
        monkeypatch.delitem(sys.modules, module)


def test_files_of_one_name_in_two_folders_do_not_meet(tmp_path):
    """Nor does an edited file keep its old content."""
    for folder, shift in (("a", "0.25"), ("b", "0.75")):
        (tmp_path / folder).mkdir()
        text = FILE.replace("shift=0.0", f"shift={shift}")
        (tmp_path / folder / "my_file.py").write_text(text)

    def value(folder):
        estimator = estimators.make(f"{tmp_path}/{folder}/my_file.py:shifted")
        return float(estimator.update((), signals([1], [0]))[1].values[0])

    assert [value("a"), value("b"), value("a")] == [0.25, 0.75, 0.25]
    assert "my_file" not in sys.modules
    (tmp_path / "a" / "my_file.py").write_text(FILE.replace("shift=0.0", "shift=0.50"))
    assert value("a") == 0.5
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "my_file.py", "my_file.py"]


def test_dataclasses_and_deferred_annotations_work_in_a_file(own):
    own.write_text(
        "from __future__ import annotations\nimport dataclasses, typing\n" + FILE + "\n\n"
        "@dataclasses.dataclass\nclass Pair:\n    first: int\n    kind: dataclasses.KW_ONLY = 1\n\n"
        "assert typing.get_type_hints(Pair)['first'] is int\n"
    )
    assert estimators.option_names("my_file.py:shifted") == {"shift"}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("none.py:shifted", {}, r"there is no file /.*/none.py; give an existing one as FILE.py:"),
        ("my_file.py:shift", {}, r"no estimator 'shift'; did you mean shifted\? \(allowed: last_r"),
        ("my_file.py:undeclared", {}, "not declared as an estimator .*function.; put @estimators"),
        ("my_file.py:number", {}, "it is of type int.; put @estimators.stateless"),
        ("my_file.py:", {}, "write FILE.py:NAME or package.module:NAME"),
        ("some/file:shifted", {}, "write FILE.py:NAME or package.module:NAME"),
        ("my_file.py", {}, "unknown estimator 'my_file.py'.*FILE.py:NAME"),
        ("no_such_package.a:b", {}, "no module no_such_package.a on the import path"),
        ("json.nothing:b", {}, "no module json.nothing on the import path"),
        ("my_file.py:shifted", {"shif": 1}, "my_file.py:shifted has no option 'shif'; did you me"),
        ("my_file.py:last_reward", {}, "my_file.py:last_reward needs the option 'rate'; give it"),
    ],
)
def test_a_wrong_reference_is_one_sentence(own, name, options, words):
    with pytest.raises(ValueError, match=words) as refused:
        estimators.make(name, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "x = 1\ny = z\n",
            "raised NameError in line 2 on import: name 'z' is not defined; c",
        ),
        ("def f(:\n", "raised SyntaxError on import: .*line 1"),
        ("raise OSError('two\\nlines')", "raised OSError in line 1 on import: two lines; correct"),
        (
            "import beside",
            "No module named 'beside'; .* folder of a file is not on the",
        ),
    ],
)
def test_a_file_that_raises_is_one_sentence_that_says_so(own, text, words):
    """And leaves no half of a module behind. A file beside it is not found, which is said."""
    (own.parent / "beside.py").write_text("")
    own.write_text(text)
    before = set(sys.modules)
    for call in (estimators.make, estimators.definition):
        with pytest.raises(ValueError, match=words) as refused:
            call("my_file.py:shifted")
        assert "\n" not in str(refused.value)
    assert set(sys.modules) == before


def test_a_module_that_raises_is_one_sentence_too(tmp_path, monkeypatch):
    (tmp_path / "broken_for_this_test.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    words = "broken_for_this_test raised ModuleNotFoundError on import: .*'no_such_package'; in"
    with pytest.raises(ValueError, match=words):
        estimators.make("broken_for_this_test:shifted")


def test_the_fingerprint_is_that_of_the_file(own):
    before = estimators.source_fingerprint("my_file.py:shifted")
    assert before == hashlib.sha256(FILE.encode()).hexdigest()
    own.write_text(FILE + "\n")
    assert estimators.source_fingerprint("my_file.py:shifted") != before
    assert {estimators.source_fingerprint(name) for name in estimators.ESTIMATORS} == {None}
    for name, words in (("bassis", "did you mean basis"), ("none.py:x", "there is no file")):
        with pytest.raises(ValueError, match=words):
            estimators.source_fingerprint(name)


# ---------------------------------------------------------------------------------- in a session
def test_a_run_gives_an_own_estimator_its_options_table_features_and_groups(own):
    section = EstimatorSection(
        name="my_file.py:last_reward", options={"rate": 0.5}, table_samples=0, features=2
    )
    estimator = make_estimator(section, group_size=1)
    assert estimator.init(np.zeros(3), np.zeros(3), features=np.ones((3, 2))).tolist() == [1.5] * 3
    text = FILE.replace("features=None", "features")  # without features there is no start
    text = text.replace('takes=("table", "features")', 'takes=("table",)')
    own.write_text(text.replace('"problem_ids")', '"problem_ids", "features")'))
    assert make_estimator(section, group_size=1).takes_table
    assert make_estimator(EstimatorSection(name="rloo"), group_size=4).group_size == 4


@pytest.mark.parametrize(
    ("changes", "group_size", "words"),
    [
        ({"name": "rloo"}, 1, "sampling.group_size is 1; give 2 or more"),
        ({"name": "rloo", "options": {"group_size": 2}}, 2, "give it as sampling.group_size"),
        ({"options": {"rat": 1}}, 1, "has no option 'rat'; did you mean rate"),
        ({"name": "my_file.py:shifted", "features": 2}, 1, "shifted takes no features"),
        ({"features": 0}, 1, "needs prompt features but estimator.features is 0"),
        ({"table_samples": 0, "features": 2}, 1, "needs a reference table but"),
    ],
)
def test_a_run_that_lacks_what_an_estimator_declares_is_refused(own, changes, group_size, words):
    text = FILE.replace('"problem_ids")', '"problem_ids", "table", "features")')
    own.write_text(text.replace(', takes=("table", "features")', ""))
    given = {"name": "my_file.py:last_reward", "options": {"rate": 1.0}} | changes
    if given["name"] != "my_file.py:last_reward" and "options" not in changes:
        given["options"] = {}
    with pytest.raises(ValueError, match=words):
        make_estimator(EstimatorSection(**given), group_size)
