"""Batches in pieces: strided, so that the pieces of a sharded axis stay on all devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dmrl.diffusion.likelihood import state_log_prob
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
    return _reordered(batch, _order(idle, count, shards))


def _order(idle: Bool[Array, " n"], count: int, shards: int) -> Int[Array, "s own"] | None:
    """Which item of its shard comes where; None: all as they are."""
    own = idle.shape[0] // shards
    if idle.shape[0] % shards or own % count:
        return None
    order = jnp.argsort(idle.reshape(shards, own), axis=1, stable=True)
    return order.reshape(shards, count, own // count).swapaxes(1, 2).reshape(shards, own)


def _reordered(batch: Any, order: Int[Array, "s own"] | None) -> Any:
    if order is None:
        return batch

    def one(x: jax.Array) -> jax.Array:
        rows = x.reshape(*order.shape, *x.shape[1:])
        place = order.reshape(*order.shape, *[1] * (x.ndim - 1))
        return jnp.take_along_axis(rows, place, axis=1).reshape(x.shape)

    return jax.tree.map(one, batch)


def over_live(
    f: Callable[[Any, Int[Array, ""]], Any], start: Any, live: Bool[Array, " count"]
) -> Any:
    """`start` after `start = f(start, number)` of every piece that is live, in order.

    A loop over these alone: a branch inside a loop over all would keep what it carries twice.
    """
    most, order, runs = len(live), jnp.argsort(~live, stable=True), jnp.sum(live)

    def left(state: tuple[jax.Array, Any]) -> jax.Array:
        return (state[0] < runs) & (state[0] < most)  # `most` for who counts operations

    def step(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        number = order[state[0]]
        return state[0] + 1, f(state[1], number)

    return jax.lax.while_loop(left, step, (jnp.int32(0), start))[1]


def in_pieces(denoiser: Denoiser, count: int, shards: int) -> Denoiser:
    """The same model, which takes the rows of a batch in `count` pieces, one after the other.

    For `prepare`, which may score a whole rollout at once: in the memory of a microbatch, and
    `score` without the pieces of which no position is needed. Rows that `count` does not divide
    go through whole.
    """
    if count == 1:
        return denoiser

    def by_piece(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def pieces(*args: jax.Array) -> jax.Array:
            rows = args[0].shape[0]
            if args[0].ndim < 2 or rows % count:
                return f(*args)
            cuts = jax.tree.map(lambda x: strided(x, count), args)  # None stays None
            return _whole(jax.lax.map(lambda piece: f(*piece), cuts))

        return pieces

    def score(*args: jax.Array) -> jax.Array:
        """Of (prompt, prompt_valid, state, labels, needed)."""
        if args[0].shape[0] % count:
            return state_log_prob(denoiser, *args)
        idle = ~jnp.any(args[-1], axis=1)
        order = _order(idle, count, shards)
        args, idle = _reordered((args, idle), order)
        cuts = [strided(x, count) for x in args]

        def one(out: jax.Array, number: jax.Array) -> jax.Array:
            return out.at[number].set(state_log_prob(denoiser, *(x[number] for x in cuts)))

        live = jnp.any(~strided(idle, count), axis=1)
        out = _whole(over_live(one, jnp.zeros(cuts[3].shape, jnp.float32), live))
        return out if order is None else _reordered(out, jnp.argsort(order, axis=1))

    def encode(tokens: jax.Array, valid: jax.Array, *last: int) -> jax.Array:
        return by_piece(lambda *rows: denoiser.encode(*rows, *last))(tokens, valid)

    return denoiser._replace(encode=encode, log_prob=by_piece(denoiser.log_prob), score=score)


def _whole(cut: jax.Array) -> jax.Array:
    """The inverse of `strided`."""
    return jnp.moveaxis(cut, 0, 1).reshape(-1, *cut.shape[2:])
