"""The gradient study's rows and tables: one row per method, with its ``gradient_measures``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from studies.gradient_measured import MEASURED, run_measured
from studies.gradient_measures import (
    Geometry,
    interval,
    make_geometry,
    make_terms,
    oracles,
    resamples,
    statistics,
)
from studies.gradient_methods import (
    WEIGHTS,
    Draws,
    Method,
    Moments,
    draw_batches,
    fixed,
    group_methods,
    run,
    single_methods,
    weights,
)
from studies.gradient_pool import ESTIMATED, HELD_BACK, Pool
from studies.gradient_sketch import METRICS, Gradients

OURS = ("least_variance value_filter", 0, 1)
LOST = (0.5, 0.75, 0.9)
WEIGHTED = ("weighted_mean", "least_variance")  # run with every kind of score norms
SCALED = ("grpo", "otb")  # never taken as the best: their signal has to be estimated too
NOT_REAL = ("true value", "best", "least_variance true value")  # use what no estimator knows
SHOWN = ("noise", "rollouts", "cosine2_128", "cosine2_512", "noise_share_128", "noise_share_512")


@dataclass(frozen=True)
class Part:
    """One checkpoint: its description, and a row per method, also with unreachable problems."""

    name: str
    about: dict[str, Any]
    rows: list[dict]
    lost: dict[str, list[dict]]


@dataclass(frozen=True)
class Found:
    """A method's moments, and the kind of score norms that it was given."""

    method: Method
    told: str
    moments: Moments


def make_part(
    name: str, about: Mapping, pool: Pool, measured: Mapping[str, Gradients], seed: int = 0
) -> Part:
    found = run_methods(pool, measured["first"], batch=about["batch"], told=WEIGHTS, seed=seed)
    sampled = resamples(len(pool.problems), seed)
    draws = draw_batches(seed, len(pool.problems), batch=about["batch"], group_size=1)
    rows: list[dict] = [{} for _ in (*found, 0, *oracles(pool, measured["first"].norms[..., 0]))]
    for m, metric in enumerate(METRICS):
        own = with_measured(found, draws, pool, measured["first"], m)
        for update, gradients in measured.items():
            geometry = make_geometry(*of_metric(gradients, m), pool, seed)
            known = oracles(pool, measured["first"].norms[..., m])
            every = own + [
                Found(Method(k, single_methods()[0].estimator), "", fixed(b, pool))
                for k, b in known.items()
            ]
            add_statistics(rows, every, geometry, sampled, f"{update} {metric}")
    return Part(
        name, {**describe(about, pool, measured["first"])}, rows, with_lost(about, pool, measured)
    )


def run_methods(
    pool: Pool, gradients: Gradients, *, batch: int, told: Sequence[str], seed: int = 0
) -> list[Found]:
    """Run all methods; those that use score norms, with every kind of them."""
    found = []
    draws = {}
    for method in [*single_methods(), *group_methods()]:
        size = method.group_size
        if size not in draws:
            draws[size] = draw_batches(seed, len(pool.problems), batch=batch, group_size=size)
        for kind in told if method.name.startswith(WEIGHTED) else told[:1]:
            norms = weights(pool, gradients.norms, kind)
            found.append(Found(method, kind, run(method, draws[size], pool, norms)))
    return found


def with_measured(
    found: Sequence[Found], draws: Draws, pool: Pool, gradients: Gradients, metric: int
) -> list[Found]:
    """The methods and measured_mean, which measures in one of the metrics."""
    measured = run_measured(draws, pool, *of_metric(gradients, metric))
    return [*found, Found(MEASURED, WEIGHTS[0], measured)]


def of_metric(gradients: Gradients, metric: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared norms and sketches in one of the metrics."""
    return gradients.norms[..., metric], gradients.sketches[:, :, metric]


def add_statistics(
    rows: list[dict],
    found: Sequence[Found],
    geometry: Geometry,
    sampled: Float[np.ndarray, "K P"],
    name: str,
) -> None:
    """Add the statistics of one geometry to every row, and their ratio to the best real method with
    the free score norms."""
    measured = []
    for row, (method, told, moments) in zip(rows, map(fields_of, found), strict=True):
        row |= {"method": method.name, "n": method.trials, "G": method.group_size, "told": told}
        terms = make_terms(moments, geometry, group_size=method.group_size, scaled=method.scaled)
        measured.append(statistics(terms, sampled))
    real = [i for i, row in enumerate(rows) if is_real(row) and row["method"] not in SCALED]
    best = measured[min(real, key=lambda i: measured[i]["spread"][0])]
    for row, values in zip(rows, measured, strict=True):
        row[name] = {key: interval(values[key]) for key in SHOWN}
        with np.errstate(divide="ignore", invalid="ignore"):
            row[name]["to_best"] = interval(values["rollouts"] / best["rollouts"])
    rows[0][name]["signal"] = interval(measured[0]["signal"])


def fields_of(found: Found) -> tuple[Method, str, Moments]:
    return found.method, found.told, found.moments


def is_real(row: dict) -> bool:
    return row["told"] == WEIGHTS[0] and not row["method"].startswith(NOT_REAL)


def with_lost(
    about: Mapping, pool: Pool, measured: Mapping[str, Gradients], seed: int = 0
) -> dict[str, list[dict]]:
    """Rows of the first update if a share of the problems cannot be solved. ``lost_share`` is the
    share of E|U|^2 that comes from these."""
    order = np.random.default_rng([seed, 10]).permutation(len(pool.problems))
    sampled = resamples(len(pool.problems), seed)
    result = {}
    for share in LOST:
        lost = order < share * len(order)
        left = pool.unreachable(lost)
        gradients = measured["first"]
        found = run_methods(left, gradients, batch=about["batch"], told=WEIGHTS[:1], seed=seed)
        draws = draw_batches(seed, len(left.problems), batch=about["batch"], group_size=1)
        rows: list[dict] = [{} for _ in (*found, 0)]
        for m, metric in enumerate(METRICS):
            geometry = make_geometry(*of_metric(gradients, m), left, seed)
            every = with_measured(found, draws, left, gradients, m)
            add_statistics(rows, every, geometry, sampled, f"first {metric}")
            for row, one in zip(rows, every, strict=True):
                length = np.einsum("pij,pij->p", one.moments.products, geometry.products)
                row[f"first {metric}"]["lost_share"] = float(length[lost].sum() / length.sum())
        result[f"{share:g}"] = rows
    return result


def describe(about: Mapping, pool: Pool, gradients: Gradients) -> dict[str, Any]:
    """Figures that describe the checkpoint."""
    r = pool.rewards[:, : ESTIMATED + HELD_BACK]
    right, values = r > 0.5, pool.values
    found: dict[str, Any] = {
        "model": about["config"]["model"]["path"],
        "checkpoint": about["checkpoint"],
        "task": about["config"]["data"]["path"],
        "problems": len(values),
        "batch": about["batch"],
        "gradients": int(r.size),
        "commit": about.get("commit"),
        "mean_value": float(r.mean()),
        "sd_value": float(np.sqrt(max(0, values.var() - np.mean(values * (1 - values)) / 47))),
        "length": float(pool.lengths.mean()),
    }
    if right.any() and not right.all():
        likely = np.exp(pool.logprobs[:, : r.shape[1]][right])
        found["probability_of_right"] = float(np.median(likely))
        for m, metric in enumerate(METRICS):
            w = gradients.norms[..., m]
            found[f"m0/m1 {metric}"] = float(w[~right].mean() / w[right].mean())
            told = [weights(pool, gradients.norms, k).ravel() for k in ("free", "surprise")]
            of = w[:, :ESTIMATED].ravel()
            found[f"correlation {metric}"] = [float(np.corrcoef(of, t)[0, 1]) for t in told]
    return found


# ----------------------------------------------------------------------------------------- table
def title(row: dict) -> str:
    name = row["method"].replace("least_variance ", "LV ")
    name += f", n={row['n']}" if row["n"] else ""
    return name + (f", G={row['G']}" if row["G"] > 1 else "")


def table(part: Part) -> str:
    """Noise, rollouts needed relative to the best real method, squared cosines. The noise of otb
    and grpo means little, because their baselines contain the own reward."""
    lines = ["", part.name + ": " + ", ".join(f"{k} {short(v)}" for k, v in part.about.items())]
    for name in part.rows[0]:
        if name.startswith(("first", "second")) and "signal" in part.rows[0][name]:
            lines.append(f"|G|^2, {name}: {spread(part.rows[0][name]['signal'])}")
    columns = [f"{u} {m}" for u in ("first", "second") for m in METRICS]
    width = max(len(title(row)) for row in part.rows)
    head = f"{'told the free score norms':{width}}   noise  needed/best sgd      adamw        "
    lines.append(head + " second sgd adamw   cos2@128 " + " ".join(columns) + "  @512")
    for row in part.rows:
        if row["told"] in ("", WEIGHTS[0]):
            lines.append(line(row, columns, width))
    lines.append("rollouts needed / best, told other score norms: " + ", ".join(WEIGHTS))
    for row in part.rows:
        if row["told"] == WEIGHTS[0] and row["method"].startswith(WEIGHTED):
            lines.append(f"{title(row):{width}} " + told_line(part.rows, row))
    for share, rows in part.lost.items():
        lines.append(
            f"{share} unreachable: share of noise in |g|^2 at 128, 512 (sgd; adamw), share of "
            "E|U|^2 from unreachable (sgd), needed/best (sgd; adamw)"
        )
        lines += [f"{title(row):{width}} {lost_line(row)}" for row in rows]
    return "\n".join(lines)


def line(row: dict, columns: Sequence[str], width: int) -> str:
    first, adamw = row["first sgd"], row["first adamw"]
    text = f"{title(row):{width}} {first['noise'][0]:9.4g} {spread(first['to_best'])} "
    text += f"{spread(adamw['to_best'])}"
    text += "".join(f" {row[f'second {m}']['to_best'][0]:6.3f}" for m in METRICS)
    for size in (128, 512):
        text += "  " + " ".join(f"{row[c][f'cosine2_{size}'][0]:6.3f}" for c in columns)
    return text


def told_line(rows: Sequence[dict], row: dict) -> str:
    parts = []
    for metric in METRICS:
        same = [r for r in rows if title(r) == title(row)]
        parts.append(metric + "".join(f" {r[f'first {metric}']['to_best'][0]:6.3f}" for r in same))
    return "   ".join(parts)


def lost_line(row: dict) -> str:
    sgd, adamw = row["first sgd"], row["first adamw"]
    shares = [f"{x[f'noise_share_{n}'][0]:.3f}" for x in (sgd, adamw) for n in (128, 512)]
    return (
        f"{' '.join(shares)}  {sgd['lost_share']:.3f}  "
        f"{spread(sgd['to_best'])} {spread(adamw['to_best'])}"
    )


def spread(x: Sequence[float]) -> str:
    return f"{x[0]:6.3g} [{x[1]:.3g}, {x[2]:.3g}]".ljust(22)


def short(x: Any) -> str:
    if isinstance(x, list):
        return "/".join(short(v) for v in x)
    return f"{x:.3g}" if isinstance(x, float) else str(x)
