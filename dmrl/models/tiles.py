"""The rows of an array that are needed, walked tile by tile."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

TILE = 128
"""Rows of a tile, where some rows are not needed: half of one is wasted on average."""


class Tiles:
    """The rows of a device: all as they are or, with `needed`, these alone and sorted to the front.

    `pack` and `unpack` go from the one order to the other.
    """

    def __init__(self, needed: jax.Array | None):
        self.needed = needed
        if needed is not None:
            flat = needed.reshape(-1)
            self.spare = -flat.shape[0] % TILE
            self.order = jnp.argsort(~flat, stable=True)
            self.count = (jnp.sum(flat) + TILE - 1) // TILE

    def pack(self, x: jax.Array) -> jax.Array:
        """[*lead, ...] -> [rows, ...], padded to whole tiles."""
        if self.needed is None:
            return x
        flat = x.reshape(-1, *x.shape[self.needed.ndim :])[self.order]
        return jnp.pad(flat, [(0, self.spare), *[(0, 0)] * (flat.ndim - 1)])

    def unpack(self, x: jax.Array) -> jax.Array:
        """The inverse; 0 where a row was not needed."""
        if self.needed is None:
            return x
        rows = x[: self.order.shape[0]]
        back = jnp.zeros_like(rows).at[self.order].set(rows, unique_indices=True)
        back = back.reshape(*self.needed.shape, *x.shape[1:])
        return jnp.where(jnp.expand_dims(self.needed, range(self.needed.ndim, back.ndim)), back, 0)

    def visit(self, f: Callable[..., tuple[Any, Any]], own: Any, rows: Any, total: Any) -> Any:
        """(own, total) after `own, more = f(own, *rows)` of every tile; `total` adds up `more`."""
        if self.needed is None:
            return f(own, *rows)

        def tile(number: jax.Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
            def cut(x: jax.Array) -> jax.Array:
                return jax.lax.dynamic_slice_in_dim(x, number * TILE, TILE)

            def put(x: jax.Array, new: jax.Array) -> jax.Array:
                return jax.lax.dynamic_update_slice_in_dim(x, new, number * TILE, axis=0)

            new, more = f(jax.tree.map(cut, state[0]), *jax.tree.map(cut, rows))
            return jax.tree.map(put, state[0], new), jax.tree.map(jnp.add, state[1], more)

        most = (self.order.shape[0] + self.spare) // TILE  # for who counts operations

        def left(state: tuple[Any, jax.Array]) -> jax.Array:
            return (state[1] < self.count) & (state[1] < most)

        start = ((own, total), jnp.zeros((), jnp.int32))
        return jax.lax.while_loop(left, lambda s: (tile(s[1], s[0]), s[1] + 1), start)[0]
