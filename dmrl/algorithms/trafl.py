"""TraFL: trajectory flow balancing towards a reward-tilted reference (arXiv 2605.13935).

    delta(x, y) = Lhat_theta(y|x) - Lhat_ref(y|x) - beta (r(y) - mean_G r) + log Z(x)
    L = mean delta^2 over prompts and their G completions

Lhat is the mean masked log-probability of `dmrl.diffusion.score`, over the same K maskings for
policy and reference. The square vanishes where the policy is p_ref exp(beta r) / Z for the score in
the place of a log-probability: with a score per token, of a completion of length L, the tilt is
exp(L beta r). Centring r on the mean of a group that was drawn from the policy weakens the tilt by
a factor (1 - 1/G). Nothing here asks who drew the completions: other policies' may be used.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dmrl.algorithms import advantage
from dmrl.diffusion import score
from dmrl.types import TEMPLATE, Inner, Metrics, Models, PRNGKey, Probe, Rollout

LOG_Z = ("learned", "vargrad")
SQUARES = ("mean", "pairwise")


@dataclasses.dataclass(frozen=True)
class Hyper:
    """The paper's values could not be read; these are ours, except K of a public port."""

    group_size: int = 8
    """G: completions of a prompt, contiguous rows of the rollout."""
    beta: float = 0.1
    """Nats per `score_unit` for a reward of 1."""
    score_unit: str = "token"
    """`token`: Lhat and beta are per token, so that lengths weigh the same. `sequence`: both are
    of the whole completion, and the tilt is exp(beta r) whatever its length."""
    masks: int = 4
    """K."""
    mask_law: str = "complementary"
    log_z: str = "learned"
    """`learned`: the head of the prompt `log_z`. `vargrad`: minus the group's mean of the rest of
    delta (per masking), without gradient: no head, and L is the variance within the group."""
    square: str = "mean"
    """`mean`: (mean_k delta_k)^2, which adds Var(delta_k)/K in expectation: fewer masks pull harder
    towards the reference. `pairwise`: the mean of delta_k delta_k' over pairs of independent
    maskings, an unbiased estimate of the square of the expected residual."""

    def __post_init__(self) -> None:
        score.check(self.masks, self.mask_law, self.score_unit)
        for name, choices in (("log_z", LOG_Z), ("square", SQUARES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {choices}")
        if self.beta <= 0 or self.group_size < 2:
            raise ValueError(f"need beta > 0 and group_size >= 2: {self.beta=} {self.group_size=}")
        if self.square == "pairwise" and (self.mask_law != "independent" or self.masks < 2):
            raise ValueError(
                f"square='pairwise' is unbiased for two or more independent masks only: "
                f"mask_law={self.mask_law!r}, masks={self.masks}; set mask_law='independent'"
            )


class Batch(NamedTuple):
    """N groups of G completions: the group's mean and log Z enter what is differentiated."""

    masked: score.Masked
    """Every leaf [N, G, ...]."""
    reference: Float[Array, "n g k"]
    target: Float[Array, "n g"]
    """beta (r - mean_G r)."""
    template: Int[Array, "n l"]
    """The completion before sampling, for the head."""
    weight: Float[Array, " n"]
    """1 / number of completions in the whole batch."""


def needs(hp: Hyper) -> frozenset[str]:
    """A reference, and the head if log Z is learned."""
    return frozenset({"reference", "log_z"} if hp.log_z == "learned" else {"reference"})


def prepare(
    models: Models,
    rollout: Rollout,
    probe: Probe | None,
    key: PRNGKey,
    inner: Inner,
    hp: Hyper,
) -> Batch:
    """One item a group; the masks are fresh for each inner update.

    Raises ValueError where `group_size` does not divide the completions; one that mixes prompts
    gives a NaN loss.
    """
    del probe, inner
    assert rollout.reward is not None
    assert models.reference is not None
    masked = score.draw(models.policy, rollout, key, hp.masks, hp.mask_law, hp.score_unit)
    reference = score.frozen_score(models.reference, masked)
    blank = jnp.where(rollout.reveal_step == TEMPLATE, rollout.tokens, models.policy.mask_id)
    rows = (masked, reference, rollout.reward, blank, rollout.group)
    masked, reference, reward, blank, group = score.by_group(rows, hp.group_size)
    return Batch(
        masked=masked,
        reference=reference,
        target=hp.beta * advantage.within(reward),
        template=blank[:, 0],
        weight=score.one_prompt(group) / reward.size,
    )


def loss(models: Models, batch: Batch, hp: Hyper) -> tuple[Float[Array, ""], Metrics]:
    """The equation above; `batch.weight` carries the normaliser of the whole batch."""
    rows = score.by_row(batch.masked)
    gap = score.score(models.policy, rows).reshape(batch.reference.shape) - batch.reference
    rest = gap - batch.target[:, :, None]
    if hp.log_z == "vargrad":
        log_z = jax.lax.stop_gradient(-jnp.mean(rest, axis=1, keepdims=True))
    else:
        prompt, valid = batch.masked.prompt[:, 0], batch.masked.prompt_valid[:, 0]
        log_z = models.policy.heads["log_z"](prompt, valid, batch.template)[:, None, None]
    each = batch.weight[:, None]
    metrics = {
        "relative_score": jnp.sum(each * jnp.mean(gap, axis=2)),
        "log_z": jnp.sum(each * jnp.mean(jnp.broadcast_to(log_z, gap.shape), axis=2)),
    }
    return jnp.sum(each * squared(rest + log_z, hp.square)), metrics


def squared(delta: Float[Array, "n g k"], form: str) -> Float[Array, "n g"]:
    """Estimate of (E delta)^2 from K maskings: `form` is one of SQUARES."""
    if form == "mean":
        return jnp.square(jnp.mean(delta, axis=2))
    k = delta.shape[2]
    diagonal = jnp.sum(jnp.square(delta), axis=2)
    return (jnp.square(jnp.sum(delta, axis=2)) - diagonal) / (k * (k - 1))
