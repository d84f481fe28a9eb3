"""Which positions the sampler reveals next."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmrl.types import RowKeys


def low_confidence(
    log_p: Float[Array, "b l v"], token_log_p: Float[Array, "b l"], keys: RowKeys
) -> Float[Array, "b l"]:
    """Score of a position: log-probability of its proposed token at temperature 1.

    LLaDA's `low_confidence` remasking: the least confident proposals stay masked.
    """
    del log_p, keys
    return token_log_p


def random(
    log_p: Float[Array, "b l v"], token_log_p: Float[Array, "b l"], keys: RowKeys
) -> Float[Array, "b l"]:
    """Score of a position: uniform noise, keyed by row."""
    del log_p
    return jax.vmap(lambda key: jax.random.uniform(key, token_log_p.shape[1:]))(keys)


ORDERS: dict[str, Callable[..., Float[Array, "b l"]]] = {
    "low_confidence": low_confidence,
    "random": random,
}


def select_top(
    score: Float[Array, "b l"], candidates: Bool[Array, "b l"], count: Int[Array, " b"]
) -> Bool[Array, "b l"]:
    """The `count` best-scored candidates of each row (all of them if there are fewer).

    Ties go to the leftmost. Ranks by counting pairs: `count` may be traced, and no sort runs.
    """
    score = jnp.where(candidates, score, -jnp.inf)
    index = jnp.arange(score.shape[1])
    ahead = score[:, None, :] > score[:, :, None]
    tied = score[:, None, :] == score[:, :, None]
    ahead |= tied & (index[None, None, :] < index[None, :, None])
    return candidates & (jnp.sum(ahead, axis=-1) < count[:, None])
