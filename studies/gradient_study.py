"""How noisy the policy gradient is under every baseline, from exact gradients of single rollouts.

    python -m studies.gradient_study measure --config quickstart --folder runs/gradients/start
    python -m studies.gradient_study measure --config quickstart --checkpoint runs/quickstart \\
        --folder runs/gradients/trained
    python -m studies.gradient_study compare runs/gradients/start runs/gradients/trained

``measure`` samples rollouts of ``--problems`` problems (by default 256) and computes their
gradients with respect to all parameters, at the config's model or at a checkpoint of a run. If it
was stopped, the same command continues. Other options override the config. ``compare`` runs all
estimators on batches of these rollouts, prints the tables and writes ``--out``.json and .png. With
``--known results/gradient_study.json`` it keeps what this report has of other folders.

Gradients are computed at two points: at the parameters that sampled, and after one AdamW step from
there. This step has no momentum, the config's learning rate, a neutral baseline, and one rollout of
each of ``--batch`` problems, which is used for nothing else. At the second point every token's
gradient is multiplied by its probability ratio, without a clip, as in the second update of a step.
AdamW's second moments are plain means over batches of ``--batch`` rollouts, out of all rollouts,
with the batch's mean reward as baseline.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from basis_jax import command_line
from basis_jax.config import Config
from basis_jax.files import replace_file
from basis_jax.model.decoder import ModelConfig
from basis_jax.runs.provenance import provenance
from basis_jax.training.session import open_session
from basis_jax.weights import huggingface, trained
from studies import gradient_files, gradient_pool, gradient_report
from studies.gradient_pool import Pool
from studies.gradient_sketch import (
    BUCKETS,
    Gradients,
    batch_gradients,
    logprobs_of,
    make_gradients,
    make_hash,
)

UPDATES = ("first", "second")
CHUNK = 32  # problems whose gradients are written at once
ROWS, MOST_NUMBERS = 16, 2**28  # gradients that exist at once, and their numbers in all, at most

OPTIONS = {
    "folder FOLDER": "where the rollouts and gradients are kept",
    "checkpoint RUN": "measure at the newest checkpoint of a run instead of the config's model",
    "problems N": "how many problems (256)",
    "batch N": "rollouts of a batch (128)",
}


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "measure":
        config, given = command_line.parse(__doc__, options=OPTIONS, argv=sys.argv[2:])
        measure(
            config,
            Path(given.folder),
            checkpoint=given.checkpoint,
            problems=int(given.problems or 256),
            batch=int(given.batch or 128),
        )
    elif command == "compare":
        compare(sys.argv[2:])
    else:
        raise ValueError(f"the command is {command!r}; give measure or compare, as in\n{__doc__}")


def compare(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="studies.gradient_study compare", allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/gradient_study"))
    parser.add_argument("--known", type=Path, help="a report whose other parts are kept")
    given = parser.parse_args(arguments)
    made_with = provenance()
    names = [folder.name for folder in given.folders]
    known = gradient_files.read(given.known) if given.known else []
    parts = [part for part in known if part.name not in names]
    for folder in given.folders:
        about, pool, measured = load(folder)
        parts.append(gradient_report.make_part(folder.name, about, pool, measured))
        print(gradient_report.table(parts[-1]), flush=True)
    gradient_files.write(given.out, parts, made_with)
    print(f"\n{given.out}.json, {given.out}.png")


# -------------------------------------------------------------------------------------- measuring
def measure(config: Config, folder: Path, *, checkpoint: str, problems: int, batch: int) -> None:
    """Fill the folder: about.json, pool.npz, updates.npz and pieces of gradients."""
    settings = {"checkpoint": checkpoint, "problems": problems, "batch": batch}
    wanted = {"config": dataclasses.asdict(config), **settings}
    check_same(folder, wanted)
    with open_session(config) as session, jax.set_mesh(session.setup.mesh):
        setup = session.setup
        if checkpoint:
            found = trained.find_checkpoint(checkpoint)
            params = trained.load_checkpoint_params(found, setup.model_config, setup.mesh)
        else:
            params = huggingface.load_params(session.folder, setup.model_config, setup.mesh)
        if not (folder / "pool.npz").is_file():
            pool = gradient_pool.draw_pool(
                params, setup, session.train_set, sampling=config.sampling, size=problems
            )
            save(folder / "pool.npz", vars(pool))
    model_config = dataclasses.replace(setup.model_config, remat="none")
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params)  # on one device
    pool = gradient_pool.read(folder / "pool.npz")
    save_gradients(folder, params, model_config, pool, config=config, batch=batch)
    replace_file(folder / "about.json", json.dumps({**wanted, "done": True, **provenance()}) + "\n")


def check_same(folder: Path, wanted: dict) -> None:
    """Start the folder, or raise ValueError if it was started with other settings."""
    path = folder / "about.json"
    folder.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(wanted))
    if not path.is_file():
        replace_file(path, json.dumps(plain) + "\n")
    known = json.loads(path.read_text())
    changed = [name for name in plain if known[name] != plain[name]]
    if changed:
        raise ValueError(
            f"{folder} was begun with another {changed[0]}; give the same, or another --folder"
        )


def save(path: Path, arrays: dict) -> None:
    """Write a file that is either complete or absent."""
    part = path.with_suffix(".part.npz")
    np.savez(part, allow_pickle=False, **arrays)
    part.replace(path)


class Update(NamedTuple):
    """The parameters at which gradients are computed, and AdamW's scale of every entry there."""

    params: Float[Array, " D"]
    scale: Float[Array, " D"]


def save_gradients(
    folder: Path,
    params: PyTree,
    model_config: ModelConfig,
    pool: Pool,
    *,
    config: Config,
    batch: int,
) -> None:
    temperature = config.sampling.temperature
    tokens, masks = pool.tokens.reshape(-1, pool.tokens.shape[2]), pool.masks
    old = logprobs_of(params, model_config, tokens, temperature=temperature, rows=batch)
    old = old.reshape(pool.tokens.shape)
    updates = make_updates(params, model_config, pool, old, config=config, batch=batch)
    flat, unravel = ravel_pytree(params)
    rows_at_once = int(np.clip(MOST_NUMBERS // flat.size, 1, ROWS))
    gradients = make_gradients(
        model_config, make_hash(flat.size, BUCKETS), temperature=temperature, rows=rows_at_once
    )
    size = len(pool.problems)
    for name, update in zip(UPDATES, updates, strict=True):
        moved = unravel(update.params)
        for start in range(0, size, CHUNK):
            path = folder / f"gradients_{name}_{start:05d}.npz"
            if path.is_file():
                continue
            rows = slice(start, start + CHUNK)
            parts = [x[rows, :-1] for x in (pool.tokens, masks, old)]
            shape = parts[0].shape[:2]
            parts = [x.reshape(-1, x.shape[2]) for x in parts]
            found = gradients(moved, update.scale, *parts)
            save(path, {k: v.reshape(*shape, *v.shape[1:]) for k, v in vars(found).items()})
            print(f"{name} update: {min(start + CHUNK, size)} of {size} problems", flush=True)


def make_updates(
    params: PyTree,
    model_config: ModelConfig,
    pool: Pool,
    old: Float[np.ndarray, "P S T"],
    *,
    config: Config,
    batch: int,
) -> tuple[Update, Update]:
    """The parameters and AdamW's scale at the first update and at the second."""
    flat, unravel = ravel_pytree(params)
    rows: dict[str, Any] = {
        "tokens": pool.tokens.reshape(-1, pool.tokens.shape[2]),
        "mask": pool.masks.reshape(-1, pool.tokens.shape[2]),
        "old": old.reshape(-1, pool.tokens.shape[2]),
        "rewards": pool.rewards.ravel(),
        "temperature": config.sampling.temperature,
    }
    size, kept = pool.rewards.shape
    every = np.arange(size * kept, dtype=np.int32).reshape(size, kept)
    step = every[:batch, -1:].T  # of the rollouts that nothing else uses
    batches = every.T.ravel()[: size * kept // batch * batch].reshape(-1, batch)

    def scale(at):
        found = batch_gradients(unravel(at), model_config, batches, **rows)
        moment = sum(g**2 for g in found) / len(batches)
        return 1 / (jnp.sqrt(moment) + config.optim.eps)

    first = Update(flat, scale(flat))
    (ascent,) = batch_gradients(params, model_config, step, **rows)
    moved = flat + config.optim.lr * ascent * first.scale
    return first, Update(moved, scale(moved))


def load(folder: Path) -> tuple[dict[str, Any], Pool, dict[str, Gradients]]:
    """What ``measure`` has written. Raises ValueError if it has not finished."""
    path = folder / "about.json"
    about = json.loads(path.read_text()) if path.is_file() else {}
    if not about.get("done"):
        raise ValueError(f"{folder} is not measured; run the command measure with it to its end")
    measured = {}
    for update in UPDATES:
        parts = []
        for path in sorted(folder.glob(f"gradients_{update}_*.npz")):
            with np.load(path) as file:
                parts.append(Gradients(**{name: file[name] for name in ("norms", "sketches")}))
        measured[update] = Gradients(
            np.concatenate([p.norms for p in parts]), np.concatenate([p.sketches for p in parts])
        )
    return about, gradient_pool.read(folder / "pool.npz"), measured


if __name__ == "__main__":
    command_line.run(main)
