"""Tunix's sampler (google-tunix, ``tunix.generate.sampler``) on a Llama-architecture folder.

    python -m benchmarks.rival_tunix --model models/smollm2    # are its tokens the same as ours?

For ``bench_sampling.py``, in an environment of its own: ``pip install google-tunix`` beside this
package's extra ``llm`` (it asks for safetensors below 0.8). It samples greedily or by top-p, whose
top_p = 1 is the full distribution. Rows that have ended are computed until the longest row ends, as
in ``sampling.sample``. One random key serves all rows of a step.
"""

import argparse
import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from basis_jax import command_line
from basis_jax.config import SamplingSection
from basis_jax.model.decoder import ModelConfig
from basis_jax.sampling.decode import sample
from basis_jax.sampling.draw import row_keys
from basis_jax.types import Prompts
from basis_jax.weights import huggingface
from basis_jax.weights.known_models import KNOWN_MODELS
from benchmarks.bench_models import Sampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument("--prompt", default="The capital of France is", help="its tokens, 4 rows")
    parser.add_argument("--new", type=int, default=16)
    options = parser.parse_args()
    folder = huggingface.resolve_folder(options.model)
    tokenizer = huggingface.load_tokenizer(folder)
    prompt = np.array(tokenizer.encode(options.prompt), np.int32)
    tokens = np.stack([np.roll(prompt, row) for row in range(4)])
    theirs = tunix_tokens(folder, huggingface.read_model_config(folder))(
        tokens, (-2,), options.new, greedy=True
    )
    ours = our_tokens(folder, tokens, options.new)
    print(repr(tokenizer.decode(ours[0])))
    if not np.array_equal(np.stack(theirs), ours):
        raise SystemExit(f"error: Tunix wrote {theirs}, ours {ours.tolist()}")
    print(f"the same {ours.size} tokens")


def our_tokens(folder: Path, tokens: np.ndarray, new: int) -> np.ndarray:
    """Greedy completions of exactly ``new`` tokens."""
    model_config, rows = (
        huggingface.read_model_config(folder),
        np.arange(len(tokens), dtype=np.int32),
    )
    rollouts = sample(
        jax.tree.map(jnp.asarray, huggingface.load_params(folder, model_config)),
        model_config,
        Prompts(
            tokens=tokens,
            lengths=np.full(len(tokens), tokens.shape[1], np.int32),
            problem_ids=rows,
        ),
        sampling=SamplingSection(max_new_tokens=new, temperature=0.0),
        eos_ids=(10**9,),
        keys=row_keys(0, "evaluate", 0, problem_ids=jnp.asarray(rows), samples=jnp.asarray(rows)),
    )
    return np.asarray(rollouts.tokens)[:, tokens.shape[1] :]


def tunix_sampler(name: str, model_config: ModelConfig) -> Sampler | None:
    """Tunix's sampler; None if it is not installed, or if there are no weights to load."""
    if importlib.util.find_spec("tunix") is None or name in KNOWN_MODELS:
        return None
    generate = tunix_tokens(huggingface.resolve_folder(name), model_config)

    def run(tokens: np.ndarray, slots: int, eos_ids: tuple[int, ...], new: int) -> np.ndarray:
        made = generate(tokens, eos_ids, new)
        return np.array([min(len(row) + 1, new) for row in made])  # cut before the end token

    return run


class Numbers:
    """A tokenizer for Tunix whose texts are lists of token ids: ``"17 4 99"``."""

    def encode(self, text, **_):
        return [int(number) for number in text.split()]

    def decode(self, ids, **_):
        return " ".join(map(str, ids))

    def bos_id(self):
        return None  # nothing is put before a prompt

    def eos_id(self):
        return -2

    def pad_id(self):
        return -1  # no token of any prompt: what equals it is masked


def tunix_tokens(folder: Path, model_config: ModelConfig) -> Callable[..., list[np.ndarray]]:
    """generate(tokens [N P], eos_ids, new, greedy) -> rows of new tokens, up to their end token."""
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.llama3 import model, params

    plain = dataclasses.replace(
        model_config, qkv_bias=False, output_bias=False, mlp_bias=False, rope_scaling=None
    )
    if model_config.architecture != "llama" or model_config != plain:
        raise ValueError(
            f"{folder} is {model_config.architecture}, or has biases or scaled positions; Tunix's "
            "llama3 knows plain Llama only"
        )
    tunix_config = model.ModelConfig(
        num_layers=model_config.layers,
        vocab_size=model_config.vocab_size,
        embed_dim=model_config.embed,
        hidden_dim=model_config.mlp,
        num_heads=model_config.heads,
        head_dim=model_config.head_dim,
        num_kv_heads=model_config.kv_heads,
        rope_theta=int(model_config.rope_theta),
        norm_eps=model_config.norm_eps,
        weight_tying=model_config.tied,
    )
    model.apply_rope = functools.partial(  # 0.1.7 does not pass on its config's rope_theta
        model.apply_rope, rope_theta=model_config.rope_theta
    )
    loaded = params.create_model_from_safe_tensors(
        str(folder), tunix_config, dtype=model_config.compute_dtype
    )
    samplers = {}  # its jitted functions keep the end tokens and the cache of their first trace

    def generate(tokens, eos_ids, new, greedy=False):
        width = tokens.shape[1]
        if (eos_ids, width, new) not in samplers:
            cache = CacheConfig(
                width + new, model_config.layers, model_config.kv_heads, model_config.head_dim
            )
            samplers[eos_ids, width, new] = Sampler(loaded, Numbers(), cache)
        made = samplers[eos_ids, width, new](
            [" ".join(map(str, row)) for row in tokens],
            max_generation_steps=new,
            max_prompt_length=width,
            eos_tokens=list(eos_ids),
            temperature=0.0 if greedy else 1.0,
            top_p=None if greedy else 1.0,
            seed=0,
        )
        return [np.asarray(row) for row in made.tokens]

    return generate


if __name__ == "__main__":
    command_line.run(main)
