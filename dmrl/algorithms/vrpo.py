"""VRPO: DPO on ELBOs of little variance (LLaDA 1.5, arXiv 2505.19223).

    L = -mean over pairs of log sigmoid( beta [ (B_theta - B_ref)(y_w) - (B_theta - B_ref)(y_l) ] )

B(y) is the mean of n Monte Carlo estimates of the ELBO, one mask a time step ("optimal
allocation"), under the same times and masks for policy and reference ("antithetic sampling").

Pairs are the best and the worst completion of every group; a tie counts nothing. Preferences read
from files are a Rollout whose rows alternate chosen (reward 1) and rejected (reward 0), two rows a
group, with `group_size=2`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmrl.diffusion import score
from dmrl.types import Inner, Metrics, Models, PRNGKey, Probe, Rollout


@dataclasses.dataclass(frozen=True)
class Hyper:
    """n is the paper's; beta, which we could not read there, is DPO's usual value."""

    group_size: int = 2
    """Completions of a prompt, contiguous rows of the rollout."""
    beta: float = 0.1
    """Inverse nats of the whole completion."""
    masks: int = 8
    """n, the maskings of a completion."""
    mask_law: str = "independent"
    """A uniform count of tokens: the ELBO without bias, of less variance than t ~ U(0,1)."""

    def __post_init__(self) -> None:
        score.check(self.masks, self.mask_law, "sequence")
        if self.beta <= 0 or self.group_size < 2:
            raise ValueError(f"need beta > 0 and group_size >= 2: {self.beta=} {self.group_size=}")


class Batch(NamedTuple):
    """N pairs, chosen before rejected."""

    masked: score.Masked
    """Every leaf [N, 2, ...]."""
    reference: Float[Array, "n 2 k"]
    weight: Float[Array, " n"]
    """Sums to 1 over the pairs of the whole batch that differ in reward; 0 for ties."""


def needs(hp: Hyper) -> frozenset[str]:
    """Always a reference."""
    del hp
    return frozenset({"reference"})


def prepare(
    models: Models,
    rollout: Rollout,
    probe: Probe | None,
    key: PRNGKey,
    inner: Inner,
    hp: Hyper,
) -> Batch:
    """One item a group; the first of equally good (or bad) completions is taken.

    Raises ValueError where `group_size` does not divide the completions; one that mixes prompts
    gives a NaN loss.
    """
    del probe, inner
    assert rollout.reward is not None
    assert models.reference is not None
    reward, group = score.by_group((rollout.reward, rollout.group), hp.group_size)
    chosen = jnp.stack([jnp.argmax(reward, axis=1), jnp.argmin(reward, axis=1)], axis=1)
    index = (jnp.arange(reward.shape[0])[:, None] * hp.group_size + chosen).reshape(-1)
    pairs = jax.tree.map(lambda x: x[index], rollout)
    masked = score.draw(models.policy, pairs, key, hp.masks, hp.mask_law, "sequence")
    reference = score.frozen_score(models.reference, masked)
    masked, reference = score.by_group((masked, reference), 2)
    decided = jnp.max(reward, axis=1) > jnp.min(reward, axis=1)
    weight = decided / jnp.maximum(jnp.sum(decided), 1)
    return Batch(masked, reference, weight * score.one_prompt(group))


def loss(models: Models, batch: Batch, hp: Hyper) -> tuple[Float[Array, ""], Metrics]:
    """The equation above, with the metrics of TRL's DPO trainer: beta (B_theta - B_ref) is the
    implicit reward."""
    rows = score.by_row(batch.masked)
    scored = score.score(models.policy, rows).reshape(batch.reference.shape)
    implicit = hp.beta * jnp.mean(scored - batch.reference, axis=2)
    margin = implicit[:, 0] - implicit[:, 1]
    metrics = {
        "rewards/chosen": jnp.sum(batch.weight * implicit[:, 0]),
        "rewards/rejected": jnp.sum(batch.weight * implicit[:, 1]),
        "rewards/margins": jnp.sum(batch.weight * margin),
        "rewards/accuracies": jnp.sum(batch.weight * (margin > 0)),
    }
    return -jnp.sum(batch.weight * jax.nn.log_sigmoid(margin)), metrics
