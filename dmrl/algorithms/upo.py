"""UPO: learn where to unmask next, the denoiser frozen (arXiv 2510.05725).

    L = mean over trajectories of  -sum_n min(rho_n A, clip(rho_n, 1-eps, 1+eps) A)  +  beta R
    rho_n = g(a_n | x_n) / g_old(a_n | x_n),    A = r - mean of the group
    R = c log g(tau),  c = clip(g / g_old(tau), 1/2, 2) (1 + log g(tau) - log g_ref(tau)) frozen
    R = -sum_n sum_i y_n(i) log g(i | x_n)      where g_ref is max-confidence, whose KL is infinite

g chooses one position a step, a_n; log g(tau) = sum_n log g(a_n | x_n). At g = g_old the expected
gradient of the first R is that of KL(g || g_ref) between trajectories, which bounds the KL between
completions. Sums over steps, not means, as in the authors' code. g_old is read at temperature 1
whatever the rollout's: the authors draw at 0.8 and ignore that.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmrl.algorithms import advantage, surrogate
from dmrl.diffusion import decisions
from dmrl.types import Inner, Metrics, Models, PRNGKey, Probe, Rollout

REFERENCES = ("max_confidence", "softmax_confidence", "top_k")
LARGEST_LOG_RATIO = 10.0
RATIOS = (0.5, 2.0)
"""Clip of a trajectory's importance weight in R."""


@dataclasses.dataclass(frozen=True)
class Hyper:
    """Defaults are those of the authors' released configuration for Sudoku."""

    reference: str = "max_confidence"
    """`max_confidence`: R is the cross entropy to the most confident candidate. Otherwise R is the
    KL: to `softmax_confidence`, the softmax of confidence / tau; to `top_k`, uniform over the K
    most confident positions, the only ones that the order may then choose."""
    top_k: int = 0
    """K of `top_k` (the authors: 5), and of the sampler's order; 0 elsewhere: all positions."""
    tau: float = 0.05
    epsilon: float = 0.5
    beta: float = 1e-4
    divide_by_std: bool = False
    steps: int = 16
    """Denoising steps of the sampler, one position each: at least a template's masks."""
    block_length: int = 32
    keep_inputs: bool = False
    """Keep what the policy reads of every state for the backward pass, `steps` times the residual
    stream of a microbatch, for one denoiser forward in two; else memory is that of one step."""

    def __post_init__(self) -> None:
        surrogate.check(0.0, self.epsilon, self.beta, "token")
        if self.reference not in REFERENCES:
            raise ValueError(f"reference={self.reference!r}: choose one of {REFERENCES}")
        if (self.reference == "top_k") != (self.top_k > 0):
            raise ValueError(
                f"reference={self.reference!r} with top_k={self.top_k}: K > 0 belongs to 'top_k', "
                "0 to the others"
            )
        if not self.tau > 0:
            raise ValueError(f"tau={self.tau} must be positive")


class Batch(NamedTuple):
    """N whole trajectories."""

    trace: decisions.Trace
    advantage: Float[Array, " n"]
    old: Float[Array, "n t"] | None
    """log g_old of every decision; None while the order is still g_old."""
    weight: Float[Array, " n"]
    """1 / number of trajectories in the whole batch."""


def needs(hp: Hyper) -> frozenset[str]:
    """The order, and nothing else is trained."""
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
    """One item a trajectory; a step that revealed two positions gives a NaN loss."""
    del probe, key, inner
    assert rollout.reward is not None
    revealed = decisions.revealed(rollout, hp.steps)
    single = jnp.all(jnp.sum(revealed, axis=-1) <= 1, axis=-1)
    old = None
    if models.behaviour is not None:
        assert rollout.order_log_prob is not None
        old = jnp.sum(jnp.where(revealed, rollout.order_log_prob[:, None], 0.0), axis=-1)
    return Batch(
        trace=decisions.trace_of(rollout),
        advantage=advantage.group_relative(rollout.reward, rollout.group, hp.divide_by_std),
        old=old,
        weight=jnp.where(single, 1 / rollout.reward.size, jnp.nan).astype(jnp.float32),
    )


def loss(models: Models, batch: Batch, hp: Hyper) -> tuple[Float[Array, ""], Metrics]:
    """The equation above; `batch.weight` carries the mean over the whole batch."""
    tau = hp.tau if hp.reference == "softmax_confidence" else None
    read = functools.partial(decisions.summary, tau=tau)
    args = (hp.steps, hp.block_length, hp.top_k, read, hp.keep_inputs)
    found = decisions.visit(models.policy, batch.trace, *args)
    old = jax.lax.stop_gradient(found.log_prob) if batch.old is None else batch.old
    terms = objective(found, batch.advantage, old, hp)
    rho = jnp.exp(found.log_prob - old)
    decided = batch.weight[:, None] / jnp.maximum(jnp.sum(found.due, axis=1, keepdims=True), 1)
    each = {
        "clip_ratio/region_mean": (jnp.abs(rho - 1) > hp.epsilon).astype(jnp.float32),
        "order/entropy": found.entropy,
        "order/agreement": found.agrees,
    }
    metrics = {name: jnp.sum(decided * x) for name, x in each.items()}
    if hp.reference != "max_confidence":
        gap = jnp.sum(found.log_prob - found.reference, axis=1)
        metrics["kl"] = jnp.sum(batch.weight * gap)
    return jnp.sum(batch.weight * terms), metrics


def objective(
    found: decisions.Summary, advantage: Float[Array, " n"], old: Float[Array, "n t"], hp: Hyper
) -> Float[Array, " n"]:
    """The equation above for every trajectory."""
    limit = LARGEST_LOG_RATIO
    log_ratio = jnp.clip(found.log_prob - old, -limit, limit)
    gain = jnp.sum(surrogate.clipped(log_ratio, advantage[:, None], hp.epsilon), axis=1)
    if hp.reference == "max_confidence":
        return gain + hp.beta * jnp.sum(found.cross_entropy, axis=1)
    log_p = jnp.sum(found.log_prob, axis=1)
    frozen = jax.lax.stop_gradient(log_p)
    rho = jnp.clip(jnp.exp(frozen - jnp.sum(old, axis=1)), *RATIOS)
    cost = rho * (1 + frozen - jnp.sum(found.reference, axis=1))
    return gain + hp.beta * cost * log_p
