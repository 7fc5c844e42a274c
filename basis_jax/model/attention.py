"""Causal attention over whole rows: plain, or by a kernel that never holds all scores of a row.

Every kind computes softmax(q k / sqrt(Dh)) v over the positions up to the query's own. Queries are
the last T of the S positions, so rows may continue a shared prefix. H/K query heads share a key
head.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from basis_jax.model.sharding import by_shard

KINDS = ("plain", "cudnn", "splash")
"""``plain`` holds all scores of a row at once. ``cudnn`` is NVIDIA's kernel (bfloat16 only),
``splash`` the Pallas kernel for TPUs."""
BLOCKS = (512, 256, 128)
"""Numbers of positions that the splash kernel can process at once. The smallest is the number of
lanes of a TPU."""
QUERY_AXES = ("batch", "time", "heads", "head_dim")
KEY_AXES = ("batch", "time", "kv_heads", "head_dim")


def kernel_of(platform: str, dtype: str, head_dim: int) -> str:
    """The best kind for a platform: "cpu", "gpu" (NVIDIA) or "tpu"."""
    if platform == "tpu":
        return "splash"
    return "cudnn" if platform == "gpu" and fits_cudnn(dtype, head_dim) else "plain"


def fits_cudnn(dtype: str, head_dim: int) -> bool:
    return dtype == "bfloat16" and head_dim % 8 == 0 and head_dim <= 128


def holds_scores(kind: str, steps: int) -> bool:
    """Whether all scores of a row of ``steps`` positions are in memory at once.

    The splash kernel pads rows to a whole block. Rows shorter than the smallest block use plain
    attention instead, because they have fewer scores than a block.
    """
    return kind == "plain" or (kind == "splash" and steps <= BLOCKS[-1])


def attend(
    kind: str,
    queries: Float[Array, "N T H Dh"],
    keys: Float[Array, "N S K Dh"],
    values: Float[Array, "N S K Dh"],
) -> Float[Array, "N T H Dh"]:
    """Attention of the given kind of ``KINDS``. NVIDIA's kernel cannot continue a prefix; such rows
    use plain attention."""
    steps, length = queries.shape[1], keys.shape[1]
    kernel = None
    if kind == "cudnn" and steps == length:
        kernel = cudnn
    if kind == "splash" and not holds_scores(kind, length):
        kernel = splash
    if kernel is None:
        return plain(queries, keys, values)
    return by_shard(kernel, (QUERY_AXES, KEY_AXES, KEY_AXES), QUERY_AXES)(queries, keys, values)


def cudnn(
    queries: Float[Array, "N T H Dh"],
    keys: Float[Array, "N T K Dh"],
    values: Float[Array, "N T K Dh"],
) -> Float[Array, "N T H Dh"]:
    """NVIDIA's kernel on one device."""
    return jax.nn.dot_product_attention(
        queries, keys, values, is_causal=True, implementation="cudnn"
    )


def plain(
    queries: Float[Array, "N T H Dh"],
    keys: Float[Array, "N S K Dh"],
    values: Float[Array, "N S K Dh"],
) -> Float[Array, "N T H Dh"]:
    rows, steps, heads, size = queries.shape
    prefix_length = keys.shape[1] - steps
    mask = jnp.arange(prefix_length + steps)[None] <= prefix_length + jnp.arange(steps)[:, None]
    grouped = queries.reshape(rows, steps, keys.shape[2], -1, size)
    scores = jnp.einsum(
        "ntkgd,nskd->nkgts", grouped, keys, preferred_element_type=jnp.float32
    ) / math.sqrt(size)
    scores = jnp.where(mask[None, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("nkgts,nskd->ntkgd", weights, values).reshape(rows, steps, heads, size)


def splash(
    queries: Float[Array, "N T H Dh"],
    keys: Float[Array, "N S K Dh"],
    values: Float[Array, "N S K Dh"],
    *,
    interpret: bool = False,
) -> Float[Array, "N T H Dh"]:
    """Splash attention on one device.

    Positions are padded to whole blocks after the rows' ends, where the causal mask hides them.
    ``interpret`` runs the kernel on any platform, slowly.
    """
    # Imported here, because other platforms do not need Pallas and it takes a while to import.
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    steps, length, heads, size = queries.shape[1], keys.shape[1], *queries.shape[2:]
    queries = queries / jnp.asarray(math.sqrt(size), queries.dtype)
    queries, keys, values = (_head_major(x) for x in (queries, keys, values))
    block, key_block = _block(queries.shape[2]), _block(keys.shape[2])
    mask = library.CausalMask((queries.shape[2], keys.shape[2]), offset=length - steps)
    kernel = library.make_splash_mha_single_device(
        library.MultiHeadMask([mask] * heads),
        block_sizes=library.BlockSizes(
            block_q=block,
            block_kv=key_block,
            block_q_dkv=block,
            block_kv_dkv=key_block,
            block_q_dq=block,
            block_kv_dq=key_block,
        ),
        interpret=interpret,
    )
    mixed = jax.vmap(kernel)(queries, keys, values)
    return mixed.transpose(0, 2, 1, 3)[:, :steps]


def _head_major(x: Float[Array, "N T heads Dh"]) -> Float[Array, "N heads P Dh"]:
    """Heads before positions, and positions padded to the smallest block."""
    padding = -x.shape[1] % BLOCKS[-1]
    return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).transpose(0, 2, 1, 3)


def _block(length: int) -> int:
    """The largest block that divides a padded length."""
    return next(block for block in BLOCKS if length % block == 0)
