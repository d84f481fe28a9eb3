"""The objective: a weighted sum of terms, and its gradient over microbatches."""

import dataclasses
import difflib
import functools
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from dmrl import algorithms, pieces
from dmrl.types import Metrics, Models


class Term(NamedTuple):
    """One weighted summand of the objective."""

    name: str
    weight: float
    algorithm: ModuleType
    hyper: Any


def make_term(name: str, weight: float, options: dict[str, Any]) -> Term:
    """The algorithm module `name` of `dmrl.algorithms`, with its `Hyper` filled from `options`.

    Raises:
      ValueError: unknown algorithm or option, with the nearest right name.
    """
    shared = ("advantage", "surrogate")
    known = [m.name for m in pkgutil.iter_modules(algorithms.__path__) if m.name not in shared]
    if name not in known:
        raise ValueError(f"no algorithm {name!r}{_nearest(name, known)}")
    module: Any = importlib.import_module(f"dmrl.algorithms.{name}")
    fields = [f.name for f in dataclasses.fields(module.Hyper)]
    for option in options:
        if option not in fields:
            raise ValueError(f"{name} has no option {option!r}{_nearest(option, fields)}")
    return Term(name, weight, module, module.Hyper(**options))


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} there are {', '.join(sorted(known)) or 'none'}"


def needs(terms: Sequence[Term]) -> frozenset[str]:
    """What the terms ask for beyond a rollout: 'reference', 'drafts', names of heads."""
    asked = [t.algorithm.needs(t.hyper) for t in terms if hasattr(t.algorithm, "needs")]
    return frozenset[str]().union(*asked)


def value(
    terms: Sequence[Term], models: Models, batches: Sequence[Any]
) -> tuple[jax.Array, Metrics]:
    """The weighted sum of the terms, and their metric sums; those of the first have no prefix."""
    total, metrics = jnp.zeros(()), dict[str, jax.Array]()
    for i, (term, batch) in enumerate(zip(terms, batches, strict=True)):
        loss, sums = term.algorithm.loss(models, batch, term.hyper)
        total += term.weight * loss
        prefix = f"{term.name}/" if i else ""
        metrics |= {prefix + name: v for name, v in sums.items()}
    return total, metrics | {"loss": total}


def gradient(
    terms: Sequence[Term],
    models: Callable[[Any], Models],
    trainable: Any,
    batches: Sequence[Any],
    count: int,
    shards: int,
) -> tuple[Any, Metrics]:
    """Gradient in `trainable` and metric sums, over `count` strided microbatches.

    `models` binds `trainable` to what a loss sees; `shards` is in how many pieces the batch axis
    is cut over devices. A microbatch without a gradient costs nothing.
    """
    differentiate = jax.grad(lambda t, b: value(terms, models(t), b), has_aux=True)
    if count == 1:
        found: tuple[Any, Metrics] = differentiate(trainable, tuple(batches))
        return found
    cut, live = _cut(terms, batches, count, shards)

    def accumulate(total: Any, piece: Any) -> tuple[Any, None]:
        batches, live = piece
        return jax.lax.cond(
            live,
            lambda: jax.tree.map(jnp.add, total, differentiate(trainable, batches)),
            lambda: total,
        ), None

    shapes = jax.eval_shape(differentiate, trainable, jax.tree.map(lambda x: x[0], cut))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    summed: tuple[Any, Metrics] = jax.lax.scan(accumulate, zeros, (cut, live))[0]
    return summed


def _cut(
    terms: Sequence[Term], batches: Sequence[Any], count: int, shards: int
) -> tuple[tuple[Any, ...], Bool[Array, " count"]]:
    """The batches in microbatches, and which of these have a gradient.

    Items that give none (`idle` of an algorithm) are put together.
    """
    cut = functools.partial(pieces.strided, count=count)
    live, made = jnp.zeros((count,), bool), []
    for term, batch in zip(terms, batches, strict=True):
        if not hasattr(term.algorithm, "idle"):
            live, ordered = jnp.ones((count,), bool), batch
        else:
            idle = term.algorithm.idle(batch, term.hyper)
            ordered, idle = pieces.idle_last((batch, idle), idle, count, shards)
            live |= jnp.any(~cut(idle), axis=1)
        made.append(jax.tree.map(cut, ordered))
    return tuple(made), live
