"""A run's checkpoint becomes a Hugging Face folder: every bit, and the same greedy tokens."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from basis_jax import files
from basis_jax.commands import convert
from basis_jax.config import CheckpointSection, Config, ModelSection, OptimSection, SamplingSection
from basis_jax.model import decoder
from basis_jax.model.sharding import make_mesh, named
from basis_jax.runs import checkpoint
from basis_jax.sampling.decode import sample
from basis_jax.sampling.draw import row_keys
from basis_jax.training.update import make_optimizer, make_state
from basis_jax.types import Prompts
from basis_jax.weights import huggingface, trained

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    """(run folder with checkpoints 2 and 10, their parameters)."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    model_config, params = huggingface.read_model_config(tiny_folder), {}
    start = huggingface.load_params(tiny_folder, model_config)
    for step in (2, 10):
        noise = np.random.default_rng(step)
        params[step] = jax.tree.map(
            lambda x, noise=noise: x + noise.normal(scale=0.02, size=x.shape).astype("float32"),
            start,
        )
        save(run_dir, params[step], step=step, model_config=model_config, model=tiny_folder)
    return run_dir, params


def save(run_dir, params, *, step, model_config, model):
    """A checkpoint with these parameters."""
    optimizer, mesh = (
        make_optimizer(OptimSection(), updates=1),
        make_mesh(devices=jax.devices()[:1]),
    )
    config = Config(run_dir=str(run_dir), model=ModelSection(path=str(model)))
    state = make_state(params, optimizer, (), model_config=model_config, mesh=mesh)
    state = dataclasses.replace(state, step=jnp.int32(step))
    with checkpoint.open_checkpoints(run_dir, CheckpointSection()) as checkpoints:
        checkpoint.save(checkpoints, state, dataclasses.asdict(config))


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_newest_checkpoint_is_exported_bit_for_bit(run, tiny_folder, tmp_path, capsys):
    """10 is newer than 2, in whatever order their names sort."""
    run_dir, params = run
    convert.run(run_dir, to=tmp_path / "out")
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert_equal(
        huggingface.load_params(tmp_path / "out", huggingface.read_model_config(tiny_folder)),
        params[10],
    )
    convert.run(run_dir / "checkpoints" / "2", to=tmp_path / "older")
    assert_equal(
        huggingface.load_params(tmp_path / "older", huggingface.read_model_config(tiny_folder)),
        params[2],
    )


def test_an_export_has_config_tokenizer_and_as_many_files_as_asked(run, tiny_folder, tmp_path):
    run_dir, params = run
    convert.run(run_dir, to=tmp_path / "out", shard_gb=2e-5)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert huggingface.read_model_config(tmp_path / "out") == huggingface.read_model_config(
        tiny_folder
    )
    tokenizers = [huggingface.load_tokenizer(f) for f in (tiny_folder, tmp_path / "out")]
    assert len({str(t("what is 1 + 2?")["input_ids"]) for t in tokenizers}) == 1
    assert_equal(
        huggingface.load_params(tmp_path / "out", huggingface.read_model_config(tiny_folder)),
        params[10],
    )
    convert.run(run_dir, to=tmp_path / "half", dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params[10])
    assert_equal(
        huggingface.load_params(tmp_path / "half", huggingface.read_model_config(tiny_folder)),
        rounded,
    )


def test_a_run_as_the_first_argument_needs_no_subcommand(run, tmp_path, monkeypatch):
    pytest.importorskip("tyro")
    command = ["convert.py", str(run[0]), "--to", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    convert.main()
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_model_folder_may_have_moved(run, tiny_folder, tmp_path):
    """The run says where its model was; --model-path says where it is."""
    run_dir, params = run
    moved = tmp_path / "run"
    shutil.copytree(run_dir, moved)
    saved = moved / "checkpoints" / "10" / "config" / "metadata"
    saved.write_text(saved.read_text().replace(str(tiny_folder), str(tmp_path / "gone")))
    files.seal(moved / "checkpoints" / "10")
    with pytest.raises(ValueError, match="gone is no folder"):
        convert.run(moved, to=tmp_path / "out")
    convert.run(moved, to=tmp_path / "out", model_path=str(tiny_folder))
    assert_equal(
        huggingface.load_params(tmp_path / "out", huggingface.read_model_config(tiny_folder)),
        params[10],
    )


def test_parameters_are_laid_out_over_the_mesh_and_nothing_is_written(run, tiny_folder):
    run_dir, params = run
    half_saved = run_dir / "checkpoints" / "12.orbax-checkpoint-tmp"
    half_saved.mkdir()
    before = sorted(run_dir.rglob("*"))
    model_config, mesh = (
        huggingface.read_model_config(tiny_folder),
        make_mesh(data=1, fsdp=2, tensor=2),
    )
    found = trained.load_checkpoint_params(trained.find_checkpoint(run_dir), model_config, mesh)
    assert_equal(found, params[10])
    jax.tree.map(
        lambda x, axes: x.sharding.is_equivalent_to(named(mesh, axes), x.ndim) or pytest.fail(axes),
        found,
        decoder.param_axes(model_config),
    )
    assert sorted(run_dir.rglob("*")) == before
    half_saved.rmdir()


def test_what_is_no_checkpoint_of_this_model_is_refused_in_one_sentence(run, tiny_folder, tmp_path):
    run_dir, _ = run
    for empty in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="holds no checkpoint; give the folder of a run"):
            trained.find_checkpoint(empty)
    step = trained.find_checkpoint(run_dir)
    model_config = huggingface.read_model_config(tiny_folder)
    with pytest.raises(ValueError, match=r"another model: .*'k_norm'\] \(2, 8\) there and \(3,"):
        trained.load_checkpoint_params(step, dataclasses.replace(model_config, layers=3))
    with pytest.raises(ValueError, match=r"\['output'\] absent there"):
        trained.load_checkpoint_params(step, dataclasses.replace(model_config, tied=False))
    damaged = tmp_path / "10"
    shutil.copytree(step, damaged)
    (damaged / "state" / "manifest.ocdbt").unlink()
    (damaged / "state" / "_METADATA").unlink()
    shutil.rmtree(damaged / "config")
    with pytest.raises(ValueError, match=r"10 is damaged \(config/metadata is missing\)"):
        trained.load_checkpoint_params(damaged, model_config)
    files.seal(damaged)
    for read in (
        lambda: trained.model_path(damaged),
        lambda: trained.load_checkpoint_params(damaged, model_config),
    ):
        with pytest.raises(ValueError, match="10 cannot be read as a checkpoint") as raised:
            read()
        assert "\n" not in str(raised.value)


def test_a_checkpoint_with_nan_is_not_loaded(run, tiny_folder, tmp_path):
    """As arrays of the host, and in a part that one of four devices holds."""
    model_config = huggingface.read_model_config(tiny_folder)
    params = run[1][2]
    wrong = params | {"layers": dict(params["layers"])}
    wrong["layers"]["q_proj"] = params["layers"]["q_proj"].at[1, -1, -1, -1].set(jnp.inf)
    save(tmp_path / "run", wrong, step=1, model_config=model_config, model=tiny_folder)
    found = trained.find_checkpoint(tmp_path / "run")
    for mesh in (None, make_mesh(data=1, fsdp=2, tensor=2)):
        with pytest.raises(ValueError, match=r"\['q_proj'\] of checkpoint .* holds NaN"):
            trained.load_checkpoint_params(found, model_config, mesh)


def test_a_bfloat16_source_is_exported_in_bfloat16_unless_asked(run, tiny_folder, tmp_path, capsys):
    """And config.json and generation_config.json say what the weights are stored in."""
    run_dir, params = run
    half = tmp_path / "half"
    model_config = huggingface.read_model_config(tiny_folder)
    source = huggingface.load_params(tiny_folder, model_config)
    huggingface.save_params(source, model_config, half, source=tiny_folder, dtype="bfloat16")
    for name, options, dtype in (
        ("default", {"model_path": str(half)}, "bfloat16"),
        ("asked", {"model_path": str(half), "dtype": "float32"}, "float32"),
        ("single", {}, "float32"),
    ):
        convert.run(run_dir, to=tmp_path / name, **options)
        assert f"weights in {dtype}" in capsys.readouterr().out
        assert huggingface.stored_dtype(tmp_path / name) == dtype
        for file, field in (("config.json", "torch_dtype"), ("generation_config.json", "dtype")):
            assert json.loads((tmp_path / name / file).read_text())[field] == dtype
    found = huggingface.load_params(tmp_path / "default", model_config)
    assert_equal(
        found, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype("float32"), params[10])
    )


@pytest.fixture
def stopping(run, tmp_path):
    """The run's newest checkpoint, of a config with the stop tokens "." and "?"."""
    copied = tmp_path / "stopping"
    shutil.copytree(run[0] / "checkpoints" / "10", copied)
    saved = copied / "config" / "metadata"
    config = json.loads(saved.read_text())
    config["sampling"]["stop_tokens"] = [".", "?"]
    saved.write_text(json.dumps(config))
    files.seal(copied)
    return copied


@pytest.mark.parametrize("given", [None, {"eos_token_id": 2, "pad_token_id": 0, "top_p": 0.9}])
def test_stop_tokens_of_the_run_end_completions_of_the_export(
    stopping, tiny_folder, tmp_path, given
):
    """Beside what ended them before; other settings of the source stay."""
    import transformers

    source = tmp_path / "source"
    shutil.copytree(tiny_folder, source)
    if given:
        (source / "generation_config.json").write_text(json.dumps(given))
    convert.run(stopping, to=tmp_path / "out", model_path=str(source))
    tokenizer = huggingface.load_tokenizer(source)
    stops = tokenizer.convert_tokens_to_ids(["</s>", ".", "?"])
    found = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert found.eos_token_id == sorted(stops)
    assert huggingface.eos_ids(tmp_path / "out", tokenizer) == tuple(sorted(stops))
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    kept = {k: v for k, v in (given or {}).items() if k != "eos_token_id"}
    assert written == kept | {"eos_token_id": sorted(stops), "dtype": "float32"}


@pytest.mark.torch
def test_transformers_continues_the_export_greedily_with_the_same_tokens(
    run, tiny_folder, tmp_path
):
    """24 prompts, 20 tokens each, from our sampler and from generate()."""
    import torch
    import transformers

    run_dir, params = run
    convert.run(run_dir, to=tmp_path / "out", shard_gb=2e-5)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [f"what is {a} + {b}?" for a in range(4) for b in range(6)]
    tokens = np.array(tokenizer(texts)["input_ids"], np.int32)
    rows = np.arange(len(tokens), dtype=np.int32)
    eos = huggingface.eos_ids(tmp_path / "out", tokenizer)
    ours = sample(
        params[10],
        huggingface.read_model_config(tiny_folder),
        Prompts(
            tokens=tokens, lengths=np.full(len(tokens), tokens.shape[1], "int32"), problem_ids=rows
        ),
        sampling=SamplingSection(temperature=0.0, max_new_tokens=20),
        eos_ids=eos,
        keys=row_keys(0, "evaluate", 0, problem_ids=jnp.asarray(rows), samples=jnp.asarray(rows)),
    )
    for i, row in enumerate(tokens):
        with torch.no_grad():
            made = theirs.generate(
                torch.tensor(row[None].astype(np.int64)),
                attention_mask=torch.ones(1, len(row), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=20,
                pad_token_id=eos[0],
                eos_token_id=list(eos),
            )[0, len(row) :].tolist()
        length = int(ours.completion_lengths[i])
        assert np.asarray(ours.tokens[i, len(row) : len(row) + length]).tolist() == made
    assert len({tuple(row) for row in np.asarray(ours.tokens[:, tokens.shape[1] :]).tolist()}) > 5


class Hub:
    """What ``convert`` uses of huggingface_hub: an account that may be logged out or cut off."""

    def __init__(self, fails=""):
        self.fails, self.calls = fails, []

    def create_repo(self, name, *, private, exist_ok):
        if self.fails == "create":
            raise ConnectionError("no\nlogin")
        self.calls.append(("create", name, private, exist_ok))

        class Address(str):
            repo_id = f"me/{name}"

        return Address(f"https://hub/me/{name}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.fails == "upload":
            raise OSError("cut off")
        files = {path.name for path in folder_path.iterdir()}
        self.calls.append(("upload", repo_id, files, commit_message))


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    return made


def test_a_converted_run_is_pushed_to_a_repository_that_is_made_for_it(run, hub, tmp_path, capsys):
    convert.run(run[0], to=tmp_path / "out", push_to_hub="model", private=True)
    made, uploaded = hub.calls
    assert made == ("create", "model", True, True)
    assert uploaded[:2] == ("upload", "me/model") and uploaded[3] == "Step 10 of run"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= uploaded[2]
    assert capsys.readouterr().out.endswith("pushed it to https://hub/me/model\n")


def test_without_a_login_nothing_is_converted(run, hub, tmp_path):
    hub.fails = "create"
    with pytest.raises(ValueError, match=r"model cannot be opened \(no login\); give OWNER/NAME"):
        convert.run(run[0], to=tmp_path / "out", push_to_hub="model")
    assert not (tmp_path / "out").exists()


def test_what_could_not_be_pushed_is_kept(run, hub, tmp_path):
    hub.fails = "upload"
    with pytest.raises(ValueError, match=r"could not be pushed to model \(cut off\); it is whole"):
        convert.run(run[0], to=tmp_path / "out", push_to_hub="model")
    assert (tmp_path / "out" / "model.safetensors").exists()
