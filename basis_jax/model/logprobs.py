"""Log-probabilities and entropies of tokens, computed with the logits of one chunk at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int, PyTree

from basis_jax.model import decoder
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.sharding import constrain, over_batch

PIECES = 4  # a single chunk is cut into this many pieces


def token_logprobs(
    params: PyTree,
    model_config: ModelConfig,
    tokens: Int[Array, "N T"],
    *,
    mask: Bool[Array, "N T"] | None = None,
    temperature: float = 1.0,
    chunk: int = 512,
) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
    """log p(token t | tokens before t) at ``temperature``, and the entropy (nats) of that draw.

    Entry t is about token t. Entry 0 is 0, because nothing predicts the first token, and so are all
    entries outside ``mask``. Forward and backward, logits exist for at most ``chunk`` positions of
    every row at a time: N x chunk x V float32, never N x T x V. The tokens in the mask are moved to
    the front of each row, so the output layer can skip chunks with only prompts and padding.
    """
    logprobs, entropy, _ = token_scores(
        params, model_config, tokens, mask=mask, temperature=temperature, chunk=chunk
    )
    return logprobs, entropy


def token_scores(
    params: PyTree,
    model_config: ModelConfig,
    tokens: Int[Array, "N T"],
    *,
    mask: Bool[Array, "N T"] | None = None,
    temperature: float = 1.0,
    chunk: int = 512,
) -> tuple[Float[Array, "N T"], Float[Array, "N T"], Float[Array, " N"]]:
    """``token_logprobs``, and the log of the sum of exp(logits / temperature) that the first token
    in the mask was drawn from: the value of the completion's start, if logits are Q-values.

    The latter has a gradient and costs the logits of one position per row, N x V float32. It has no
    meaning in rows without a token in the mask.
    """
    hidden, _ = decoder.forward(params, model_config, tokens)
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    following, counts = (jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (tokens, mask))
    order = jnp.argsort(~counts, axis=1, stable=True)
    hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
    following, counts = (jnp.take_along_axis(x, order, axis=1) for x in (following, counts))
    start = decoder.logits(params, model_config, hidden[:, :1])[:, 0] / temperature
    weight = decoder.output_weight(params, model_config)
    scores = score_targets(temperature, chunk, hidden, weight, following, counts)
    back = jnp.argsort(order, axis=1)
    shifted = (
        jnp.pad(jnp.take_along_axis(x, back, axis=1)[:, :-1], ((0, 0), (1, 0))) for x in scores
    )
    logprobs, entropy = (jnp.where(mask, x, 0.0) for x in shifted)
    return logprobs, entropy, jax.nn.logsumexp(start, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def score_targets(
    temperature: float,
    chunk: int,
    hidden: Float[Array, "N T D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, "N T"],
    counts: Bool[Array, "N T"],
) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
    """log softmax(hidden weight^T / temperature) at the targets, and the entropy of the softmax.

    Positions are processed in chunks. A chunk in which no position of any row counts is skipped:
    its results are 0 and it has no gradient. If all positions fit into one chunk, it is cut into
    pieces (``chunk_count``). Products are in the dtype of ``hidden``, sums and softmax in float32.
    The backward pass recomputes each chunk's logits z; those of pieces are kept, as together they
    are no larger than a chunk. With p = softmax(z / temperature) and its entropy H,
    dz = (dlogp (onehot - p) - dH p (log p + H)) / temperature.
    """
    return _scores(temperature, chunk, hidden, weight, targets, counts)[0][:2]


def _scores(temperature, chunk, hidden, weight, targets, counts):
    """(log-probabilities, entropies, log sum exp of the scaled logits), each [N T], and the scaled
    logits [chunks N C V] if they fit into one chunk."""
    steps = targets.shape[1]

    def score(part, target, weight):
        scaled = _scaled_logits(part, weight, temperature)
        return _statistics(scaled, target), scaled if steps <= chunk else None

    def score_rows(hidden, weight, targets, live):
        def score_chunk(_, parts):
            part, target, alive = parts
            shapes = jax.eval_shape(score, part, target, weight)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            return None, jax.lax.cond(alive, score, lambda *_: zeros, part, target, weight)

        parts = (_split(hidden, chunk), _split(targets, chunk), live)
        statistics, scaled = jax.lax.scan(score_chunk, None, parts)[1]
        return tuple(_join(x, steps) for x in statistics), scaled

    operands = (hidden, _gathered(weight, hidden.dtype), targets, _live(counts, chunk))
    results = ((0, 0, 0), 1 if steps <= chunk else None)
    return over_batch(score_rows, operands, (0, None, 0, None), results)


def _gathered(weight, dtype):
    """The weight in the compute dtype, split over ``tensor`` only: gathered before any loop."""
    return constrain(jnp.asarray(weight, dtype), ("vocab", "activation_embed"))


def _live(counts, chunk):
    """[chunks]: whether any row has a position that counts in it; the same on all devices."""
    return jnp.any(_split(counts, chunk), axis=(1, 2))


def _statistics(scaled, targets):
    """Log-probabilities, entropies and log sum exp (lse) of scaled logits z [N C V].

    The entropy is lse - sum p z. Both sums over the vocabulary are taken in one pass.
    """
    top = jnp.max(scaled, axis=-1)
    powers, zero = jnp.exp(scaled - top[..., None]), np.float32(0)
    total, moment = jax.lax.reduce(
        (powers, powers * scaled),
        (zero, zero),
        lambda x, y: (x[0] + y[0], x[1] + y[1]),
        (scaled.ndim - 1,),
    )
    lse = top + jnp.log(total)
    picked = jnp.take_along_axis(scaled, targets[..., None], axis=-1)[..., 0] - lse
    return picked, lse - moment / total, lse


def _scores_forward(temperature, chunk, hidden, weight, targets, counts):
    operands = [x.value for x in (hidden, weight, targets, counts)]
    (logprobs, entropy, lse), scaled = _scores(temperature, chunk, *operands)
    return (logprobs, entropy), (*operands, entropy, lse, scaled)


def _scores_backward(temperature, chunk, kept, slopes):
    """Each group of devices sums d weight over its chunks; the groups are summed at the end."""
    hidden, weight, targets, counts, entropy, lse, scaled = kept
    slope, entropy_slope = (None if isinstance(x, SymbolicZero) else x for x in slopes)

    def rows_gradients(low, live, scaled, *operands):
        def add_chunk(total, parts):
            part, *others, scaled, alive = parts

            def add(total):
                made = _scaled_logits(part, low, temperature) if scaled is None else scaled
                back = _slopes(temperature, made, *others).astype(part.dtype)
                products = {"preferred_element_type": jnp.float32}
                of_hidden = jnp.einsum("ncv,vd->ncd", back, low, **products)
                of_weight = jnp.einsum("ncv,ncd->vd", back, part, **products)
                total = constrain(total + of_weight, ("vocab", "activation_embed"))
                return total, of_hidden.astype(part.dtype)

            skip = lambda total: (total, jnp.zeros_like(part))  # noqa: E731
            return jax.lax.cond(alive, add, skip, total)

        parts = [None if x is None else _split(x, chunk) for x in operands]
        total = constrain(jnp.zeros(low.shape, jnp.float32), ("vocab", "activation_embed"))
        total, of_hidden = jax.lax.scan(add_chunk, total, (*parts, scaled, live))
        return total[None], _join(of_hidden, targets.shape[1])

    operands = (
        *(_gathered(weight, hidden.dtype), _live(counts, chunk), scaled),
        *(hidden, targets, lse, entropy, slope, entropy_slope),
    )
    axes = (None, None, 1) + (0,) * 6
    of_weight, of_hidden = over_batch(rows_gradients, operands, axes, (0, 0))
    of_weight = constrain(jnp.sum(of_weight, axis=0), ("vocab", "embed"))
    return of_hidden, of_weight.astype(weight.dtype), None, None


def _slopes(temperature, scaled, targets, lse, entropy, slope, entropy_slope):
    """d logits [N C V] of one chunk, from its scaled logits and the gradients of its scores."""
    logp = scaled - lse[..., None]
    back = jnp.zeros_like(lse)[..., None]
    if slope is not None:
        back = back - slope[..., None]
    if entropy_slope is not None:
        back = back - entropy_slope[..., None] * (logp + entropy[..., None])
    back = back * jnp.exp(logp)
    if slope is not None:
        words = jax.lax.broadcasted_iota(targets.dtype, scaled.shape, scaled.ndim - 1)
        back = back + jnp.where(words == targets[..., None], slope[..., None], 0.0)
    return back / temperature


score_targets.defvjp(_scores_forward, _scores_backward, symbolic_zeros=True)


def _scaled_logits(hidden, weight, temperature):
    logits = jnp.einsum("ncd,vd->ncv", hidden, weight, preferred_element_type=jnp.float32)
    return logits / temperature


def chunk_count(steps: int, chunk: int) -> int:
    """Number of chunks of at most ``chunk`` positions, or ``PIECES`` if one would be enough."""
    return PIECES if steps <= chunk else -(-steps // chunk)


def _split(x, chunk):
    """[N T ...] -> [chunks, N, C, ...] with C <= chunk, the last chunk padded with zeros."""
    rows, steps = x.shape[:2]
    chunks = chunk_count(steps, chunk)
    size = -(-steps // chunks)
    x = jnp.pad(x, ((0, 0), (0, chunks * size - steps)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape((rows, chunks, size) + x.shape[2:]), 1, 0)


def _join(x, steps):
    """[chunks, N, C, ...] -> [N T ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape((x.shape[0], -1) + x.shape[3:])[:, :steps]
