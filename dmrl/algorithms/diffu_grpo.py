"""diffu-GRPO: GRPO with a one-step mean-field likelihood (d1, arXiv 2504.12216).

L = sum_i w_i ( -min(rho_i A, clip(rho_i, 1-eps, 1+eps) A) + beta * k3(pi, pi_ref)_i )
log pi(x_i) = log p(x_i | prompt with each token masked w.p. 0.15, completion all masked)
A = r - mean of the group;  w_i = 1 / #tokens up to EOS, over the whole batch
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dmrl.algorithms import advantage, surrogate
from dmrl.diffusion.masking import mask_prompt, upto_eos
from dmrl.diffusion.probe import state_at
from dmrl.types import Inner, Metrics, Models, PRNGKey, Probe, Rollout

BLIND_AFTER_EOS = True
"""Nothing after the first EOS enters: a rollout may stop there."""


@dataclasses.dataclass(frozen=True)
class Hyper:
    """Defaults are those of the authors' released configuration."""

    p_mask_prompt: float = 0.15
    epsilon: float | None = 0.5
    """PPO clip range; None leaves the ratio unclipped."""
    beta: float = 0.04
    """Weight of the KL penalty to the reference."""
    ratio_level: str = "token"
    divide_by_std: bool = False
    """Divide the advantage by the group's std (GRPO does, diffu-GRPO does not)."""

    def __post_init__(self) -> None:
        surrogate.check(self.p_mask_prompt, self.epsilon, self.beta, self.ratio_level)


def needs(hp: Hyper) -> frozenset[str]:
    """A reference if there is a KL penalty."""
    return surrogate.needs(hp.beta)


def prepare(
    models: Models,
    rollout: Rollout,
    probe: Probe | None,
    key: PRNGKey,
    inner: Inner,
    hp: Hyper,
) -> surrogate.Batch:
    """One item a completion; the prompt mask is fresh for each inner update."""
    del probe, inner
    assert rollout.reward is not None
    policy = models.policy
    start = jnp.zeros((rollout.tokens.shape[0], 1), jnp.int32)
    counted = (rollout.reveal_step >= 0) & upto_eos(rollout.tokens, policy.eos_id)
    batch = surrogate.Batch(
        prompt=mask_prompt(key, rollout.row, rollout.prompt, hp.p_mask_prompt, policy.mask_id),
        prompt_valid=rollout.prompt_valid,
        state=state_at(rollout, start, policy.mask_id)[:, 0],
        labels=rollout.tokens[:, None],
        advantage=advantage.group_relative(rollout.reward, rollout.group, hp.divide_by_std)[
            :, None
        ],
        weight=surrogate.weight(counted[:, None], hp.ratio_level),
        old=None,
        reference=None,
    )
    reference = surrogate.reference(models, hp.beta)
    return surrogate.with_frozen(batch, models.behaviour, reference, ratio_alone=True)


def idle(batch: surrogate.Batch, hp: Hyper) -> Bool[Array, " n"]:
    """Items that the loss gets no gradient from."""
    return surrogate.idle(batch.advantage, batch.weight, hp.beta > 0)


def loss(models: Models, batch: surrogate.Batch, hp: Hyper) -> tuple[Float[Array, ""], Metrics]:
    """The equation above; `batch.weight` carries the normaliser of the whole batch."""
    return surrogate.loss(models.policy, batch, hp.epsilon, hp.beta, hp.ratio_level)
