"""Batches in pieces: strided, so that the pieces of a sharded axis stay on all devices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

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
            out = jax.lax.map(lambda piece: f(*piece), [strided(x, count) for x in args])
            return jnp.moveaxis(out, 0, 1).reshape(rows, *out.shape[2:])

        return by_piece

    return denoiser._replace(encode=cut(denoiser.encode), log_prob=cut(denoiser.log_prob))
