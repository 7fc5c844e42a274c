"""Output of a stand-alone evaluation for people: a table of the main metrics, and ``report.html``
with every problem."""

import html
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from basis_jax.evaluation.completions import read_lines
from basis_jax.verify.verdicts import RIGHT_ABOVE

COMPLETIONS_SHOWN = 4  # per problem
CHARACTERS_SHOWN = 4000  # at the end of a completion, where the answer is


def table(found: Mapping[str, Any]) -> list[str]:
    """The main metrics as lines of text, in percent with their interval."""
    shown = main_metrics(found)
    lines = [["set", "problems", "invalid", "cut short", *shown]]
    for name, of_set in found["sets"].items():
        sizes = [str(of_set["problems"]), str(of_set["invalid"]), f"{of_set['truncated']:.1%}"]
        lines.append([name, *sizes, *(percent(of_set["metrics"].get(m)) for m in shown)])
    if len(found["sets"]) > 1:
        lines.append(["average", "", "", "", *(percent(found["average"].get(m)) for m in shown)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines]
    return ["  ".join(line).rstrip() for line in padded]


def main_metrics(found: Mapping[str, Any]) -> list[str]:
    """avg@k, pass@1, pass@k and maj@k of every set, and ``accuracy`` if sets differ in k."""
    chosen = ["accuracy"] if "accuracy" in found["average"] else []
    for of_set in found["sets"].values():
        names = list(of_set["metrics"])
        chosen += [names[0], names[1], names[-2], names[-1]]
    return list(dict.fromkeys(chosen))


def warnings(found: Mapping[str, Any]) -> list[str]:
    """One sentence for each set without a result, and for each set with completions that could not
    be graded."""
    failed = [f"{name} has no result: {why}" for name, why in found["failed"].items()]
    return failed + [
        f"warning: {of_set['invalid']} of {of_set['completions']} completions of {name} "
        f"({of_set['invalid'] / of_set['completions']:.2%}) could not be graded and count as "
        "wrong; kind and reason in completions.jsonl say why"
        for name, of_set in found["sets"].items()
        if of_set["invalid"]
    ]


def percent(metric: Mapping[str, float | int] | None) -> str:
    if metric is None:
        return ""
    return f"{metric['value']:.1%} [{metric['low']:.1%}, {metric['high']:.1%}]"


def two_lines(metric: Mapping[str, float | int] | None) -> str:
    """``percent`` for a cell of the report, the interval below the value."""
    return percent(metric).replace(" [", "\n[")


def report(found: Mapping[str, Any], about: Mapping[str, Any], path: Path) -> Iterator[str]:
    """The parts of report.html. Text from a model or a file is escaped."""
    yield HEAD.format(title=text(about["evaluated"]))
    yield f"<h1>Evaluation</h1>\n<p class=about>{text(about['evaluated'])}</p>\n"
    yield "<div class=wide><table>\n"
    several = len(found["sets"]) > 1
    every = (found["average"], *(of_set["metrics"] for of_set in found["sets"].values()))
    names = list(dict.fromkeys(name for metrics in every for name in metrics))
    yield row("th", ["set", "problems", "invalid", "cut short", *names])
    for name, of_set in found["sets"].items():
        sizes = [name, of_set["problems"], of_set["invalid"], f"{of_set['truncated']:.1%}"]
        yield row("td", [*sizes, *(two_lines(of_set["metrics"].get(m)) for m in names)])
    if several:
        average = (two_lines(found["average"].get(m)) for m in names)
        yield row("td", ["average", "", "", "", *average])
    yield "</table></div>\n"
    for warning in warnings(found):
        yield f"<p>{text(warning)}</p>\n"
    yield "<ul class=about>\n"
    for name, rule in found["rules"].items():
        if several or name != "average":
            yield f"<li>{text(name)}: {text(rule)}</li>\n"
    protocol_text = json.dumps(about["protocol"], indent=2)
    yield f"</ul>\n<details><summary>protocol</summary><pre>{text(protocol_text)}</pre></details>\n"
    for name, of_set in groupby(read_lines(path), key=lambda line: line["set"]):
        yield f"<h2>{text(name)}</h2>\n"
        for _, rollouts in groupby(of_set, key=lambda line: line["uid"]):
            yield problem(list(rollouts))
    yield "</body></html>\n"


def problem(rollouts: Sequence[Mapping[str, Any]]) -> str:
    """One problem: pass rate, text, right answer, and some right and wrong completions."""
    invalid = sum(not r["valid"] for r in rollouts)
    right = sum(r["valid"] and r["reward"] > RIGHT_ABOVE for r in rollouts)
    prompt = rollouts[0]["problem"]
    if not isinstance(prompt, str):  # the messages of a chat
        prompt = "\n".join(f"{role}: {content}" for role, content in prompt)
    shown = choose_shown(rollouts)
    left = len(rollouts) - len(shown)
    return (
        f"<details><summary>{right}/{len(rollouts)} right"
        f"{f', {invalid} not graded' if invalid else ''}: "
        f"{text(' '.join(prompt.split())[:100])}</summary>\n"
        f"<p class=about>problem {rollouts[0]['uid']}</p><pre>{text(prompt)}</pre>"
        f"<p class=about>right answer</p><pre>{text(rollouts[0]['answer'])}</pre>\n"
        + "".join(map(completion, shown))
        + (f"<p>{left} more in completions.jsonl</p>\n" if left else "")
        + "</details>\n"
    )


def choose_shown(rollouts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most ``COMPLETIONS_SHOWN``: the first of each verdict, then the first of the rest."""
    firsts = {(r["valid"], r["reward"], r["reason"]): r for r in reversed(rollouts)}
    chosen = [*firsts.values(), *rollouts]
    numbers = list(dict.fromkeys(r["sample"] for r in chosen))[:COMPLETIONS_SHOWN]
    return [r for r in rollouts if r["sample"] in numbers]


def completion(rollout: Mapping[str, Any]) -> str:
    verdict = f"reward {rollout['reward']:g}" if rollout["valid"] else "not graded"
    if rollout["extracted"] is None:
        answer = "no answer found"
    else:
        answer = f"answer {rollout['extracted'][:200]!r}"
    end = "" if rollout["terminated"] else ", cut short"
    written = rollout["completion"]
    cut = len(written) - CHARACTERS_SHOWN
    mark = f"[{cut} characters before this] " if cut > 0 else ""
    about = f"sample {rollout['sample']}: {verdict} ({rollout['reason']}), {answer}"
    kind = "right" if rollout["reward"] > RIGHT_ABOVE else "wrong"
    return (
        f"<p class={kind}>{text(about)}, {rollout['tokens']} tokens{end}</p>"
        f"<pre>{mark}{text(written[-CHARACTERS_SHOWN:])}</pre>\n"
    )


def row(tag: str, cells: Iterable[object]) -> str:
    return "<tr>" + "".join(f"<{tag}>{text(cell)}</{tag}>" for cell in cells) + "</tr>\n"


def text(value: object) -> str:
    """Text for a page, escaped. Characters that are invisible or change the writing direction are
    shown by their code."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else f"\\u{ord(c):04x}" for c in str(value))
    return html.escape(shown)


HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Evaluation of {title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
:root {{ color-scheme: light dark; --box: #f4f4f4; --line: #ddd; --about: #595959;
  --right: #060; --wrong: #900 }}
@media (prefers-color-scheme: dark) {{ :root {{ --box: #262626; --line: #444; --about: #aaa;
  --right: #7c7; --wrong: #f99 }} }}
body {{ font: 15px/1.5 sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em }}
h1 {{ margin-bottom: 0 }} h2 {{ margin: 2em 0 .5em; overflow-wrap: anywhere }}
.wide {{ overflow-x: auto }} table {{ border-collapse: collapse; margin: 1em 0 }}
td, th {{ padding: .4em .8em; border-bottom: 1px solid var(--line); white-space: pre;
  text-align: right; vertical-align: top; font-variant-numeric: tabular-nums }}
td:first-child, th:first-child {{ text-align: left; padding-left: 0; white-space: normal;
  overflow-wrap: anywhere; min-width: 9em }}
details {{ border-bottom: 1px solid var(--line) }} details > :not(summary) {{ margin-left: 1rem }}
summary {{ cursor: pointer; padding: .35em 0; overflow-wrap: anywhere }}
summary:hover {{ background: var(--box) }}
pre {{ font: 13px/1.45 monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--box); padding: .5em .7em; border-radius: 4px; margin: .2em 0 1em }}
p {{ margin: .3em 0 }} p, li {{ overflow-wrap: anywhere }} .about {{ color: var(--about) }}
.right {{ color: var(--right) }} .wrong {{ color: var(--wrong) }}
</style></head><body>
"""
