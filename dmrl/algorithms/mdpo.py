"""MDPO: every step of the sampler answers for the drafts after it (arXiv 2508.13148).

At step t the sampler predicts the whole completion, a draft d_t with reward R_t:

    V_t = (R_t - R_{t-1}) + 1 + mean_{s > t} R_s   (R_{-1} = 0; at the last step R_T, no mean)
    A_t = (V_t - mean of the group) / (std of the group + 1e-4)
    L_t = 1/#masked * sum over masked i of  c_i ( lambda_t S_i + beta/2 (log pi_ref - log pi)_i^2 )
    S_i = -min(rho_i A_t, clip(rho_i) A_t),  lambda_t = L / #masked,  c_i = pi_old(d_t,i | x_t)

averaged over the completions and over the K steps with the largest sum of |A_t|. The sampler
reveals part of its own draft, so what follows depends on it: a fresh draw from the same
distribution would earn the credit of later rewards with expectation zero.

Every masked position counts, after an EOS too, as in the authors' code. The K steps are those of
the whole batch, where the authors take each device's: the result does not depend on the layout.
The std is the population's, where theirs is the sample's.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmrl.algorithms import advantage, surrogate
from dmrl.diffusion.guidance import tempered
from dmrl.diffusion.likelihood import state_log_prob
from dmrl.types import Inner, Metrics, Models, PRNGKey, Probe, ProbePlan, Rollout


@dataclasses.dataclass(frozen=True)
class Hyper:
    """Defaults are those of the authors' full run; their demo has K = 16, 0.1 and no KL."""

    states: int = 8
    """K."""
    temperature: float = 0.4
    """Of the scored policy and of the confidence c: set it to the sampler's. (Where the sampler is
    greedy there is no such law; take 1.)"""
    epsilon: float = 0.2
    """Without effect at one inner update, where the ratio is 1."""
    beta: float = 0.02

    def __post_init__(self) -> None:
        surrogate.check(0.0, self.epsilon, self.beta, "token")
        if self.states < 1 or not self.temperature > 0:
            raise ValueError(
                f"need states >= 1 and temperature > 0, got {self.states=} {self.temperature=}"
            )


def probes(rollout: Rollout, key: PRNGKey, hp: Hyper) -> ProbePlan:
    """The sampler's draft at every one of its T steps.

    Raises:
      ValueError: more states than the sampler has steps.
    """
    del key
    assert rollout.drafts is not None
    rows, steps, _ = rollout.drafts.shape
    if hp.states > steps:
        raise ValueError(f"states={hp.states} must be at most the sampler's {steps} steps")
    every = jnp.broadcast_to(jnp.arange(steps, dtype=jnp.int32), (rows, steps))
    return ProbePlan(every, fillings=1, temperature=0.0, own=True)


def needs(hp: Hyper) -> frozenset[str]:
    """The sampler's drafts, and a reference if there is a KL penalty."""
    return surrogate.needs(hp.beta) | {"drafts"}


def values(reward: Float[Array, "b t"]) -> Float[Array, "b t"]:
    """V_t from the rewards R_t of all T drafts."""
    gain = jnp.diff(reward, axis=1, prepend=0.0)
    later = jnp.arange(reward.shape[1] - 1, 0, -1)[None]
    mean = jnp.cumsum(reward[:, :0:-1], axis=1)[:, ::-1] / later
    return gain + 1 + jnp.concatenate([mean, reward[:, -1:]], axis=1)


def prepare(
    models: Models,
    rollout: Rollout,
    probe: Probe | None,
    key: PRNGKey,
    inner: Inner,
    hp: Hyper,
) -> surrogate.Batch:
    """One item a (completion, step), of the K steps of the whole batch."""
    del key, inner
    assert probe is not None
    assert probe.reward is not None
    columns = jax.vmap(advantage.group_relative, in_axes=(1, None, None), out_axes=1)
    credit = columns(values(probe.reward[..., 0]), rollout.group, True)
    open_ = jnp.any(probe.state == models.policy.mask_id, axis=-1)  # the rest has nothing to train
    _, step = jax.lax.top_k(jnp.sum(jnp.abs(credit) * open_, axis=0), hp.states)

    def items(x: jax.Array) -> jax.Array:
        x = jnp.take(x, step, axis=1)
        return x.reshape(-1, *x.shape[2:])

    state = items(probe.state)
    masked = state == models.policy.mask_id
    batch = surrogate.Batch(
        prompt=jnp.repeat(rollout.prompt, hp.states, axis=0),
        prompt_valid=jnp.repeat(rollout.prompt_valid, hp.states, axis=0),
        state=state,
        labels=items(probe.fills),
        advantage=items(credit)[:, None],
        weight=surrogate.weight(masked[:, None], "sequence"),
        old=None,
        reference=None,
    )
    frozen = (models.behaviour, surrogate.reference(models, hp.beta))
    old, reference = (None if m is None else tempered(m, hp.temperature) for m in frozen)
    return surrogate.with_frozen(batch, old, reference, pieces=hp.states)


def loss(models: Models, batch: surrogate.Batch, hp: Hyper) -> tuple[Float[Array, ""], Metrics]:
    """The equation above; `batch.weight` is 1 / #masked over the items of the whole batch."""
    policy, counted = tempered(models.policy, hp.temperature), batch.weight > 0
    log_prob = state_log_prob(policy, *batch[:4], surrogate.needed(batch.weight))
    log_prob = jnp.where(counted, log_prob, 0.0)
    old = jax.lax.stop_gradient(log_prob) if batch.old is None else batch.old
    confidence = jnp.exp(old)
    lam = batch.state.shape[1] / jnp.maximum(jnp.sum(counted, axis=-1, keepdims=True), 1)
    credit, rho = batch.advantage[..., None], jnp.exp(log_prob - old)
    objective = lam * surrogate.clipped(log_prob - old, credit, hp.epsilon)
    active = jnp.where(credit > 0, rho > 1 + hp.epsilon, (rho < 1 - hp.epsilon) & (credit < 0))
    metrics = {
        "clip_ratio/region_mean": jnp.sum(batch.weight * active),
        "confidence": jnp.sum(batch.weight * confidence),
    }
    if batch.reference is not None:
        kl = jnp.square(batch.reference - log_prob) / 2
        objective = objective + hp.beta * kl
        metrics["kl"] = jnp.sum(batch.weight * kl)
    return jnp.sum(batch.weight * confidence * objective), metrics
