"""wd1: weighted log-likelihood instead of policy ratios (arXiv 2507.08838).

L = -(1/#groups) sum_j (w+_j - w-_j) S_j,   S_j = sum over k up to EOS of log pi(x_j,k)
w+ = softmax over the group of A,   w- = softmax over the group of -A,   A = r - mean of the group
log pi(x_k) = log p(x_k | prompt with each token masked w.p. 0.15, completion all masked)

No ratio, no old policy, no reference. A softmax ignores the baseline, so the weights are those of
the rewards themselves; a group of two weighs its completions by +-tanh((r_1 - r_2) / 2).
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmrl.algorithms import advantage, surrogate
from dmrl.diffusion.likelihood import state_log_prob
from dmrl.diffusion.masking import mask_prompt, upto_eos
from dmrl.diffusion.probe import state_at
from dmrl.types import Inner, Metrics, Models, PRNGKey, Probe, Rollout

BLIND_AFTER_EOS = True
"""Nothing after the first EOS enters: a rollout may stop there."""


@dataclasses.dataclass(frozen=True)
class Hyper:
    """Defaults are those of the authors' released configuration."""

    p_mask_prompt: float = 0.15
    positive_only: bool = False
    """Leave out w-: the paper's ablation without unlearning of bad completions."""

    def __post_init__(self) -> None:
        surrogate.check(self.p_mask_prompt, None, 0.0, "token")


class Batch(NamedTuple):
    """N completions."""

    prompt: Int[Array, "n p"]
    """Already corrupted."""
    prompt_valid: Bool[Array, "n p"]
    state: Int[Array, "n l"]
    labels: Int[Array, "n z l"]
    counted: Bool[Array, "n z l"]
    weight: Float[Array, " n"]
    """(w+ - w-) / number of groups: the loss is the mean over the groups of a batch."""


def group_weight(
    advantage: Float[Array, " b"], group: Int[Array, " b"], positive_only: bool
) -> Float[Array, " b"]:
    """w+ - w- of every completion, exactly 0 where its group ties; w+ alone if `positive_only`.

    The authors' softmax runs over a device's micro-batch, which is one group in their runs.
    """
    same = group[:, None] == group[None, :]

    def softmax(x: Float[Array, " b"]) -> Float[Array, " b"]:
        highest = jnp.max(jnp.where(same, x[None], -jnp.inf), axis=1)
        others = jnp.where(same, jnp.exp(x[None] - highest[:, None]), 0.0)
        return jnp.exp(x - highest) / jnp.sum(others, axis=1)

    positive = softmax(advantage)
    return positive if positive_only else positive - softmax(-advantage)


def prepare(
    models: Models,
    rollout: Rollout,
    probe: Probe | None,
    key: PRNGKey,
    inner: Inner,
    hp: Hyper,
) -> Batch:
    """One item a completion; the prompt mask is fresh for each inner update."""
    del probe, inner
    assert rollout.reward is not None
    policy, group = models.policy, rollout.group
    start = jnp.zeros((rollout.tokens.shape[0], 1), jnp.int32)
    counted = (rollout.reveal_step >= 0) & upto_eos(rollout.tokens, policy.eos_id)
    weight = group_weight(advantage.group_relative(rollout.reward, group), group, hp.positive_only)
    # A group counts once, whatever its size: each of its rows holds 1 / size of it.
    groups = jnp.sum(1 / jnp.sum(group[:, None] == group[None, :], axis=1))
    return Batch(
        prompt=mask_prompt(key, rollout.row, rollout.prompt, hp.p_mask_prompt, policy.mask_id),
        prompt_valid=rollout.prompt_valid,
        state=state_at(rollout, start, policy.mask_id)[:, 0],
        labels=rollout.tokens[:, None],
        counted=counted[:, None],
        weight=weight / groups,
    )


def idle(batch: Batch, hp: Hyper) -> Bool[Array, " n"]:
    """Items that the loss gets no gradient from: groups that tie."""
    del hp
    return batch.weight == 0


def loss(models: Models, batch: Batch, hp: Hyper) -> tuple[Float[Array, ""], Metrics]:
    """The equation above."""
    del hp
    log_prob = state_log_prob(models.policy, *batch[:4], jnp.any(batch.counted, axis=1))
    sequence = jnp.sum(jnp.where(batch.counted, log_prob, 0.0), axis=(1, 2))
    return -jnp.sum(batch.weight * sequence), {}
