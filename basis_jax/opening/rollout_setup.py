"""What stays fixed for all rollouts of a run, built from its config."""

from basis_jax.config import Config


def stop_ids(config: Config, tokenizer) -> tuple[int, ...]:
    """Token ids of ``sampling.stop_tokens``. Raises ValueError where one is not one token."""
    ids = []
    for text in config.sampling.stop_tokens:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) != 1:
            raise ValueError(
                f"sampling.stop_tokens holds {text!r}, which is {len(tokens)} tokens of this "
                "model; only strings of one token can stop a completion"
            )
        ids += tokens
    return tuple(ids)
