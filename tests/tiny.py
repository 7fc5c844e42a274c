"""Small models made in code, shared by the tests."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from basis_jax.model import decoder, logprobs
from basis_jax.types import Prompts, Signals
from basis_jax.weights import huggingface

TINY = decoder.ModelConfig(
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
EVERYTHING = dataclasses.replace(  # every optional part at once
    TINY,
    tied=False,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    rope_theta=500.0,
    rope_scaling=decoder.RopeScaling(8.0, 1.0, 4.0, 64),
)


def signals(rewards, ids):
    """Valid rows of one token each."""
    return Signals(
        rewards=jnp.asarray(rewards, jnp.float32),
        valid=jnp.ones(len(ids), bool),
        problem_ids=jnp.asarray(ids, jnp.int32),
        lengths=jnp.ones(len(ids), jnp.int32),
    )


@functools.cache
def params(model_config=TINY, seed=0):
    """Random parameters, scaled up so that distributions are far from uniform."""
    made = jax.jit(decoder.init, static_argnums=0)(model_config, jax.random.key(seed))
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
def next_token_logits(params, model_config, tokens):
    """Logits [N T V] of what follows each token, by the full forward pass."""
    return decoder.logits(params, model_config, decoder.forward(params, model_config, tokens)[0])


token_logprobs = jax.jit(
    logprobs.token_logprobs, static_argnums=1, static_argnames=("temperature", "chunk")
)


def tokens_of(shape, vocab=TINY.vocab_size):
    return np.random.default_rng(1).integers(0, vocab, shape).astype(np.int32)


@functools.cache
def random_params(model_config):
    """Parameters in which biases and norms too differ from what they are initialised to."""
    random = np.random.default_rng(0)

    def make(path, leaf):
        centre = 1.0 if "norm" in path[-1].key else 0.0
        return jnp.asarray(random.normal(centre, 0.15, leaf.shape).astype(np.float32))

    return jax.tree_util.tree_map_with_path(make, decoder.param_shapes(model_config))


def score_sum(params, model_config, tokens, chunk):
    """Something that both outputs of token_logprobs flow into, and the log-probabilities."""
    found, entropy = logprobs.token_logprobs(params, model_config, tokens, chunk=chunk)
    return jnp.sum(found * jnp.cos(found)) + 0.3 * jnp.sum(entropy), found


gradient = jax.jit(jax.grad(score_sum, has_aux=True), static_argnums=(1, 3))


def assert_same_gradient(found, expected, *, scale=1e-5):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=scale * float(jnp.abs(y).max()))


CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz .,?+-*/=()^{}$\\\n"
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def write_folder(folder, model_config=TINY):
    """A Hugging Face folder with random weights and a tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(CHARACTERS)]
    model_config = dataclasses.replace(model_config, vocab_size=len(words) + len(words) % 4)
    huggingface.save_params(params(model_config), model_config, folder)
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
