"""Hidden states -> log-probabilities of labels, without a [rows, V] array.

The vocabulary is walked in chunks with a running float32 (max, sum); the backward pass
recomputes each chunk's logits. All labels of a row share one pass: Z labels cost what one does.

On a mesh every device walks the columns of the head that it holds, for all rows of its data
group: hidden states are gathered (8 kB a row of LLaDA-8B), never the head (1 GB), and what is
reduced over devices is a maximum, a sum and the labels' logits.

Rows without a label that counts (revealed tokens, prompts, what follows EOS) can be left out: each
device then sorts its rows and walks only the tiles that hold a needed one, forward and backward.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dmrl.models import products, tiles
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
    parts: int = 1
    """Pieces of the rows."""


def _cut(rows: int, vocab: int) -> Cut:
    """What applies here; no cut without a mesh, or where a size does not divide."""
    shape = jax.sharding.get_abstract_mesh().shape

    def size(axes: tuple[str, ...]) -> int:
        return math.prod(shape.get(a, 1) for a in axes)

    columns = tuple(a for a in HEAD_AXES if shape.get(a, 1) > 1)
    columns = columns if vocab % size(columns) == 0 else ()
    cuts = [tuple(a for a in axes if size((a,)) > 1) for axes in (BATCH_AXES, BATCH_AXES[:1], ())]
    cut = next(axes for axes in cuts if rows % size(axes) == 0)
    gathered = tuple(a for a in cut if a in columns)
    return Cut(cut, columns, gathered, size(columns), size(gathered), size(cut))


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
    needed: Bool[Array, "*lead"] | None = None,
) -> Float[Array, "*lead z"]:
    """log softmax(hidden @ kernel)[labels] in float32; -inf for the `dropped` token.

    With `needed` the other rows may cost nothing: what they give is 0 or the truth, and what they
    are given back is no gradient.
    """
    vocab = kernel.shape[1]
    cut = _cut(hidden.shape[0] if hidden.ndim > 1 else 1, vocab)
    if not cut.columns and vocab <= CHUNK:
        rows = logits(hidden, kernel, dropped)
        picked = jnp.take_along_axis(rows, labels, axis=-1)
        return picked - jax.nn.logsumexp(rows, axis=-1, keepdims=True)
    if math.prod(hidden.shape[:-1]) // cut.parts * cut.pieces <= tiles.TILE:  # that a device walks
        needed = None
    if needed is None and not cut.columns:
        cut = Cut()
    chunk = chunk_size(vocab // cut.shards, max(CHUNK // cut.pieces, min(CHUNK, SMALLEST)))
    return _chunked(cut, chunk, dropped, hidden, kernel, labels, needed)


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
    if not cut.columns and not cut.rows:
        return f
    specs = {
        "r": PartitionSpec(cut.rows or None),
        "c": PartitionSpec(None, cut.columns or None),
    }
    ins, outs = (tuple(specs[kind] for kind in kinds) for kinds in (reads, writes))
    return jax.shard_map(f, in_specs=ins, out_specs=outs, check_vma=False)


def _whole(cut: Cut, *rows: Any) -> tuple[Any, ...]:
    """The rows of all devices that share columns with this one; None stays None."""
    if not cut.gathered:
        return rows

    def gathered(x: jax.Array) -> jax.Array:
        return jax.lax.all_gather(x, cut.gathered, axis=0, tiled=True)

    return jax.tree.map(gathered, rows)


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
    columns: jax.Array,
    first: jax.Array | int,
    dropped: int | None,
) -> jax.Array:
    """Logits [...,chunk] of columns of the kernel that begin at token `first`."""
    part = dot(hidden, columns, jnp.float32)
    if dropped is not None:
        here = first + jnp.arange(columns.shape[1]) == dropped
        part = jnp.where(jnp.expand_dims(here, range(part.ndim - 1)), -jnp.inf, part)
    return part


def _forward(
    cut: Cut,
    chunk: int,
    dropped: int | None,
    hidden: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    needed: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(log-probabilities, log Z) of a device's rows, from its columns and everyone's."""
    hidden, labels, needed = _whole(cut, hidden, labels, needed)
    tiled = tiles.Tiles(needed)
    rows, first = (tiled.pack(hidden), tiled.pack(labels)), _first_column(cut, kernel.shape[1])

    def step(carry, start):
        columns = jax.lax.dynamic_slice_in_dim(kernel, start, chunk, axis=1)

        def update(own, hidden, labels):
            high, total, picked = own
            part = _column_chunk(hidden, columns, first + start, dropped)
            new_high = jnp.maximum(high, jnp.max(part, -1))
            more = jnp.sum(jnp.exp(part - new_high[..., None]), -1)
            local = labels - first - start
            inside = (local >= 0) & (local < chunk)
            value = jnp.take_along_axis(part, jnp.clip(local, 0, chunk - 1), axis=-1)
            total = total * jnp.exp(high - new_high) + more
            return (new_high, total, jnp.where(inside, value, picked)), ()

        return tiled.visit(update, carry, rows, ())[0], None

    zero = jnp.zeros(rows[0].shape[:-1], jnp.float32)
    carry = (jnp.full_like(zero, -1e30), zero, jnp.zeros(rows[1].shape, jnp.float32))
    starts = jnp.arange(0, kernel.shape[1], chunk)
    (high, total, picked), _ = jax.lax.scan(step, carry, starts)
    if cut.columns:
        highest = jax.lax.pmax(high, cut.columns)
        total = jax.lax.psum(total * jnp.exp(high - highest), cut.columns)
        high, picked = highest, jax.lax.psum(picked, cut.columns)
    log_z = high + jnp.log(total)
    out, log_z = tiled.unpack(picked - log_z[..., None]), tiled.unpack(log_z)
    return _own(cut, out), _own(cut, log_z)


def _backward(
    cut: Cut,
    chunk: int,
    dropped: int | None,
    hidden: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    log_z: jax.Array,
    cotangent: jax.Array,
    needed: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of a device's rows and of its columns."""
    hidden, labels, log_z, cotangent, needed = _whole(cut, hidden, labels, log_z, cotangent, needed)
    if needed is not None:  # a last tile has rows whose log Z is unknown: no probability is theirs
        log_z = jnp.where(needed, log_z, 1e30)
        cotangent = jnp.where(needed[..., None], cotangent, 0)
    tiled, first = tiles.Tiles(needed), _first_column(cut, kernel.shape[1])
    packed = tuple(tiled.pack(x) for x in (hidden, labels, log_z, cotangent))

    def step(carry, start):
        d_hidden, d_kernel = carry
        columns = jax.lax.dynamic_slice_in_dim(kernel, start, chunk, axis=1)

        def update(d_hidden, hidden, labels, log_z, cotangent):
            part = _column_chunk(hidden, columns, first + start, dropped)
            d_part = -jnp.sum(cotangent, -1, keepdims=True) * jnp.exp(part - log_z[..., None])
            local = labels - first - start
            for z in range(labels.shape[-1]):  # Z is small; a one-hot over Z is Z chunks wide
                places = jnp.expand_dims(jnp.arange(chunk), range(local.ndim - 1))
                d_part += jnp.where(local[..., z : z + 1] == places, cotangent[..., z : z + 1], 0.0)
            d_part = d_part.astype(hidden.dtype)
            d_hidden += dot(d_part, columns.T, jnp.float32)
            rows, parts = hidden.reshape(-1, hidden.shape[-1]), d_part.reshape(-1, chunk)
            return d_hidden, products.over_rows(rows, parts, jnp.float32)

        nothing = jnp.zeros(columns.shape, jnp.float32)
        d_hidden, d_columns = tiled.visit(update, d_hidden, packed, nothing)
        d_columns = d_columns.astype(kernel.dtype)
        # Into place: stacking the chunks would take the head's size twice.
        d_kernel = jax.lax.dynamic_update_slice_in_dim(d_kernel, d_columns, start, axis=1)
        return (d_hidden, d_kernel), None

    carry = (jnp.zeros(packed[0].shape, jnp.float32), jnp.zeros_like(kernel))
    (d_hidden, d_kernel), _ = jax.lax.scan(step, carry, jnp.arange(0, kernel.shape[1], chunk))
    d_hidden = tiled.unpack(d_hidden)
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
    needed: jax.Array | None,
) -> jax.Array:
    return _chunked_fwd(cut, chunk, dropped, hidden, kernel, labels, needed)[0]


def _chunked_fwd(cut, chunk, dropped, hidden, kernel, labels, needed):
    more = () if needed is None else (needed,)
    run = functools.partial(_forward, cut, chunk, dropped)
    out, log_z = _mapped(cut, run, "rcr" + "r" * len(more), "rr")(hidden, kernel, labels, *more)
    return out, (hidden, kernel, labels, log_z, more)


def _chunked_bwd(cut, chunk, dropped, residuals, cotangent):
    *args, more = residuals
    run = functools.partial(_backward, cut, chunk, dropped)
    backward = _mapped(cut, run, "rcrrr" + "r" * len(more), "rc")
    none = [np.zeros(x.shape, jax.dtypes.float0) for x in (args[2], *more)]
    return *backward(*args, cotangent, *more), none[0], none[1] if more else None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
