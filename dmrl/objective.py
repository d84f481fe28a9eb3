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
    sums = list[Metrics]()
    for term, batch in zip(terms, batches, strict=True):
        loss, metrics = term.algorithm.loss(models, batch, term.hyper)
        sums.append(metrics | {"loss": term.weight * loss})
    joined = _joined(terms, sums)
    return joined["loss"], joined


def gradient(
    terms: Sequence[Term],
    models: Callable[[Any], Models],
    trainable: Any,
    batches: Sequence[Any],
    count: int,
    shards: int,
) -> tuple[Any, Metrics]:
    """Float32 gradient in `trainable` and metric sums, over `count` strided microbatches.

    `models` binds `trainable` to what a loss sees; `shards` is in how many pieces the batch axis
    is cut over devices. One term goes after the other, each over its own microbatches: those
    without a gradient cost nothing, and no two terms keep activations at once.
    """
    total, sums = None, list[Metrics]()
    for term, batch in zip(terms, batches, strict=True):
        if total is not None:  # or the compiler might interleave the terms
            trainable, total = jax.lax.optimization_barrier((trainable, total))

        def differentiate(
            batch: Any, term: Term = term, at: Any = trainable
        ) -> tuple[Any, Metrics]:
            def of_term(t: Any) -> tuple[jax.Array, Metrics]:
                return value((term,), models(t), (batch,))

            grads, metrics = jax.grad(of_term, has_aux=True)(at)
            return jax.tree.map(lambda x: x.astype(jnp.float32), grads), metrics

        if count == 1:
            grads, metrics = differentiate(batch)
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)
        else:
            if total is None:
                total = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable)
            total, metrics = _summed(differentiate, total, *_cut(term, batch, count, shards))
        sums.append(metrics)
    return total, _joined(terms, sums)


def _joined(terms: Sequence[Term], sums: Sequence[Metrics]) -> Metrics:
    """Metrics of all terms: their losses added, names of those after the first with a prefix."""
    joined = {
        (f"{term.name}/" if i else "") + name: v
        for i, (term, metrics) in enumerate(zip(terms, sums, strict=True))
        for name, v in metrics.items()
        if name != "loss"
    }
    return joined | {"loss": sum((m["loss"] for m in sums), jnp.zeros(()))}


def _cut(
    term: Term, batch: Any, count: int, shards: int
) -> tuple[Any, Bool[Array, " count"] | None]:
    """The microbatches, items without a gradient put together, and which have one (None: all)."""
    cut = functools.partial(pieces.strided, count=count)
    if not hasattr(term.algorithm, "idle"):
        return jax.tree.map(cut, batch), None
    idle = term.algorithm.idle(batch, term.hyper)
    batch, idle = pieces.idle_last((batch, idle), idle, count, shards)
    return jax.tree.map(cut, batch), jnp.any(~cut(idle), axis=1)


def _summed(
    differentiate: Callable[[Any], tuple[Any, Metrics]],
    total: Any,
    cut: Any,
    live: Bool[Array, " count"] | None,
) -> tuple[Any, Metrics]:
    """`total` plus the gradients of the live pieces, and their metrics."""
    first = jax.tree.map(lambda x: x[0], cut)
    metrics = jax.eval_shape(lambda piece: differentiate(piece)[1], first)
    start = total, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), metrics)

    def add(found: Any, piece: Any) -> Any:
        return jax.tree.map(jnp.add, found, differentiate(piece))

    if live is None:
        return jax.lax.scan(lambda found, piece: (add(found, piece), None), start, cut)[0]
    return pieces.over_live(
        lambda found, number: add(found, jax.tree.map(lambda x: x[number], cut)), start, live
    )
