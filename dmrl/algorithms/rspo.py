"""RSPO: relative score policy optimisation (arXiv 2605.10218).

    d    = s_theta(y|x) - s_ref(y|x)               s: masked scores, the same masks for both
    dhat = d - sg(mean of d over the batch)
    w    = A - lambda sg(dhat)                     A: advantage within the group
    L    = -mean sg(w) dhat

whose gradient is lambda times that of half the mean of (dhat - A/lambda)^2: the centred
log-ratio is regressed onto A/lambda, and lambda = 0 leaves an advantage-weighted ELBO.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmrl.algorithms import advantage
from dmrl.diffusion import score
from dmrl.types import Inner, Metrics, Models, PRNGKey, Probe, Rollout


@dataclasses.dataclass(frozen=True)
class Hyper:
    """lambda and the normalised advantage are the paper's (as a public port reports them)."""

    lam: float = 0.01
    """lambda, where `target_ratio` is None."""
    target_ratio: float | None = None
    """std(lambda dhat) / std(A) over the batch that lambda is set to reach, from the scores at the
    start of the rollout's updates; None keeps `lam`, with which a per-token score hardly ever feeds
    anything back (the ratio is logged)."""
    spread_floor: float = 1e-3
    """Least std of dhat, per `score_unit`, that an adaptive lambda answers to. Below it lambda
    grows no more: when the policy is still the reference, dhat is rounding noise."""
    score_unit: str = "token"
    """The paper's unit is not known to us; a sum over 256 tokens makes lambda weigh 256 times."""
    masks: int = 4
    mask_law: str = "complementary"
    divide_by_std: bool = True
    """Divide the advantage by the group's std (optional in the paper)."""

    def __post_init__(self) -> None:
        score.check(self.masks, self.mask_law, self.score_unit)
        if self.lam < 0 or self.spread_floor <= 0:
            raise ValueError(
                f"need lam >= 0 and spread_floor > 0: {self.lam=} {self.spread_floor=}"
            )
        if self.target_ratio is not None and self.target_ratio <= 0:
            raise ValueError(
                f"target_ratio={self.target_ratio} must be positive, or None to fix lambda"
            )


class Batch(NamedTuple):
    """N completions."""

    masked: score.Masked
    reference: Float[Array, " n"]
    centre: Float[Array, " n"]
    """mean of d over the whole batch, the same in every item."""
    advantage: Float[Array, " n"]
    lam: Float[Array, " n"]
    ratio: Float[Array, " n"]
    """std(lambda dhat) / std(A) over the whole batch, the same in every item."""
    weight: Float[Array, " n"]
    """1 / N of the whole batch."""


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
    """One item a completion; the masks are fresh for each inner update.

    The batch's mean of d is that of the policy before the rollout's first inner update, under this
    update's masks: exact then, and at later ones behind by what the inner updates moved it.
    """
    del probe, inner
    assert rollout.reward is not None
    assert models.reference is not None
    masked = score.draw(models.policy, rollout, key, hp.masks, hp.mask_law, hp.score_unit)
    reference = jnp.mean(score.frozen_score(models.reference, masked), axis=1)
    gap = jnp.mean(score.frozen_score(models.policy, masked), axis=1) - reference
    gain = advantage.group_relative(rollout.reward, rollout.group, hp.divide_by_std)
    spread, signal = jnp.std(gap), jnp.std(gain)
    lam = jnp.float32(hp.lam)
    if hp.target_ratio is not None:
        lam = hp.target_ratio * signal / jnp.maximum(spread, hp.spread_floor)
    ratio = jnp.where(signal > 0, lam * spread / jnp.where(signal > 0, signal, 1.0), 0.0)

    def every(x: jax.Array) -> Float[Array, " n"]:
        return jnp.full(gap.shape, x)

    return Batch(
        masked=masked,
        reference=reference,
        centre=every(jnp.mean(gap)),
        advantage=gain,
        lam=every(lam),
        ratio=every(ratio),
        weight=every(jnp.float32(1 / gap.size)),
    )


def loss(models: Models, batch: Batch, hp: Hyper) -> tuple[Float[Array, ""], Metrics]:
    """The equation above; `batch.weight` carries the normaliser of the whole batch."""
    del hp
    gap = jnp.mean(score.score(models.policy, batch.masked), axis=1) - batch.reference
    centred = gap - batch.centre
    weight = jax.lax.stop_gradient(batch.advantage - batch.lam * centred)
    metrics = {
        "relative_score": jnp.sum(batch.weight * gap),
        "lambda": jnp.sum(batch.weight * batch.lam),
        "feedback_ratio": jnp.sum(batch.weight * batch.ratio),
    }
    return -jnp.sum(batch.weight * weight * centred), metrics
