"""Small models made in code, shared by the tests."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from basis_jax import hf, model
from basis_jax.types import Prompts

TINY = model.ModelConfig(
    architecture="qwen3",
    vocab_size=32,
    embed=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=48,
    max_positions=256,
    tied=True,
    qk_norm=True,
)


@functools.cache
def params(config=TINY, seed=0):
    """Random parameters, scaled up so that distributions are far from uniform."""
    made = jax.jit(model.init, static_argnums=0)(config, jax.random.key(seed))
    return jax.tree.map(lambda x: x * 4 if x.ndim > 2 else x, made)


def prompts(rows=6, width=7, seed=1):
    """Right-padded prompts of lengths 1..width (the first is full)."""
    key_tokens, key_lengths = jax.random.split(jax.random.key(seed))
    lengths = jax.random.randint(key_lengths, (rows,), 1, width + 1).at[0].set(width)
    tokens = jax.random.randint(key_tokens, (rows, width), 3, TINY.vocab_size)
    inside = jnp.arange(width)[None] < lengths[:, None]
    return Prompts(
        tokens=jnp.where(inside, tokens, 0),
        lengths=lengths,
        problem_ids=jnp.arange(rows, dtype=jnp.int32) + 10,
    )


@functools.partial(jax.jit, static_argnums=1)
def next_token_logits(params, config, tokens):
    """Logits [N T V] of what follows each token, by the full forward pass."""
    return model.logits(params, config, model.forward(params, config, tokens)[0])


token_logprobs = jax.jit(
    model.token_logprobs, static_argnums=1, static_argnames=("temperature", "chunk")
)

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz .,?+-*/=()^{}$\\\n"
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def write_folder(folder, config=TINY):
    """A Hugging Face folder with random weights and a tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(CHARACTERS)]
    config = dataclasses.replace(config, vocab_size=len(words) + len(words) % 4)
    hf.save_params(params(config), config, folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(folder)
    return folder
