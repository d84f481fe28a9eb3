"""Frozen weights in a byte each: what an adapter is trained beside, for chips with little memory.

The kernels of the layers become integers with one scale an output column,

    W_io ~ values_io * scale_o,   scale_o = max_i |W_io| / 127,   |error| <= scale_o / 2

and are widened where they are multiplied, so activations and gradients keep their type. Embedding,
head and norms stay as they are. Our own and not a quantisation library's: forty lines against a
dependency that intercepts matrix products, whose trees our stacked layers would have to learn.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Int8(NamedTuple):
    """A kernel, in place of its array in the tree of parameters."""

    values: Int[Array, "*l i o"]
    scale: Float[Array, "*l o"]


def rounded(kernel: Float[Array, "*l i o"]) -> Int8:
    """The nearest such kernel, by absolute maximum of every output column."""
    wide = kernel.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-2) / 127
    values = jnp.round(wide / jnp.where(scale > 0, scale, 1.0)[..., None, :])
    return Int8(values.astype(jnp.int8), scale)


def is_kernel(path: str) -> bool:
    """Whether the leaf at 'blocks/attn/q_proj/kernel' is one that becomes integers."""
    return re.search("^blocks/.*/kernel$", path) is not None


def quantized(params: Any) -> Any:
    """A parameter tree with its layers' kernels rounded; a pure function."""

    def one(path: Any, leaf: jax.Array) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return rounded(leaf) if is_kernel(name) else leaf

    return jax.tree_util.tree_map_with_path(one, params)
