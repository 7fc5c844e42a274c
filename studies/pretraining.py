"""What the scripts that make an embedded model share: tokenizer, encoding, maximum likelihood."""

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from basis_jax.model import decoder
from basis_jax.model.logprobs import token_logprobs

SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>")
CHAT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def word_tokenizer(tokens: Sequence[str], piece: str) -> Tokenizer:
    """A tokenizer with one token per match of the pattern ``piece``. Decoding joins the pieces
    unchanged. Spare tokens fill the vocabulary up to a multiple of 8, so that it can be split."""
    spare = [f"<|spare_{i}|>" for i in range(-len(tokens) % 8)]
    ids = {token: i for i, token in enumerate([*tokens, *spare])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(piece), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "unk_token": "<|unk|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 128,
        "chat_template": CHAT,
    }
    generation = {
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|pad|>"),
    }
    for name, content in (
        ("tokenizer_config.json", described),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def encode(
    tokenizer: Tokenizer, rows: Sequence[tuple[str, str]], width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of prompts with completions, and a mask of the completions and their EOS: [N T]."""
    prompts = [f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n" for p, _ in rows]
    full = [f"{p}{c}<|im_end|>" for p, (_, c) in zip(prompts, rows, strict=True)]
    tokens = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width), np.float32)
    encoded = zip(tokenizer.encode_batch(prompts), tokenizer.encode_batch(full), strict=True)
    for row, (prompt, whole) in enumerate(encoded):
        tokens[row, : len(whole)] = whole.ids
        mask[row, len(prompt) : len(whole)] = 1
    return tokens, mask


@functools.partial(jax.jit, static_argnums=1)
def completion_probability(params, model_config, tokens, mask):
    """P(completion, EOS | prompt), exactly: [N]."""
    logprobs, _ = token_logprobs(params, model_config, tokens)
    return jnp.exp(jnp.sum(jnp.where(mask > 0, logprobs, 0.0), axis=1))


def fit(
    model_config: decoder.ModelConfig,
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
    *,
    steps: int,
    rate: float,
    reported: Callable[[int], bool],
    report: Callable[[PyTree], None],
) -> PyTree:
    """Maximum likelihood of the completions by AdamW, with cosine decay of the learning rate to 0.

    ``batches`` are pairs from ``encode``, one per step. ``report`` is called with the
    parameters after the steps that are ``reported``, and after the last.
    """
    params = jax.jit(decoder.init, static_argnums=0)(model_config, jax.random.key(0))
    schedule = optax.warmup_cosine_decay_schedule(0, rate, 100, steps, rate / 50)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01)
    )

    def negative(params, tokens, mask):
        logprobs, _ = token_logprobs(params, model_config, tokens)
        return -jnp.sum(logprobs * mask) / jnp.sum(mask)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, tokens, mask):
        loss, gradients = jax.value_and_grad(negative)(params, tokens, mask)
        changes, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, changes), state, loss

    state, started = optimizer.init(params), time.perf_counter()
    for step in range(1, steps + 1):
        params, state, loss = update(params, state, *next(batches))
        if reported(step) or step == steps:
            print(f"step {step}: loss {loss:.3f}, {time.perf_counter() - started:.0f} s")
            report(params)
    return params
