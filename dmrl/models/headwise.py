"""Attention on a CPU: a few heads at a time, so that their scores stay in the processor's cache.

What is kept for the backward pass is the result and log Z of every query, as in FlashAttention
(arXiv 2205.14135): scores are computed again, [queries, keys] of all heads never exist. At 544
keys and 24 heads of 32, forward takes half of XLA's time and backward two thirds (measured).
There is no forward-mode derivative.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dmrl.models import products

SCORES = 2**21
"""Bytes of scores at a time, as long as one head has no more."""
SHORTEST = 64
"""Keys from which on it pays: of fewer, XLA's attention spreads all heads over the cores at once
and takes up to a quarter less time on two (measured, 256 rows of 20 to 32 tokens)."""
_LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Score of a key that is padding: finite, so that a row of padding alone gives numbers. It gets no
gradient."""


def attention(
    q: Float[Array, "b q h d"],
    k: Float[Array, "b s kv d"],
    v: Float[Array, "b s kv d"],
    valid: Bool[Array, "b s"],
) -> Float[Array, "b q h d"]:
    """softmax(q k^T / sqrt d) v over the valid keys; scores and sums in float32."""
    (batch, length, heads, width), shared = q.shape, k.shape[2]
    each = heads // shared
    parts = _parts(batch * shared, each * length * k.shape[1] * 4)

    def laid(x: jax.Array) -> jax.Array:
        """[B, positions, heads, D] -> [parts, key heads of a part, their queries or keys, D]."""
        rows = x.shape[1] * x.shape[2] // shared
        return x.swapaxes(1, 2).reshape(parts, batch * shared // parts, rows, width)

    seen = jnp.repeat(valid, shared, axis=0).reshape(parts, batch * shared // parts, 1, k.shape[1])
    out = _attend(laid((q * width**-0.5).astype(q.dtype)), laid(k), laid(v), seen)
    return out.reshape(batch, heads, length, width).swapaxes(1, 2)


def _parts(heads: int, size: int) -> int:
    """The least number of equal parts of `heads`, each `size` bytes, that stay under SCORES."""
    least = max(1, math.ceil(heads * size / SCORES))
    return next((n for n in range(least, heads + 1) if heads % n == 0), max(heads, 1))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return products.times(a, b, jnp.float32)


def _scores(q: jax.Array, k: jax.Array, seen: jax.Array) -> jax.Array:
    return jnp.where(seen, _dot(q, k.mT), _LOWEST)


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(result, log Z of every query) of a part."""
    scores = _scores(q, k, seen)
    high = jnp.max(scores, -1, keepdims=True)
    weights = jnp.exp(scores - high)
    total = jnp.sum(weights, -1, keepdims=True)
    return (_dot(weights.astype(v.dtype), v) / total).astype(q.dtype), high + jnp.log(total)


def _backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array,
    out: jax.Array,
    log_z: jax.Array,
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v of a part."""
    probability = jnp.where(seen, jnp.exp(_scores(q, k, seen) - log_z), 0.0)
    d_v = products.over_rows(probability.astype(v.dtype), cotangent, jnp.float32)
    mean = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    d_scores = (probability * (_dot(cotangent, v.mT) - mean)).astype(q.dtype)
    d_q, d_k = _dot(d_scores, k), products.over_rows(d_scores, q, jnp.float32)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    return _attend_fwd(q, k, v, seen)[0]


def _attend_fwd(q, k, v, seen):
    out, log_z = jax.lax.map(lambda part: _forward(*part), (q, k, v, seen))
    return out, (q, k, v, seen, out, log_z)


def _attend_bwd(kept, cotangent):
    return *jax.lax.map(lambda part: _backward(*part), (*kept, cotangent)), None


_attend.defvjp(_attend_fwd, _attend_bwd)
