"""Hidden states -> log-probabilities of labels, without a [rows, V] array.

The vocabulary is walked in chunks with a running float32 (max, sum); the backward pass
recomputes each chunk's logits. All labels of a row share one pass: Z labels cost what one does.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dmrl.models.llada import dot

CHUNK = 4096
"""Columns of the vocabulary held at a time. A vocabulary up to this size is one chunk."""


def logits(
    hidden: Float[Array, "*lead d"], kernel: Float[Array, "d v"], dropped: int | None
) -> Float[Array, "*lead v"]:
    """Float32 logits [...,V]; the `dropped` token's logit is -inf."""
    out = dot(hidden, kernel, jnp.float32)
    if dropped is None:
        return out
    column = jnp.expand_dims(jnp.arange(out.shape[-1]) == dropped, range(out.ndim - 1))
    return jnp.where(column, -jnp.inf, out)


def log_prob(
    hidden: Float[Array, "*lead d"],
    kernel: Float[Array, "d v"],
    labels: Int[Array, "*lead z"],
    dropped: int | None,
) -> Float[Array, "*lead z"]:
    """log softmax(hidden @ kernel)[labels] in float32; -inf for the `dropped` token."""
    vocab = kernel.shape[1]
    if vocab <= CHUNK:
        rows = logits(hidden, kernel, dropped)
        picked = jnp.take_along_axis(rows, labels, axis=-1)
        return picked - jax.nn.logsumexp(rows, axis=-1, keepdims=True)
    return _chunked(chunk_size(vocab), dropped, hidden, kernel, labels)


def chunk_size(vocab: int) -> int:
    """The largest divisor of `vocab` up to CHUNK, whole 128-lane tiles if possible.

    LLaDA's 126,464 gives 3,328, so no chunk is padded and none needs a mask of its own.
    """
    divisors = [c for c in range(1, CHUNK + 1) if vocab % c == 0]
    return max([c for c in divisors if c % 128 == 0] or divisors)


def _column_chunk(
    hidden: jax.Array, kernel: jax.Array, start: jax.Array, chunk: int, dropped: int | None
) -> tuple[jax.Array, jax.Array]:
    """The chunk's columns of the kernel and its logits [...,chunk]."""
    columns = jax.lax.dynamic_slice_in_dim(kernel, start, chunk, axis=1)
    part = dot(hidden, columns, jnp.float32)
    if dropped is not None:
        hit = jnp.expand_dims(start + jnp.arange(chunk) == dropped, range(part.ndim - 1))
        part = jnp.where(hit, -jnp.inf, part)
    return columns, part


def _forward(
    chunk: int, dropped: int | None, hidden: jax.Array, kernel: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def step(carry, start):
        high, total, picked = carry
        _, part = _column_chunk(hidden, kernel, start, chunk, dropped)
        new_high = jnp.maximum(high, jnp.max(part, -1))
        total = total * jnp.exp(high - new_high) + jnp.sum(jnp.exp(part - new_high[..., None]), -1)
        local = labels - start
        inside = (local >= 0) & (local < chunk)
        value = jnp.take_along_axis(part, jnp.clip(local, 0, chunk - 1), axis=-1)
        return (new_high, total, jnp.where(inside, value, picked)), None

    lead = hidden.shape[:-1]
    zero = jnp.zeros(lead, jnp.float32)
    carry = (jnp.full_like(zero, -1e30), zero, jnp.zeros(labels.shape, jnp.float32))
    starts = jnp.arange(0, kernel.shape[1], chunk)
    (high, total, picked), _ = jax.lax.scan(step, carry, starts)
    log_z = high + jnp.log(total)
    return picked - log_z[..., None], log_z


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(
    chunk: int, dropped: int | None, hidden: jax.Array, kernel: jax.Array, labels: jax.Array
) -> jax.Array:
    return _forward(chunk, dropped, hidden, kernel, labels)[0]


def _chunked_fwd(chunk, dropped, hidden, kernel, labels):
    out, log_z = _forward(chunk, dropped, hidden, kernel, labels)
    return out, (hidden, kernel, labels, log_z)


def _chunked_bwd(chunk, dropped, residuals, cotangent):
    hidden, kernel, labels, log_z = residuals
    total = jnp.sum(cotangent, -1, keepdims=True)
    rows = hidden.reshape(-1, hidden.shape[-1])

    def step(d_hidden, start):
        columns, part = _column_chunk(hidden, kernel, start, chunk, dropped)
        d_part = -total * jnp.exp(part - log_z[..., None])
        local = labels - start
        for z in range(labels.shape[-1]):  # Z is small; a one-hot over Z would be Z chunks wide
            hit = local[..., z : z + 1] == jnp.expand_dims(jnp.arange(chunk), range(local.ndim - 1))
            d_part += jnp.where(hit, cotangent[..., z : z + 1], 0.0)
        d_part = d_part.astype(hidden.dtype)
        d_hidden += dot(d_part, columns.T, jnp.float32)
        d_columns = dot(rows.T, d_part.reshape(-1, chunk), jnp.float32)
        return d_hidden, d_columns.astype(kernel.dtype)

    starts = jnp.arange(0, kernel.shape[1], chunk)
    d_hidden, d_kernel = jax.lax.scan(step, jnp.zeros(hidden.shape, jnp.float32), starts)
    d_kernel = jnp.moveaxis(d_kernel, 0, 1).reshape(kernel.shape)
    no_gradient = np.zeros(labels.shape, jax.dtypes.float0)
    return d_hidden.astype(hidden.dtype), d_kernel, no_gradient


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
