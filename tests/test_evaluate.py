"""Held-out accuracy and its interval; completions written, resumed, and what is made of them."""

import dataclasses
import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from test_reference_table import (  # noqa: F401
    SAMPLING,
    SIZE,
    EvenLength,
    Numbers,
    build,
    origin,
    problems,
    setup,
)
from whole_runs import environment, lines, run, run_killed, small

from basis_jax.commands.evaluate import check_out
from basis_jax.config import Config, DataSection, EvalSection
from basis_jax.evaluation import completions
from basis_jax.evaluation.evaluate import (
    Evaluation,
    bootstrap_interval,
    evaluate,
    invalid_warning,
    problem_scores,
    protocol,
)
from basis_jax.evaluation.report import report, warnings
from basis_jax.files import replace_file
from basis_jax.model.sharding import make_mesh
from basis_jax.opening import rollout_setup
from basis_jax.opening.checks import check_evaluation
from basis_jax.verify import Verifier
from basis_jax.verify.verdicts import KINDS, verdict_of
from basis_jax.weights import huggingface

ROOT = Path(__file__).parents[1]


def test_the_interval_covers_the_mean_as_often_as_it_says():
    """300 data sets of 80 problems: a 95 % interval misses in 15 on average; more than 40 (or fewer
    than 2) has probability below 1e-6, the interval's own small error included."""
    rng = np.random.default_rng(0)
    missed = 0
    for trial in range(300):
        low, high = bootstrap_interval([rng.random(80) < 0.3], resamples=400, seed=trial)
        missed += not low <= 0.3 <= high
    assert 2 <= missed <= 40


def test_samples_of_a_problem_do_not_narrow_the_interval():
    """Copies of every score are the same information: clustered by problem, nothing changes."""
    scores = np.array([0.0, 1.0, 0.0, 0.0, 1.0] * 8)
    copied = problem_scores(np.repeat(scores, 16), np.ones(640, bool), 16)
    assert bootstrap_interval([copied]) == bootstrap_interval([scores])


def test_sets_weigh_equally_whatever_their_size():
    low, high = bootstrap_interval([np.ones(1000), np.zeros(3)])
    assert low == high == 0.5


def test_a_completion_without_a_verdict_counts_as_wrong():
    rewards = np.array([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert problem_scores(rewards, rewards > 0, 4).tolist() == [0.5, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("dead", [("one",), ("two",), ("one", "two")], ids=" ".join)
def test_a_set_without_a_verdict_ends_training_and_leaves_the_other_its_result(
    evaluation, tmp_path, dead
):
    """Where there is no other, evaluation ends too."""
    problems = evaluation.sets["one"]  # noqa: F811
    kept = {"one": np.arange(4), "two": np.arange(4)} | dict.fromkeys(dead, np.array([SIZE - 1]))
    sets = {
        name: dataclasses.replace(
            problems,
            problems=tuple(problems.problems[i] for i in rows),
            tokens=problems.tokens[rows],
            lengths=problems.lengths[rows],
        )
        for name, rows in kept.items()
    }
    sentence = "none of the [0-9]+ completions of {} could be graded"
    with pytest.raises(ValueError, match=sentence.format(dead[0])):
        evaluate(
            tiny.params(),
            evaluation.setup,
            sets,
            section=evaluation.config.eval,
            sampling=SAMPLING,
        )
    both = dataclasses.replace(evaluation, sets=sets)
    if len(dead) == 2:
        with pytest.raises(ValueError, match=sentence.format(dead[1])):
            write(both, tmp_path)
        return
    found, _ = write(both, tmp_path)
    (other,) = kept.keys() - {*dead}
    alone, _ = write(dataclasses.replace(evaluation, sets={other: sets[other]}), tmp_path / "alone")
    assert found["sets"] == alone["sets"] and found["average"] == alone["average"]
    assert list(found["failed"]) == [*dead] and alone["failed"] == {}
    assert re.fullmatch(
        rf"{dead[0]} has no result: {sentence.format(dead[0])}.*", warnings(found)[0]
    )
    assert len(lines(tmp_path / "completions.jsonl")) == SAMPLES * (4 + 1)


@pytest.mark.slow
def test_a_set_that_cannot_be_loaded_leaves_the_others_their_results(tmp_path, held_out):
    folder = tiny.write_folder(tmp_path / "tiny")
    (tmp_path / "broken.jsonl").write_text('{"problem": "2+2?", "answer": "4"}\n{"problem": 3\n')
    options = arguments(folder, held_out, tmp_path / "out")
    at = options.index("--eval.sets") + 1
    done = run(
        "evaluate.py", "qwen_math.py", *options[:at], tmp_path / "broken.jsonl", *options[at:]
    )
    assert done.returncode == 1
    name = f"{tmp_path}/broken.jsonl"
    assert f"{name} has no result: {name}, line 2: no whole JSON object" in done.stdout
    assert done.stderr.splitlines()[-1].startswith(f"error: no result for {name}; ")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["sets"]) == ["MATH-500", "AIME25"] and list(results["failed"]) == [name]
    assert "has no result" in (tmp_path / "out" / "report.html").read_text()
    again = [*options, "--eval.sets", tmp_path / "broken.jsonl"]
    done = run("evaluate.py", "qwen_math.py", *again)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(
        f"error: {name}, line 2"
    )


def test_before_and_after_use_the_same_noise_and_greedy_uses_none(setup, problems):  # noqa: F811
    def accuracy(temperature):
        return evaluate(
            tiny.params(),
            setup,
            {"one": problems, "two": problems},
            section=EvalSection(samples=4, temperature=temperature),
            sampling=SAMPLING,
        )

    first = accuracy(1.0)
    assert first == accuracy(1.0)
    assert first["eval/accuracy"] == pytest.approx(
        (first["eval/one/accuracy"] + first["eval/two/accuracy"]) / 2
    )
    assert first["eval/accuracy_low"] <= first["eval/accuracy"] <= first["eval/accuracy_high"]
    greedy = accuracy(0.0)
    assert (
        greedy["eval/accuracy"] == greedy["eval/greedy_accuracy"] == first["eval/greedy_accuracy"]
    )
    assert len(problems.problems) == SIZE


class Mixed(Verifier):
    """In turn: right, too late, no answer, and a right answer that cannot be read."""

    def grade(self, completions, answers):
        kinds = ("right", "timeout", "no_answer", "gold")
        return [verdict_of(kinds[i % 4], "") for i in range(len(completions))]


@pytest.mark.slow
def test_every_kind_of_verdict_has_its_share_among_all_held_out_completions(
    setup,  # noqa: F811
    problems,  # noqa: F811
):
    four = dataclasses.replace(
        problems,
        problems=problems.problems[:4],
        tokens=problems.tokens[:4],
        lengths=problems.lengths[:4],
    )
    metrics = evaluate(
        tiny.params(),
        dataclasses.replace(setup, verifier=Mixed(), rows_at_once=16),
        {"one": four},
        section=EvalSection(samples=4),
        sampling=dataclasses.replace(SAMPLING, max_new_tokens=1),
    )
    shares = {key: value for key, value in metrics.items() if key.startswith("eval/verify/")}
    expected = dict.fromkeys(("timeout", "no_answer", "gold"), 1 / 4)
    assert shares == {
        f"eval/verify/{kind}": expected.get(kind, 0.0)
        for kind in KINDS
        if kind not in ("right", "wrong")
    }
    assert metrics["eval/invalid"] == 1 / 4
    assert all(type(value) is float for value in metrics.values())


SAMPLES = 6
METRICS = ["avg@6", "pass@1", "pass@2", "pass@4", "maj@6"]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """As many batches as there are rows, and not one."""
    monkeypatch.setattr(completions, "ROWS_PER_SLOT", 1)


@pytest.fixture
def evaluation(setup, problems):  # noqa: F811
    """Two sets of five problems, six completions each in batches of four; the verifier fails on the
    last problem of each."""
    config = Config(run_dir="", sampling=SAMPLING, eval=EvalSection(samples=SAMPLES))
    sets = {"one": problems, "two": problems}
    return Evaluation(config=config, folder=Path(), setup=setup, sets=sets)


def write(evaluation, out, **changes):
    """The evaluation's results, and completions.jsonl as bytes."""
    out.mkdir(exist_ok=True)
    wanted = protocol(evaluation, tiny.params()) | changes
    with jax.set_mesh(evaluation.setup.mesh):
        path = completions.write_completions(
            tiny.params(), evaluation, out, wanted, report=lambda text: None
        )
    return completions.results(path, evaluation), path.read_bytes()


def test_written_completions_give_the_numbers_of_training_bit_for_bit(evaluation, tmp_path):
    trained = evaluate(
        tiny.params(),
        evaluation.setup,
        evaluation.sets,
        section=evaluation.config.eval,
        sampling=SAMPLING,
    )
    found, _ = write(evaluation, tmp_path)
    assert found["average"]["avg@6"] == {
        "value": trained["eval/accuracy"],
        "low": trained["eval/accuracy_low"],
        "high": trained["eval/accuracy_high"],
        "problems": 2 * SIZE,
    }
    assert 0 < trained["eval/accuracy"] < 1


def recomputed(rows, metric):
    """A metric of one set's lines, in plain Python."""
    name, k = metric.split("@")
    grouped, k, values = {}, int(k), []
    for row in rows:
        grouped.setdefault(row["uid"], []).append(row)
    for found in grouped.values():
        rewards = [row["reward"] if row["valid"] else 0 for row in found]
        n, c = len(found), sum(rewards)
        if name == "pass":
            values.append(1 - math.comb(n - int(c), k) / math.comb(n, k))
        elif name == "avg":
            values.append(c / n)
        elif name == "maj":
            by_vote = {}
            for row, reward in zip(found, rewards, strict=True):
                if row["vote"] is not None:
                    by_vote.setdefault(row["vote"], []).append(reward)
            most = max(map(len, by_vote.values()), default=0)
            first = [sum(of) / len(of) for of in by_vote.values() if len(of) == most]
            values.append(sum(first) / len(first) if first else 0)
    return sum(values) / len(values), len(values)


def test_results_are_those_recomputed_from_the_written_lines(evaluation, tmp_path):
    found, written = write(evaluation, tmp_path)
    rows = [json.loads(line) for line in written.splitlines()]
    assert len(rows) == 2 * SIZE * SAMPLES
    assert [row["sample"] for row in rows] == list(range(SAMPLES)) * 2 * SIZE
    assert len({row["completion"] for row in rows}) > SIZE, "samples of a problem differ"
    assert {(row["kind"], row["reward"], row["valid"]) for row in rows} == {
        ("right", 1.0, True),
        ("wrong", 0.0, True),
        ("failure", 0.0, False),
    }
    assert list(found["average"]) == METRICS
    for name, of_set in found["sets"].items():
        mine = [row for row in rows if row["set"] == name]
        for metric, entry in of_set["metrics"].items():
            value, count = recomputed(mine, metric)
            assert entry["value"] == pytest.approx(value, abs=1e-12), metric
            assert entry["problems"] == count == SIZE
            assert entry["low"] <= entry["value"] <= entry["high"]
        assert of_set["invalid"] == SAMPLES == sum(not row["valid"] for row in mine)
        assert of_set["tokens_mean"] == pytest.approx(np.mean([row["tokens"] for row in mine]))
        assert of_set["truncated"] == pytest.approx(np.mean([not r["terminated"] for r in mine]))


def test_results_follow_the_votes_and_rewards_that_stand_in_the_lines(evaluation, tmp_path):
    """Other votes, rewards and verdicts in the same lines: the numbers are recomputed of these."""
    _, written = write(evaluation, tmp_path)
    rows, rng = [json.loads(line) for line in written.splitlines()], random.Random(0)
    for row in rows:
        row["vote"], row["valid"] = rng.choice(["a", "a", "b", "c", None]), rng.random() < 0.8
        row["reward"] = float(row["valid"] and row["vote"] == "a")
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, of_set in completions.results(path, evaluation)["sets"].items():
        mine = [row for row in rows if row["set"] == name]
        found = {metric: entry["value"] for metric, entry in of_set["metrics"].items()}
        expected = {metric: recomputed(mine, metric)[0] for metric in METRICS}
        assert found == pytest.approx(expected, abs=1e-12)
        assert found["maj@6"] != pytest.approx(found["avg@6"])


def test_a_file_cut_anywhere_is_finished_bit_for_bit(evaluation, tmp_path):
    """Cut inside a line, at a line's end inside a batch, and at a batch's end."""
    found, whole = write(evaluation, tmp_path / "whole")
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in (0, 1, ends[2] - 1, ends[2], ends[3], ends[30] + 7, len(whole) - 1, len(whole)):
        out = tmp_path / str(cut)
        shutil.copytree(tmp_path / "whole", out)
        (out / "completions.jsonl").write_bytes(whole[:cut])
        again, written = write(evaluation, out)
        assert written == whole and again == found


def test_a_function_of_whole_batches_sees_no_copies(evaluation, tmp_path, problems, origin):  # noqa: F811
    """Batches of other verifiers are filled up to one shape. Each rollout is seen once, in an
    evaluation and in a reference table."""
    seen = []

    class Whole(EvenLength):
        whole_batches = True

        def judge(self, rows):
            seen.extend(row.prompt for row in rows)
            return super().judge(rows)

    own = dataclasses.replace(evaluation.setup, verifier=Whole())
    found, _ = write(dataclasses.replace(evaluation, setup=own), tmp_path / "own")
    expected = [f"p{i}" for i in range(SIZE) for _ in range(SAMPLES)] * 2
    assert sorted(seen) == sorted(expected)
    assert found == write(evaluation, tmp_path / "other")[0]
    seen.clear()
    with jax.set_mesh(own.mesh):
        build(tmp_path / "table.npz", own, problems, origin, samples=3)
    assert sorted(seen) == sorted([f"p{i}" for i in range(SIZE)] * 3)


def test_whole_lines_are_kept_and_not_made_again(evaluation, tmp_path, monkeypatch):
    """A set is 30 lines, which are 8 batches of 4; those wholly written are not sampled again."""
    _, whole = write(evaluation, tmp_path)
    marked = whole[:3000].rpartition(b"\n")[0].replace(b'"reason": ""', b'"reason": "kept"') + b"\n"
    kept = marked.count(b"\n")
    assert 4 < kept < 2 * SIZE * SAMPLES
    (tmp_path / "completions.jsonl").write_bytes(marked)
    made, complete = [], completions.complete
    monkeypatch.setattr(
        completions, "complete", lambda *a, **k: made.append(k["units"]) or complete(*a, **k)
    )
    _, written = write(evaluation, tmp_path)
    assert written.startswith(marked) and written.count(b"kept") == kept
    whole_batches = kept // 4 if kept < 30 else 8 + (kept - 30) // 4
    assert len(made) == 16 - whole_batches < 16


def test_batch_size_does_not_change_what_is_drawn(evaluation, tmp_path):
    _, whole = write(evaluation, tmp_path / "a")
    other = dataclasses.replace(evaluation.setup, rows_at_once=7)
    _, written = write(dataclasses.replace(evaluation, setup=other), tmp_path / "b")
    assert written == whole


def test_a_folder_of_another_protocol_is_refused_by_what_differs(evaluation, tmp_path):
    write(evaluation, tmp_path)
    warmer = dataclasses.replace(evaluation.config.eval, temperature=0.5)
    other = dataclasses.replace(
        evaluation, config=dataclasses.replace(evaluation.config, eval=warmer)
    )
    with pytest.raises(ValueError, match="temperature is 1.0 there and 0.5 here; take the values"):
        write(other, tmp_path)
    fewer = dataclasses.replace(evaluation, sets={"one": evaluation.sets["one"]})
    with pytest.raises(ValueError, match="another protocol: eval.sets is .* there and "):
        write(fewer, tmp_path)
    with pytest.raises(ValueError, match="weights_sha256"):
        write(evaluation, tmp_path, weights_sha256="0")
    (tmp_path / "protocol.json").unlink()
    with pytest.raises(ValueError, match="protocol.json cannot be read"):
        write(evaluation, tmp_path)


def test_the_protocol_knows_prompts_data_and_weights(evaluation):
    def changed(**of_set):
        sets = {"one": dataclasses.replace(evaluation.sets["one"], **of_set)}
        return protocol(dataclasses.replace(evaluation, sets=sets), tiny.params())["sets"]["one"]

    same, tokens = changed(), evaluation.sets["one"].tokens.copy()
    padding = np.argmin(evaluation.sets["one"].lengths), -1
    tokens[padding] += 1
    assert changed(tokens=tokens) == same, "padding is no part of a prompt"
    tokens[0, 0] += 1
    assert changed(tokens=tokens)["prompts_sha256"] != same["prompts_sha256"]
    problems = evaluation.sets["one"].problems  # noqa: F811
    other = (dataclasses.replace(problems[0], answer="7"), *problems[1:])
    assert changed(problems=other)["data_sha256"] != same["data_sha256"]
    weights = [protocol(evaluation, tiny.params(seed=s))["weights_sha256"] for s in (0, 0, 1)]
    assert weights[0] == weights[1] != weights[2]


def test_two_processes_do_not_write_to_the_same_folder(evaluation, tmp_path):
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'a+b'); fcntl.lockf(f, fcntl.LOCK_EX);"
        "print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "completions.jsonl")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another process is writing"):
            write(evaluation, tmp_path)
        process.stdin.close()
    write(evaluation, tmp_path)


def test_lines_that_are_not_the_plans_make_no_result(evaluation, tmp_path):
    _, whole = write(evaluation, tmp_path)
    path, rows = tmp_path / "completions.jsonl", whole.splitlines(keepends=True)
    for wrong, said in (
        ([rows[1], rows[0], *rows[2:]], "does not hold sample 0"),
        (rows[:-1], "does not hold sample 5"),
        ([*rows, rows[-1]], "more lines"),
        ([b"[]\n", *rows[1:]], "line 1 of .* is no JSON object"),
    ):
        path.write_bytes(b"".join(wrong))
        with pytest.raises(ValueError, match=said):
            completions.results(path, evaluation)


@pytest.mark.parametrize(
    ("verifier", "same"),
    [
        ("exact", [" 12", "12\n"]),
        ("math", [r"\boxed{\frac12}", r"\boxed{0.5}", "The answer is 1/2.", "#### x = .5"]),
        ("math", [r"\boxed{\text{Friday}}", r"\boxed{Friday}"]),
        ("math_strict", [r"\boxed{1,000}", r"\boxed{1000}", "#### 1000"]),
    ],
)
def test_answers_of_one_normalised_text_vote_alike(verifier, same):
    votes = {completions.vote(completions.extracted(c, verifier), verifier) for c in same}
    assert len(votes) == 1 and None not in votes
    others = [r"so \boxed{17}", "17"][verifier == "exact"]
    assert completions.vote(completions.extracted(others, verifier), verifier) not in votes


def test_the_answer_is_looked_for_where_the_verifier_is_told_to():
    text = "\\boxed{1}\n#### 2\nThe answer is 3.\nAnswer: 4"
    for verifier, mode, found in (
        ("math", "boxed", "1"),
        ("math", "hashes", "2"),
        ("math", "strict", "2"),
        ("math", "answer_line", "4"),
        ("math", "answer_tags", None),
        ("math", "", "4"),
        ("math_strict", "", "2"),
    ):
        assert completions.extracted(text, verifier, mode) == found, (verifier, mode)


def test_the_place_of_the_answer_reaches_the_verifier_the_lines_and_the_protocol(
    evaluation, tmp_path, monkeypatch
):
    """Every completion has two answers; with ``hashes`` the one after #### is graded and voted."""
    told = []
    monkeypatch.setattr(
        rollout_setup, "make_verifier", lambda name, mode: told.append((name, mode)) or Verifier()
    )
    config = dataclasses.replace(
        evaluation.config, data=DataSection(verifier="math", answer_mode="hashes")
    )
    folder = tiny.write_folder(tmp_path / "tiny")
    tokenizer = huggingface.load_tokenizer(folder)
    with rollout_setup.open_setup(
        config, folder, tiny.TINY, evaluation.setup.mesh, tokenizer
    ) as opened:
        assert told == [("math", "hashes")] and isinstance(opened.verifier, Verifier)
    monkeypatch.setattr(Numbers, "batch_decode", lambda *_, **__: ["\\boxed{1}\n#### 2"] * 4)
    other = dataclasses.replace(evaluation, config=config)
    _, written = write(other, tmp_path / "out")
    assert {json.loads(line)["extracted"] for line in written.splitlines()} == {"2"}
    with pytest.raises(
        ValueError, match="another protocol: data.verifier is .*hashes.* there and "
    ):
        write(evaluation, tmp_path / "out")


def test_a_completion_without_an_answer_has_no_vote():
    for verifier, text in (("exact", " "), ("math", "hm"), ("math_strict", "The answer is 5.")):
        assert completions.vote(completions.extracted(text, verifier), verifier) is None
    hostile = (
        "(" * 900, "9" * 999, "1e999", "x" * 5000, "\u0665", "1/0", "\\frac" * 160, "$$", "=",
        "\\", "{}", "x=", "\x00", r"0.\overline{" + "1" * 900 + "}",
    )  # fmt: skip
    for text in hostile:
        assert completions.vote(text, "math"), text


def test_an_answer_of_any_length_votes_in_no_time():
    text = "{" * 20_000 + "1" + "}" * 20_000
    started = time.perf_counter()
    assert completions.vote(text, "math") == text
    assert time.perf_counter() - started < 1


def test_a_hostile_completion_is_text_in_the_report(evaluation, tmp_path):
    """Markup, ends of elements, writing direction, escape sequences of a terminal, half a pair."""
    found, written = write(evaluation, tmp_path)
    attack = "</pre></details><script>alert(1)</script><img src=x onerror=y> &lt;"
    attack += " \u202e \x1b[2J \ud800"
    rows = [json.loads(line) for line in written.splitlines()]
    for key in ("completion", "extracted", "problem", "answer", "reason"):
        rows[0][key] = attack
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = {"evaluated": attack, "protocol": {attack: attack}}
    page = "".join(report(found, about, path))
    replace_file(tmp_path / "report.html", page)
    assert "<script" not in page and "<img" not in page
    assert "&lt;script&gt;" in page and "&amp;lt;" in page
    assert not {"\u202e", "\x1b", "\ud800"} & set(page) and "\\u202e" in page
    assert page.count("<pre>") == page.count("</pre>")
    assert page.count("<details>") == page.count("</details>") == 2 * SIZE + 1


def test_the_report_shows_every_problem_with_right_and_wrong_completions(evaluation, tmp_path):
    found, written = write(evaluation, tmp_path)
    page = "".join(
        report(found, {"evaluated": "x", "protocol": {}}, tmp_path / "completions.jsonl")
    )
    for name, start in (("one", 0), ("two", SIZE * SAMPLES)):
        part = page.split(f"<h2>{name}</h2>")[1].split("<h2>")[0]
        rows = [json.loads(line) for line in written.splitlines()][start : start + SIZE * SAMPLES]
        for number, section in enumerate(part.split("<details>")[1:]):
            mine = rows[number * SAMPLES : (number + 1) * SAMPLES]
            right = int(sum(row["reward"] for row in mine))
            assert section.startswith(f"<summary>{right}/{SAMPLES} right")
            assert (f", {SAMPLES} not graded:" in section) == (number == SIZE - 1)
            assert str(mine[0]["uid"]) in section and "2 more in completions.jsonl" in section
            assert section.count("<p class=right>") >= (right > 0)
            assert section.count("<p class=wrong>") >= (right < SAMPLES)


def test_the_title_of_the_report_says_what_was_evaluated(tmp_path):
    """Also with braces in its path."""
    (tmp_path / "completions.jsonl").touch()
    nothing = {"sets": {}, "average": {}, "failed": {}, "rules": {}}
    about = {"evaluated": "runs/{a}&b", "protocol": {}}
    page = "".join(report(nothing, about, tmp_path / "completions.jsonl"))
    assert "<title>Evaluation of runs/{a}&amp;b</title>" in page


def test_the_report_averages_only_several_sets(evaluation, tmp_path):
    """And its intervals have a line of their own."""
    for sets in (("one", "two"), ("one",)):
        chosen = dataclasses.replace(evaluation, sets={k: evaluation.sets[k] for k in sets})
        found, _ = write(chosen, tmp_path / "-".join(sets))
        about = {"evaluated": "m", "protocol": {}}
        page = "".join(report(found, about, tmp_path / "-".join(sets) / "completions.jsonl"))
        rows = [line for line in page.split("\n<") if line.startswith("tr><td>")]
        assert len(rows) == {2: 3, 1: 1}[len(sets)]
        assert ("<td>average</td>" in page) == ("<li>average:" in page) == (len(sets) == 2)
        assert re.search(r"<td>[0-9.]+%\n\[[0-9.]+%, [0-9.]+%\]</td>", page)


def test_completions_that_could_not_be_graded_are_said_aloud(evaluation, tmp_path):
    """By set where it stands alone, as a share of all while training; nothing where there are
    none."""
    found, _ = write(evaluation, tmp_path)
    sentence = "warning: 6 of 30 completions of {} (20.00%) could not be graded and count as wrong"
    assert [w.partition(";")[0] for w in warnings(found)] == [
        sentence.format(name) for name in ("one", "two")
    ]
    page = "".join(
        report(found, {"evaluated": "x", "protocol": {}}, tmp_path / "completions.jsonl")
    )
    assert all(f"<p>{sentence.format(name)}" in page for name in ("one", "two"))
    found["sets"]["two"]["invalid"] = 0
    assert len(warnings(found)) == 1
    shares = {"eval/invalid": 0.3, "eval/verify/gold": 0.2, "eval/verify/failure": 0.1}
    assert invalid_warning(shares) == (
        "warning: 30.00% of the held-out completions could not be graded and count as wrong "
        "(eval/invalid): 20.00% because the right answer cannot be read, 10.00% because the "
        "verifier failed"
    )
    assert invalid_warning(shares | {"eval/invalid": 0.0}) == invalid_warning({}) == ""


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        (EvalSection(temperature=0.0, samples=4), "eval.temperature 0 is greedy"),
        (EvalSection(samples=0), "eval.samples is 0"),
        (EvalSection(temperature=-1.0), "eval.temperature is -1.0"),
        (EvalSection(sets=()), "eval.sets is empty"),
    ],
)
def test_settings_that_make_no_evaluation_are_refused(section, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_evaluation(
            Config(run_dir="", eval=section), tiny.TINY, make_mesh(devices=jax.devices()[:1])
        )


def test_lengths_and_folders_that_do_not_fit_are_refused(tmp_path):
    long = dataclasses.replace(SAMPLING, max_new_tokens=250)
    with pytest.raises(ValueError, match="is 314 but the model has 256 positions"):
        check_evaluation(
            Config(run_dir="", sampling=long), tiny.TINY, make_mesh(devices=jax.devices()[:1])
        )
    four = make_mesh(data=1, fsdp=1, tensor=4)
    with pytest.raises(ValueError, match="key heads = 2 does not divide over 4 devices"):
        check_evaluation(Config(run_dir=""), tiny.TINY, four)
    (tmp_path / "file").touch()
    for out in ("", str(tmp_path / "file")):
        with pytest.raises(ValueError, match="folder is --out .*; give a folder"):
            check_out(out)


BOXED = "what is {}? put the answer in a box"


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """A folder that stands in for the hub, and training problems in another file."""
    path = tmp_path_factory.mktemp("data")
    for name, size in (("MATH-500", 13), ("AIME25", 5)):
        rows = [{"problem": BOXED.format(f"{i} + {size}"), "answer": str(i)} for i in range(size)]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(folder, held_out, out, *more):
    return [
        *("--model.path", folder, "--model.compute-dtype", "float32", "--out", out),
        *("--eval.folder", held_out, "--eval.sets", "MATH-500", "AIME25", "--eval.samples", 8),
        *("--eval.set-samples", "--eval.set-temperatures"),  # none of the config's
        *("--sampling.max-new-tokens", 12, "--data.max-prompt-tokens", 220, *more),
        *("--train.sample-rollouts", 8, "--mesh.fsdp", 1, "--mesh.data", 1),
    ]


def without_provenance(path):
    results = json.loads((path / "results.json").read_text())
    assert all(results.pop(key) for key in ("versions", "devices"))
    return {k: v for k, v in results.items() if k not in ("commit", "uncommitted_changes")}


@pytest.mark.slow
def test_an_evaluation_killed_at_any_moment_goes_on_bit_for_bit(tmp_path, held_out):
    """kill -9 at two random moments, on a model folder with benchmark names and local files."""
    folder, rng = tiny.write_folder(tmp_path / "tiny"), random.Random(0)
    options = arguments(folder, held_out, tmp_path / "whole")
    done = run("evaluate.py", "qwen_math.py", *options)
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in ("MATH-500", "AIME25", "average", "maj@8", "["))
    options = arguments(folder, held_out, tmp_path / "killed")
    written = tmp_path / "killed" / "completions.jsonl"
    for lines_wanted in (1, 60):
        run_killed(
            *("evaluate.py", "qwen_math.py", *options),
            written=written,
            line_count=lines_wanted,
            linger=rng.random() / 20,
        )
    done = run("evaluate.py", "qwen_math.py", *options)
    assert done.returncode == 0, done.stderr
    assert written.read_bytes() == (tmp_path / "whole" / "completions.jsonl").read_bytes()
    found = without_provenance(tmp_path / "killed")
    assert found == without_provenance(tmp_path / "whole")
    for name, of_set in found["sets"].items():
        mine = [row for row in lines(written) if row["set"] == name]
        assert len(mine) == of_set["completions"] == 8 * {"MATH-500": 13, "AIME25": 5}[name]
        for metric, entry in of_set["metrics"].items():
            assert entry["value"] == pytest.approx(recomputed(mine, metric)[0], abs=1e-12)
    greedy = run("evaluate.py", "qwen_math.py", *options, "--eval.temperature", 0)
    assert greedy.returncode != 0 and "error: eval.temperature 0 is greedy" in greedy.stderr
    warmer = run("evaluate.py", "qwen_math.py", *options, "--eval.temperature", 2)
    assert warmer.returncode != 0 and "temperature is 1.0 there and 2.0 here" in warmer.stderr


@pytest.mark.slow
def test_run_checkpoint_and_export_evaluate_to_the_runs_last_accuracy(tmp_path):
    """train.py, evaluate.py on the run, convert.py, evaluate.py on the folder: one number."""
    folder = tiny.write_folder(tmp_path / "tiny")
    problems = tmp_path / "p.jsonl"  # noqa: F811
    rows = [{"problem": f"what is {i}?", "answer": str(i % 10)} for i in range(40)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"eval.samples": 4, "eval.size": 20, "data.verifier": "math", "train.steps": 2}
    options = small(folder, problems, tmp_path / "run", **changes)
    done = run("train.py", "quickstart.py", *options)
    assert done.returncode == 0, done.stderr
    found = {}
    for name, option in (("run", "--checkpoint"), ("hf", "--model.path")):
        if name == "hf":
            exported = ["run", tmp_path / "run", "--to", tmp_path / "hf", "--shard-gb", 2e-5]
            script = [sys.executable, str(ROOT / "scripts" / "convert.py"), *map(str, exported)]
            subprocess.run(script, check=True, env=environment())
            assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
        out = tmp_path / f"of_{name}"
        more = [*options, option, tmp_path / name, "--out", out]
        done = run("evaluate.py", "quickstart.py", *more)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads((out / "results.json").read_text())["average"]["avg@4"]
    last = lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["step"] == 2 and found["run"]["value"] == last["eval/accuracy"]
    assert found["run"]["low"] == last["eval/accuracy_low"]
    assert found["hf"] == found["run"]
    both = [(tmp_path / f"of_{name}" / "completions.jsonl").read_bytes() for name in found]
    assert both[0] == both[1]
    assert (tmp_path / "of_hf" / "protocol.json").read_bytes() == (
        tmp_path / "of_run" / "protocol.json"
    ).read_bytes()
