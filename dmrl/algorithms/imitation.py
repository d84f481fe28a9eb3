"""A learned order's warm start: the order of max-confidence, imitated (UPO, arXiv 2510.05725).

    L = - mean over states of sum_i y(i) log g(i | x),   y one-hot at the most confident mask

The states are those that the sampler went through; ties of y are split evenly. The paper says no
more than that its orders begin this way.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from dmrl.diffusion import decisions
from dmrl.types import Inner, Metrics, Models, PRNGKey, Probe, Rollout


@dataclasses.dataclass(frozen=True)
class Hyper:
    """What the sampler does."""

    steps: int = 16
    """Its denoising steps."""
    block_length: int = 32


class Batch(NamedTuple):
    """N whole trajectories."""

    trace: decisions.Trace
    weight: Float[Array, " n"]
    """1 / number of decisions in the whole batch."""


def needs(hp: Hyper) -> frozenset[str]:
    """The order."""
    del hp
    return frozenset({"order"})


def prepare(
    models: Models,
    rollout: Rollout,
    probe: Probe | None,
    key: PRNGKey,
    inner: Inner,
    hp: Hyper,
) -> Batch:
    """One item a trajectory; rewards are not read."""
    del models, probe, key, inner
    trace = decisions.trace_of(rollout)
    due = jnp.sum(jnp.any(decisions.revealed(rollout, hp.steps), axis=-1))
    weight = jnp.broadcast_to(1 / jnp.maximum(due, 1), rollout.row.shape)
    return Batch(trace, weight)


def loss(models: Models, batch: Batch, hp: Hyper) -> tuple[Float[Array, ""], Metrics]:
    """The equation above; "order/agreement": the share of states whose favourite is the same."""
    read = functools.partial(decisions.summary, tau=None)
    found = decisions.visit(models.policy, batch.trace, hp.steps, hp.block_length, 0, read)
    each = batch.weight[:, None]
    return jnp.sum(each * found.cross_entropy), {"order/agreement": jnp.sum(each * found.agrees)}
