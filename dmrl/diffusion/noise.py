"""Random keys and Gumbel noise, keyed by row so that results do not depend on the batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dmrl.types import PRNGKey, RowKeys


def row_keys(key: PRNGKey, row: Int[Array, " b"]) -> RowKeys:
    """One key a row, a function of (key, row) alone."""
    return jax.vmap(lambda r: jax.random.fold_in(key, r))(row)


def fold_in(keys: RowKeys, value: int | jax.Array) -> RowKeys:
    """Folds one value, or one value a row, into a vector of keys."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(value, keys.shape))


def perturb(
    keys: RowKeys, logits: Float[Array, "b l v"], temperature: float
) -> Float[Array, "b l v"]:
    """logits + T * Gumbel in float32: its argmax is a sample of softmax(logits / T)."""
    if temperature == 0:
        return logits
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
    return logits + temperature * noise
