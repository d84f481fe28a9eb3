"""Batches in pieces: strided, so that the pieces of a sharded axis stay on all devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from dmrl.types import Denoiser


def strided(x: jax.Array, count: int) -> jax.Array:
    """[N, ...] -> [count, N / count, ...], every count-th row together.

    Strided, because contiguous pieces of a sharded axis would each live on one device.

    Raises:
      ValueError: `count` does not divide N.
    """
    if x.shape[0] % count:
        raise ValueError(f"microbatches={count} does not divide the {x.shape[0]} items of a term")
    return jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)


def idle_last(batch: Any, idle: Bool[Array, " n"], count: int, shards: int) -> Any:
    """The items of `batch` so ordered that idle ones fill the last of `count` strided pieces.

    Items stay on their shard, each with n / shards of them in a row. As they are where `count`
    does not divide these.
    """
    own = idle.shape[0] // shards
    if idle.shape[0] % shards or own % count:
        return batch
    order = jnp.argsort(idle.reshape(shards, own), axis=1, stable=True)
    order = order.reshape(shards, count, own // count).swapaxes(1, 2).reshape(shards, own)

    def reordered(x: jax.Array) -> jax.Array:
        rows = x.reshape(shards, own, *x.shape[1:])
        place = order.reshape(shards, own, *[1] * (x.ndim - 1))
        return jnp.take_along_axis(rows, place, axis=1).reshape(x.shape)

    return jax.tree.map(reordered, batch)


def in_pieces(denoiser: Denoiser, count: int) -> Denoiser:
    """The same model, which takes the rows of a batch in `count` pieces, one after the other.

    For `prepare`, which may score a whole rollout at once: in the memory of a microbatch. Rows
    that `count` does not divide go through whole.
    """
    if count == 1:
        return denoiser

    def cut(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def by_piece(*args: jax.Array) -> jax.Array:
            rows = args[0].shape[0]
            if args[0].ndim < 2 or rows % count:
                return f(*args)
            cuts = jax.tree.map(lambda x: strided(x, count), args)  # None stays None
            out = jax.lax.map(lambda piece: f(*piece), cuts)
            return jnp.moveaxis(out, 0, 1).reshape(rows, *out.shape[2:])

        return by_piece

    return denoiser._replace(encode=cut(denoiser.encode), log_prob=cut(denoiser.log_prob))
