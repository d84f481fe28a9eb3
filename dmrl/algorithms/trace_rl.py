"""TraceRL: PPO on the sampler's own trace, steps merged by s (arXiv 2509.06949; no value model).

L = mean over rows v of ( (1/|T_v|) sum over k in T_v of -min(rho_k A, clip(rho_k, 1-eps, 1+eps) A)
                          + beta * sum over k in T_v of k3(pi, pi_old)_k )
log pi(x_k) = log p(x_k | prompt, z_v),   A = (r - mean) / std of the group

A row is s consecutive denoising steps of one completion: z_v is the state before the first of
them, T_v the tokens they revealed up to EOS; a row without any leaves the mean. The penalty keeps
the policy near theta_old, so it and its gradient vanish at one inner update. s = 1 is the exact
trace; s > 1 costs 1/s of the forwards and predicts s steps from one state, which the sampler did
not. The authors drop prompts that are solved less than 20% or more than 80% of the time: a choice
of data, not made here.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dmrl.algorithms import advantage, surrogate
from dmrl.diffusion.likelihood import state_log_prob
from dmrl.diffusion.masking import upto_eos
from dmrl.types import Inner, Metrics, Models, PRNGKey, Probe, Rollout

READS_REVEAL_STEP = True
"""Scores what each step revealed, so no revealed token may change."""


@dataclasses.dataclass(frozen=True)
class Hyper:
    """Defaults are those of the authors' released configuration for LLaDA."""

    shrink: int = 8
    """s: denoising steps per row."""
    states: int = 64
    """Rows of each trace that an update sees: all if it has no more (the authors: 512 steps, hence
    64), else a uniform draw with the whole trace's loss as expectation."""
    epsilon: float | None = 0.2
    beta: float = 0.01
    """Weight of the KL penalty to theta_old, summed over the tokens of a row (authors' code; the
    paper writes KL[pi, pi_old] without saying how it is normalised)."""

    def __post_init__(self) -> None:
        surrogate.check(0.0, self.epsilon, self.beta, "token")
        if self.shrink < 1 or self.states < 1:
            raise ValueError(f"need shrink >= 1 and states >= 1, got {self.shrink=} {self.states=}")


def prepare(
    models: Models,
    rollout: Rollout,
    probe: Probe | None,
    key: PRNGKey,
    inner: Inner,
    hp: Hyper,
) -> surrogate.Batch:
    """One item a row of the trace; theta_old scores one row of every completion at a time.

    Counted up to and including the first EOS (the authors' configuration drops EOS as well).
    """
    del probe, inner
    assert rollout.reward is not None
    policy = models.policy
    counted = (rollout.reveal_step >= 0) & upto_eos(rollout.tokens, policy.eos_id)
    rows, length = counted.shape
    part = jnp.arange(rows)[:, None] * length + rollout.reveal_step // hp.shrink
    batch = surrogate.trajectory(
        rollout,
        advantage.group_relative(rollout.reward, rollout.group, divide_by_std=True),
        surrogate.per_part(counted, part, rows * length),
        key,
        policy.mask_id,
        hp.states,
        hp.shrink,
    )
    return surrogate.with_frozen(batch, models.behaviour, None, batch.state.shape[0] // rows)


def idle(batch: surrogate.Batch, hp: Hyper) -> Bool[Array, " n"]:
    """Items that the loss gets no gradient from: those to spare, and without a penalty ties."""
    return surrogate.idle(batch.advantage, batch.weight, hp.beta > 0)


def loss(models: Models, batch: surrogate.Batch, hp: Hyper) -> tuple[Float[Array, ""], Metrics]:
    """The equation above; `batch.weight` carries 1/|T_v| and the mean over the whole batch.

    The metric "kl" is the mean over the tokens of a row.
    """
    log_prob = state_log_prob(models.policy, *batch[:4], surrogate.needed(batch.weight))
    targets = jnp.sum(batch.weight > 0, axis=-1, keepdims=True)
    frozen = (batch.advantage, batch.weight, batch.old, batch.old)
    return surrogate.objective(log_prob, *frozen, hp.epsilon, hp.beta * targets)
