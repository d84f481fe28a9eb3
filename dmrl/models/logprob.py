"""Hidden states -> log-probabilities of labels, without a [rows, V] array.

The vocabulary is walked in chunks with a running float32 (max, sum); the backward pass
recomputes each chunk's logits. All labels of a row share one pass: Z labels cost what one does.

On a mesh every device walks the columns of the head that it holds, for all rows of its data
group: hidden states are gathered (8 kB a row of LLaDA-8B), never the head (1 GB), and what is
reduced over devices is a maximum, a sum and the labels' logits.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from dmrl.models.layers import BATCH_AXES, constrain, dot

CHUNK = 4096
"""Columns of the vocabulary held at a time. A vocabulary up to this size is one chunk."""
SMALLEST = 512
"""Columns below which a chunk is not cut further for the rows that a device gathers."""
HEAD_AXES = ("fsdp", "tensor")
"""Mesh axes over which the head's columns are cut (`dmrl.parallel.RULES`)."""


class Cut(NamedTuple):
    """How the mesh in use cuts rows (the first axis of hidden states) and columns of the head."""

    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    gathered: tuple[str, ...] = ()
    """Axes that cut both: along them hidden states are gathered."""
    shards: int = 1
    """Pieces of the columns."""
    pieces: int = 1
    """Pieces of the rows that are gathered."""


def _cut(rows: int, vocab: int) -> Cut:
    """What applies here; no cut without a mesh, or where a size does not divide."""
    shape = jax.sharding.get_abstract_mesh().shape

    def size(axes: tuple[str, ...]) -> int:
        return math.prod(shape[a] for a in axes)

    columns = tuple(a for a in HEAD_AXES if shape.get(a, 1) > 1)
    if size(columns) == 1 or vocab % size(columns):
        return Cut()
    cuts = [tuple(a for a in axes if shape[a] > 1) for axes in (BATCH_AXES, BATCH_AXES[:1], ())]
    cut = next(axes for axes in cuts if rows % size(axes) == 0)
    gathered = tuple(a for a in cut if a in columns)
    return Cut(cut, columns, gathered, size(columns), size(gathered))


def logits(
    hidden: Float[Array, "*lead d"], kernel: Float[Array, "d v"], dropped: int | None
) -> Float[Array, "*lead v"]:
    """Float32 logits [...,V]; the `dropped` token's logit is -inf. On a mesh V stays cut."""
    cut = _cut(hidden.shape[0] if hidden.ndim > 1 else 1, kernel.shape[1])
    if not cut.columns:
        out = dot(hidden, kernel, jnp.float32)
    else:
        rows = tuple(a for a in cut.rows if a not in cut.columns) or None
        lead = [rows, *[None] * (hidden.ndim - 2)] if hidden.ndim > 1 else []
        out = dot(constrain(hidden, *lead, None), kernel, jnp.float32)
        out = constrain(out, *lead, cut.columns)
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
    cut = _cut(hidden.shape[0] if hidden.ndim > 1 else 1, vocab)
    if not cut.columns and vocab <= CHUNK:
        rows = logits(hidden, kernel, dropped)
        picked = jnp.take_along_axis(rows, labels, axis=-1)
        return picked - jax.nn.logsumexp(rows, axis=-1, keepdims=True)
    chunk = chunk_size(vocab // cut.shards, max(CHUNK // cut.pieces, min(CHUNK, SMALLEST)))
    return _chunked(cut, chunk, dropped, hidden, kernel, labels)


def chunk_size(vocab: int, most: int | None = None) -> int:
    """The largest divisor of `vocab` up to `most` (CHUNK), of whole 128-lane tiles if possible.

    LLaDA's 126,464 gives 3,328, so no chunk is padded and none needs a mask of its own. Tiles are
    given up where they would make chunks less than half as wide.
    """
    divisors = [c for c in range(1, (most or CHUNK) + 1) if vocab % c == 0]
    widest = max(divisors)
    return max([c for c in divisors if c % 128 == 0 and 2 * c >= widest], default=widest)


def _mapped(cut: Cut, f: Callable[..., Any], reads: str, writes: str) -> Callable[..., Any]:
    """`f` on every device's own share of rows ('r') and of the head's columns ('c')."""
    if not cut.columns:
        return f
    specs = {
        "r": PartitionSpec(cut.rows or None),
        "c": PartitionSpec(None, cut.columns),
    }
    ins, outs = (tuple(specs[kind] for kind in kinds) for kinds in (reads, writes))
    return jax.shard_map(f, in_specs=ins, out_specs=outs, check_vma=False)


def _whole(cut: Cut, *rows: jax.Array) -> tuple[jax.Array, ...]:
    """The rows of all devices that share columns with this one."""
    if not cut.gathered:
        return rows
    return tuple(jax.lax.all_gather(x, cut.gathered, axis=0, tiled=True) for x in rows)


def _own(cut: Cut, x: jax.Array) -> jax.Array:
    """This device's part of gathered rows."""
    if not cut.gathered:
        return x
    count = x.shape[0] // cut.pieces
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(cut.gathered) * count, count)


def _first_column(cut: Cut, width: int) -> jax.Array | int:
    return jax.lax.axis_index(cut.columns) * width if cut.columns else 0


def _column_chunk(
    hidden: jax.Array,
    kernel: jax.Array,
    start: jax.Array,
    first: jax.Array | int,
    chunk: int,
    dropped: int | None,
) -> tuple[jax.Array, jax.Array]:
    """The chunk's columns of the kernel and its logits [...,chunk]."""
    columns = jax.lax.dynamic_slice_in_dim(kernel, start, chunk, axis=1)
    part = dot(hidden, columns, jnp.float32)
    if dropped is not None:
        here = first + start + jnp.arange(chunk) == dropped
        part = jnp.where(jnp.expand_dims(here, range(part.ndim - 1)), -jnp.inf, part)
    return columns, part


def _forward(
    cut: Cut,
    chunk: int,
    dropped: int | None,
    hidden: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(log-probabilities, log Z) of a device's rows, from its columns and everyone's."""
    hidden, labels = _whole(cut, hidden, labels)
    first = _first_column(cut, kernel.shape[1])

    def step(carry, start):
        high, total, picked = carry
        _, part = _column_chunk(hidden, kernel, start, first, chunk, dropped)
        new_high = jnp.maximum(high, jnp.max(part, -1))
        total = total * jnp.exp(high - new_high) + jnp.sum(jnp.exp(part - new_high[..., None]), -1)
        local = labels - first - start
        inside = (local >= 0) & (local < chunk)
        value = jnp.take_along_axis(part, jnp.clip(local, 0, chunk - 1), axis=-1)
        return (new_high, total, jnp.where(inside, value, picked)), None

    zero = jnp.zeros(hidden.shape[:-1], jnp.float32)
    carry = (jnp.full_like(zero, -1e30), zero, jnp.zeros(labels.shape, jnp.float32))
    starts = jnp.arange(0, kernel.shape[1], chunk)
    (high, total, picked), _ = jax.lax.scan(step, carry, starts)
    if cut.columns:
        highest = jax.lax.pmax(high, cut.columns)
        total = jax.lax.psum(total * jnp.exp(high - highest), cut.columns)
        high, picked = highest, jax.lax.psum(picked, cut.columns)
    log_z = _own(cut, high + jnp.log(total))
    return _own(cut, picked) - log_z[..., None], log_z


def _backward(
    cut: Cut,
    chunk: int,
    dropped: int | None,
    hidden: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    log_z: jax.Array,
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of a device's rows and of its columns."""
    hidden, labels, log_z, cotangent = _whole(cut, hidden, labels, log_z, cotangent)
    first = _first_column(cut, kernel.shape[1])
    sums = jnp.sum(cotangent, -1, keepdims=True)
    rows = hidden.reshape(-1, hidden.shape[-1])

    def step(d_hidden, start):
        columns, part = _column_chunk(hidden, kernel, start, first, chunk, dropped)
        d_part = -sums * jnp.exp(part - log_z[..., None])
        local = labels - first - start
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
    if cut.gathered:
        d_hidden = jax.lax.psum_scatter(d_hidden, cut.gathered, scatter_dimension=0, tiled=True)
    if rest := tuple(a for a in cut.columns if a not in cut.gathered):
        d_hidden = jax.lax.psum(d_hidden, rest)
    if others := tuple(a for a in cut.rows if a not in cut.columns):
        d_kernel = jax.lax.psum(d_kernel, others)
    return d_hidden.astype(hidden.dtype), d_kernel


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(
    cut: Cut,
    chunk: int,
    dropped: int | None,
    hidden: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
) -> jax.Array:
    return _chunked_fwd(cut, chunk, dropped, hidden, kernel, labels)[0]


def _chunked_fwd(cut, chunk, dropped, hidden, kernel, labels):
    forward = _mapped(cut, functools.partial(_forward, cut, chunk, dropped), "rcr", "rr")
    out, log_z = forward(hidden, kernel, labels)
    return out, (hidden, kernel, labels, log_z)


def _chunked_bwd(cut, chunk, dropped, residuals, cotangent):
    backward = _mapped(cut, functools.partial(_backward, cut, chunk, dropped), "rcrrr", "rc")
    d_hidden, d_kernel = backward(*residuals, cotangent)
    return d_hidden, d_kernel, np.zeros(residuals[2].shape, jax.dtypes.float0)


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
