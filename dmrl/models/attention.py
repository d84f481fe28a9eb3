"""Bidirectional attention: XLA's (or cuDNN's), a few heads at a time on a CPU, or the splash kernel
on TPUs.

Splash keeps no [queries, keys] array: at 1,756 tokens and 32 heads that is 395 MB a sequence in
float32, once forward and again backward. Under 2,000 tokens XLA's is as fast, scores being a few
per cent of the work.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from dmrl.models import headwise, products, target

KINDS = ("xla", "splash")
TILE = 128
"""Queries and keys are padded to multiples of it, and a head is one wide, or several."""
BATCH_AXES = ("data", "fsdp")


def attend(
    q: Float[Array, "b q h d"],
    k: Float[Array, "b s kv d"],
    v: Float[Array, "b s kv d"],
    valid: Bool[Array, "b s"],
    kind: str,
) -> Float[Array, "b q h d"]:
    """softmax(q k^T / sqrt d) v over the valid keys.

    `splash` where the program is compiled for a TPU and every position asks; else XLA's, and of
    long sequences on a CPU `headwise`.
    """
    platform = target.platform()
    if kind == "splash" and platform == "tpu" and q.shape[1] == k.shape[1]:
        return splash(q, k, v, valid)
    if platform == "cpu" and k.shape[1] >= headwise.SHORTEST:
        return on_each_device(headwise.attention, q, k, v, valid)
    return xla(q, k, v, valid)


def xla(q: Any, k: Any, v: Any, valid: Any) -> Any:
    """`jax.nn.dot_product_attention`; float32 means float32."""
    mask = jnp.broadcast_to(valid[:, None, None, :], (q.shape[0], 1, q.shape[1], k.shape[1]))
    with jax.default_matmul_precision(products.precision(q.dtype).name.lower()):
        return jax.nn.dot_product_attention(q, k, v, mask=mask)


def splash(q: Any, k: Any, v: Any, valid: Any, interpret: bool = False) -> Any:
    """JAX's splash kernel."""
    return on_each_device(functools.partial(_splash, interpret=interpret), q, k, v, valid)


def on_each_device(own: Callable[..., Any], q: Any, k: Any, v: Any, valid: Any) -> Any:
    """`own` of each device's own rows and heads."""
    shape = jax.sharding.get_abstract_mesh().shape
    if math.prod(shape.values()) == 1:
        return own(q, k, v, valid)
    rows = tuple(a for a in BATCH_AXES if shape.get(a, 1) > 1)
    if q.shape[0] % math.prod(shape[a] for a in rows):
        rows = ()
    heads = "tensor" if shape.get("tensor", 1) > 1 and k.shape[2] % shape["tensor"] == 0 else None
    wide = PartitionSpec(rows or None, None, heads, None)
    specs = (wide, wide, wide, PartitionSpec(rows or None, None))
    return jax.shard_map(own, in_specs=specs, out_specs=wide, check_vma=False)(q, k, v, valid)


def _splash(q: Any, k: Any, v: Any, valid: Any, interpret: bool) -> Any:
    (_, length, heads, width), each = q.shape, q.shape[2] // k.shape[2]
    spare = -length % TILE

    def laid(x: Any, copies: int) -> Any:
        x = jnp.repeat(x, copies, axis=2)
        return jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, spare), (0, 0)))

    seen = jnp.pad(valid, ((0, 0), (0, spare))).astype(jnp.int32)
    ids = splash_attention.SegmentIds(q=jnp.ones_like(seen), kv=seen)
    full = splash_attention.FullMask((length + spare, length + spare))
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([full] * heads), interpret=interpret
    )
    scaled = (q * width**-0.5).astype(q.dtype)
    out = jax.vmap(kernel)(laid(scaled, 1), laid(k, each), laid(v, each), ids)
    return out.transpose(0, 2, 1, 3)[:, :length].astype(q.dtype)
