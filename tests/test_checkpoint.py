"""Checkpoints on disk: digests of their files, damaged ones, which are kept, and what differs."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from basis_jax import files
from basis_jax.config import CheckpointSection
from basis_jax.runs import checkpoint
from basis_jax.types import TrainState


def state(step, width=8):
    return TrainState(
        step=jnp.int32(step),
        params={"w": jnp.arange(float(width)) + step},
        opt_state=(jnp.full(3, 0.5 * step),),
        estimator_state={"counts": jnp.full(4, step, jnp.int32)},
    )


def saved(run_dir, steps=(1, 2), **options):
    with checkpoint.open_checkpoints(run_dir, CheckpointSection(**options)) as checkpoints:
        for step in steps:
            checkpoint.save(checkpoints, state(step), {"seed": 0})
        checkpoint.finish(checkpoints)
    return run_dir / "checkpoints"


def restored(run_dir, like=None):
    """The state that a new start restores, and what it reports."""
    said = []
    with checkpoint.open_checkpoints(run_dir, CheckpointSection()) as checkpoints:
        found = checkpoint.restore(checkpoints, like or state(0), said.append)
    return found, said


def assert_is(found, step):
    assert int(found.step) == step
    np.testing.assert_array_equal(found.params["w"], state(step).params["w"])
    np.testing.assert_array_equal(found.opt_state[0], state(step).opt_state[0])
    np.testing.assert_array_equal(found.estimator_state["counts"], np.full(4, step))


def test_a_checkpoint_has_the_digest_of_each_of_its_files(tmp_path):
    folder = saved(tmp_path) / "2"
    digests = json.loads((folder / files.DIGESTS).read_text())
    on_disk = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert digests.keys() == on_disk - {files.DIGESTS}
    assert files.damage(folder) is None


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink], ids=["flipped", "cut", "removed"])
def test_whichever_file_of_the_newest_is_damaged_the_one_before_is_used(tmp_path, harm):
    """Every file in turn: one sentence names it and the step; nothing is deleted. Only without the
    digests themselves the newest is used, and that is said, too."""
    folder = saved(tmp_path)
    names = [p.relative_to(folder / "2") for p in (folder / "2").rglob("*") if p.is_file()]
    assert len(names) > 8
    for number, name in enumerate(sorted(names)):
        run = saved(tmp_path / str(number)) if number else folder
        path = run / "2" / (name if name.parts[-1] in KNOWN else nth_data_file(run / "2", name))
        harm(path)
        found, said = restored(run.parent)
        [sentence] = said
        if path.name == files.DIGESTS and harm is Path.unlink:
            assert_is(found, 2)
            assert f"{run / '2'} has no sha256.json" in sentence
            continue
        assert_is(found, 1)
        assert sentence.startswith(f"warning: checkpoint {run / '2'} is damaged (")
        assert "goes on from step 1" in sentence
        if path.name != files.DIGESTS:
            assert path.relative_to(run / "2").as_posix() in sentence
        assert sentence in (run.parent / "log.txt").read_text()
        assert (run / "damaged-2").is_dir() and not (run / "2").exists()


KNOWN = {"metadata", "_METADATA", "_CHECKPOINT_METADATA", "_sharding", "process_0", files.DIGESTS}
KNOWN |= {"manifest.ocdbt"}


def nth_data_file(folder, like):
    """Data files have random names: the same place in the order of their folder."""
    return sorted(p.relative_to(folder) for p in (folder / like.parent).iterdir())[0]


def test_a_damaged_checkpoint_may_be_written_again(tmp_path):
    folder = saved(tmp_path)
    flip(folder / "2" / "state" / "_METADATA")
    restored(tmp_path)
    saved(tmp_path, steps=(2,))
    found, said = restored(tmp_path)
    assert_is(found, 2)
    assert said == []


def test_if_all_are_damaged_the_run_does_not_start_and_nothing_is_moved(tmp_path):
    folder = saved(tmp_path)
    for step in "12":
        flip(folder / step / "config" / "metadata")
    with pytest.raises(ValueError, match=r"all checkpoints of .* are damaged: 2 .*; 1 .*--run-dir"):
        restored(tmp_path)
    assert (folder / "1").is_dir() and (folder / "2").is_dir()


def test_the_best_by_held_out_accuracy_stay_besides_the_newest(tmp_path):
    accuracy = {1: 0.2, 2: 0.9, 3: 0.5, 5: 0.9, 6: 0.1}  # step 4 is not evaluated
    lines = [
        {"step": s} | ({"eval/accuracy": accuracy[s]} if s in accuracy else {}) for s in range(8)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = saved(tmp_path, steps=range(1, 8), keep=1, keep_best=2)
    assert sorted(p.name for p in folder.iterdir()) == ["2", "5", "7"]


def test_without_keep_best_only_the_newest_stay(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "eval/accuracy": 1.0}\n')
    folder = saved(tmp_path, steps=range(1, 5), keep=2)
    assert sorted(p.name for p in folder.iterdir()) == ["3", "4"]


@pytest.mark.parametrize(
    ("like", "part", "leaf"),
    [
        (
            state(0, width=9),
            "the parameters",
            "params['w'] is float32[8] there and float32[9] here",
        ),
        (
            TrainState(**(vars(state(0)) | {"opt_state": ()})),
            "the optimizer's moments",
            "opt_state[0] is float32[3] there and absent here",
        ),
        (
            TrainState(**(vars(state(0)) | {"estimator_state": {"level": jnp.zeros(2)}})),
            "the estimator's state",
            "estimator_state['counts'] is int32[4] there and absent here",
        ),
    ],
    ids=["model", "optimizer", "estimator"],
)
def test_a_state_of_another_shape_is_refused_by_the_name_of_what_differs(
    tmp_path, like, part, leaf
):
    saved(tmp_path)
    with pytest.raises(ValueError) as refused:
        restored(tmp_path, like)
    assert f"holds {part} of another run: {leaf}; give the" in str(refused.value)
