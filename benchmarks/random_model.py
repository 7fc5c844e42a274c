"""A Hugging Face folder with a known model's shape, random weights and a byte-level tokenizer.

    python -m benchmarks.random_model Qwen/Qwen3-0.6B models/random

Speed and memory depend only on shapes, so a run of this folder shows what a run of the real model
would take, without the hub. Its completions are noise that hardly ends before the length limit.
"""

import argparse
import json
from pathlib import Path

import jax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from basis_jax import command_line
from basis_jax.model import decoder
from basis_jax.weights import huggingface
from basis_jax.weights.known_models import KNOWN_MODELS

END = "<|endoftext|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=list(KNOWN_MODELS), metavar="HUB_ID")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    model_config = KNOWN_MODELS[options.model]
    params = jax.jit(decoder.init, static_argnums=0)(model_config, jax.random.key(0))
    huggingface.save_params(params, model_config, options.folder, dtype="bfloat16")
    byte_tokenizer().save(str(options.folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    (options.folder / "tokenizer_config.json").write_text(json.dumps(about))
    print(options.folder)


def byte_tokenizer() -> Tokenizer:
    """One token for each byte, and one that ends a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


if __name__ == "__main__":
    command_line.run(main)
