"""CJ-GRPO: GRPO on the trajectory that drew the completion (arXiv 2509.23924).

L = (1/S) sum_i (1/|U_i|) sum over k in U_i of
        ( -min(rho_ik A, clip(rho_ik, 1-eps, 1+eps) A) + beta * k3(pi, pi_ref)_ik )
log pi(x_ik) = log p(x_k | prompt, z_i),   A = r - mean of the group

z_i is the state before denoising step i of S, U_i the tokens that step i revealed, over the whole
batch: the likelihood is that of the decisions the sampler took, not of a one-step stand-in. The
prompt is never masked. With tokens drawn at temperature 1, in an order that does not depend on the
policy and the same number at every step, the expected gradient at theta_old is that of E[r] times
(G-1)/G of the baseline and 1/(S |U_i|).
"""

import dataclasses

from jaxtyping import Array, Bool, Float

from dmrl.algorithms import advantage, surrogate
from dmrl.diffusion.masking import upto_eos
from dmrl.types import Inner, Metrics, Models, PRNGKey, Probe, Rollout

READS_REVEAL_STEP = True
"""Scores what each step revealed, so no revealed token may change."""


@dataclasses.dataclass(frozen=True)
class Hyper:
    """Defaults are those of the authors' released configuration."""

    states: int = 32
    """States of each trajectory that an update sees. As many as the sampler has steps (the
    authors: 32) or more: all of them. Fewer: a uniform draw, fresh for each inner update, with the
    whole trajectory's loss as expectation. An item of a microbatch is a state."""
    epsilon: float | None = 0.5
    beta: float = 0.04
    count_after_eos: bool = False
    """Train on tokens after the first EOS too, as the authors' code does."""

    def __post_init__(self) -> None:
        surrogate.check(0.0, self.epsilon, self.beta, "token")
        if self.states < 1:
            raise ValueError(f"states={self.states} must be >= 1: the sampler's number of steps")


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
    """One item a state; the frozen models score one state of every completion at a time.

    S is the number of steps at which the batch has a token that counts.
    """
    del probe, inner
    assert rollout.reward is not None
    policy = models.policy
    counted = rollout.reveal_step >= 0
    if not hp.count_after_eos:
        counted &= upto_eos(rollout.tokens, policy.eos_id)
    rows, length = counted.shape
    batch = surrogate.trajectory(
        rollout,
        advantage.group_relative(rollout.reward, rollout.group),
        surrogate.per_part(counted, rollout.reveal_step, length),
        key,
        policy.mask_id,
        hp.states,
    )
    pieces = batch.state.shape[0] // rows
    reference = surrogate.reference(models, hp.beta)
    return surrogate.with_frozen(batch, models.behaviour, reference, pieces, ratio_alone=True)


def idle(batch: surrogate.Batch, hp: Hyper) -> Bool[Array, " n"]:
    """Items that the loss gets no gradient from."""
    return surrogate.idle(batch.advantage, batch.weight, hp.beta > 0)


def loss(models: Models, batch: surrogate.Batch, hp: Hyper) -> tuple[Float[Array, ""], Metrics]:
    """The equation above; `batch.weight` carries 1/(S |U_i|) of the whole batch."""
    return surrogate.loss(models.policy, batch, hp.epsilon, hp.beta, "token")
