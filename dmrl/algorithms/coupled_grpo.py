"""coupled-GRPO: GRPO with complementary maskings (DiffuCoder, arXiv 2506.20639).

l_k = ( log p(x_k | all MASK) + [k in S] log p(x_k | S masked) / r
        + [k not in S] log p(x_k | rest masked) / (1 - r) ) / 2,   S ~ Bernoulli(r), r ~ U(0.2, 0.8)
L = sum_k w_k ( -min(rho_k A, clip(rho_k, 1-eps, 1+eps) A) + beta * k3(l, l_ref)_k ),
rho_k = exp(l_k - l_k,old);  A = r_j - mean of the others;  w_k = 1 / #tokens up to EOS of the batch

S and its complement together predict every token once. Averaged over S, l is half the sum of three
log-probabilities (all masked, k in S, k in the complement), so exp(l) is no probability.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmrl.algorithms import advantage, surrogate
from dmrl.diffusion.likelihood import masks_log_prob
from dmrl.diffusion.masking import bernoulli, upto_eos
from dmrl.diffusion.noise import fold_in, row_keys
from dmrl.types import Denoiser, Inner, Metrics, Models, PRNGKey, Probe, Rollout

MASKINGS = 3


@dataclasses.dataclass(frozen=True)
class Hyper:
    """Defaults are those of the authors' released configuration."""

    r_min: float = 0.2
    r_max: float = 0.8
    epsilon: float | None = 0.5
    beta: float = 0.01

    def __post_init__(self) -> None:
        surrogate.check(0.0, self.epsilon, self.beta, "token")
        if not 0 < self.r_min <= self.r_max < 1:
            raise ValueError(
                f"need 0 < r_min <= r_max < 1 (both r and 1 - r divide), "
                f"got {self.r_min=} {self.r_max=}"
            )


class Batch(NamedTuple):
    """N completions under three maskings each."""

    prompt: Int[Array, "n p"]
    prompt_valid: Bool[Array, "n p"]
    state: Int[Array, "n m l"]
    factor: Float[Array, "n m l"]
    """What multiplies each masking's log-probability in l; 0 where it sees the token."""
    labels: Int[Array, "n l"]
    advantage: Float[Array, "n 1"]
    weight: Float[Array, "n 1 l"]
    """Sums to 1 over the whole batch."""
    old: Float[Array, "n 1 l"] | None
    reference: Float[Array, "n 1 l"] | None


def needs(hp: Hyper) -> frozenset[str]:
    """A reference if there is a KL penalty."""
    return surrogate.needs(hp.beta)


def couple(
    tokens: Int[Array, "b l"],
    free: Bool[Array, "b l"],
    chosen: Bool[Array, "b l"],
    r: Float[Array, " b"],
    mask_id: int,
) -> tuple[Int[Array, "b m l"], Float[Array, "b m l"]]:
    """The three states of each completion (all free tokens masked, S, the rest) and factors."""
    masked = jnp.stack([free, chosen, free & ~chosen], axis=1)
    share = jnp.stack([jnp.ones_like(r), r, 1 - r], axis=1)
    return jnp.where(masked, mask_id, tokens[:, None]), masked / (2 * share[:, :, None])


def estimate(denoiser: Denoiser, batch: Batch) -> Float[Array, "n 1 l"]:
    """l of every token, from three forwards in one batch; 0 where the token does not count."""
    prompt = jnp.repeat(batch.prompt[:, None], MASKINGS, axis=1)
    used = (batch.factor > 0) & (batch.weight > 0)
    scored = masks_log_prob(denoiser, prompt, batch.prompt_valid, batch.state, batch.labels, used)
    terms = jnp.where(used, scored, 0.0) * batch.factor
    return jnp.sum(terms, axis=1, keepdims=True)


def prepare(
    models: Models,
    rollout: Rollout,
    probe: Probe | None,
    key: PRNGKey,
    inner: Inner,
    hp: Hyper,
) -> Batch:
    """One item a completion; r and S are each row's own and fresh for each inner update.

    The authors draw one r an update for the whole batch. A draw a row has the same law for every
    completion, spreads the levels over the batch and does not depend on who is in it.
    """
    del probe, inner
    assert rollout.reward is not None
    policy, keys = models.policy, row_keys(key, rollout.row)
    free = rollout.reveal_step >= 0
    r = jax.vmap(lambda k: jax.random.uniform(k, minval=hp.r_min, maxval=hp.r_max))(keys)
    chosen = bernoulli(fold_in(keys, 1), free, r)
    state, factor = couple(rollout.tokens, free, chosen, r, policy.mask_id)
    counted = free & upto_eos(rollout.tokens, policy.eos_id)
    advantages = advantage.group_relative(rollout.reward, rollout.group, baseline="leave_one_out")
    batch = Batch(
        prompt=rollout.prompt,
        prompt_valid=rollout.prompt_valid,
        state=state,
        factor=factor,
        labels=rollout.tokens,
        advantage=advantages[:, None],
        weight=surrogate.weight(counted[:, None], "token"),
        old=None,
        reference=None,
    )
    frozen = (models.behaviour, surrogate.reference(models, hp.beta))
    old, reference = (None if model is None else estimate(model, batch) for model in frozen)
    return batch._replace(old=old, reference=reference)


def idle(batch: Batch, hp: Hyper) -> Bool[Array, " n"]:
    """Items that the loss gets no gradient from."""
    return surrogate.idle(batch.advantage, batch.weight, hp.beta > 0)


def loss(models: Models, batch: Batch, hp: Hyper) -> tuple[Float[Array, ""], Metrics]:
    """The equation above."""
    value = estimate(models.policy, batch)
    frozen = (batch.advantage, batch.weight, batch.old, batch.reference)
    return surrogate.objective(value, *frozen, hp.epsilon, hp.beta)
