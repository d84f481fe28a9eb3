"""UniGRPO: GRPO over a sweep of mask ratios (MMaDA, arXiv 2505.15809, Algorithm 1).

L = mean_j (1/|M_j|) sum over k in M_j of
        ( -min(rho_k A_j, clip(rho_k, 1-eps, 1+eps) A_j) + beta * k3(pi, pi_ref)_k )
log pi(x_k) = log p(x_k | prompt, x with each token of the completion MASK w.p. t_n)

M_j are the masked tokens of completion j up to EOS. Policy, behaviour and reference see the same
masking; the prompt is never masked. Over the inner updates n = 0..mu-1 of a rollout t_n sweeps
the noise levels from a start u ~ U(0,1) of the row's own.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmrl.algorithms import advantage, surrogate
from dmrl.diffusion.masking import bernoulli, upto_eos
from dmrl.diffusion.noise import row_keys
from dmrl.types import Inner, Metrics, Models, PRNGKey, Probe, Rollout

SWEEPS = ("rising", "cyclic")


@dataclasses.dataclass(frozen=True)
class Hyper:
    """Defaults are the paper's where it states them, else d1's."""

    sweep: str = "rising"
    """`rising`: from u up to 1 (Algorithm 1; the last of mu > 1 updates has everything masked).
    `cyclic`: frac(u + n/mu), so that every update's level is U(0,1), as an ELBO's is."""
    t_min: float = 0.02
    """Lowest mask ratio: below it a short completion would have no masked token."""
    epsilon: float | None = 0.5
    beta: float = 0.04
    divide_by_std: bool = True
    """A = (r - mean) / std of the group (the paper's); else r - mean."""

    def __post_init__(self) -> None:
        surrogate.check(0.0, self.epsilon, self.beta, "token")
        if not 0 < self.t_min <= 1:
            raise ValueError(f"t_min={self.t_min} is no mask ratio: choose one in (0, 1]")
        if self.sweep not in SWEEPS:
            raise ValueError(f"sweep={self.sweep!r}: choose one of {SWEEPS}")


def needs(hp: Hyper) -> frozenset[str]:
    """A reference if there is a KL penalty."""
    return surrogate.needs(hp.beta)


def mask_ratio(row: Int[Array, " b"], inner: Inner, hp: Hyper) -> Float[Array, " b"]:
    """t_n of every row: u depends on `inner.key` and the row, hence not on n."""
    u = jax.vmap(jax.random.uniform)(row_keys(inner.key, row))
    if hp.sweep == "rising":
        t = u + inner.number / max(inner.total - 1, 1) * (1 - u)
    else:
        t = jnp.mod(u + inner.number / inner.total, 1.0)
    return jnp.clip(t, hp.t_min, 1.0)


def prepare(
    models: Models,
    rollout: Rollout,
    probe: Probe | None,
    key: PRNGKey,
    inner: Inner,
    hp: Hyper,
) -> surrogate.Batch:
    """One item a completion; tokens after EOS are noised like the others but do not count.

    A completion with no masked token up to EOS leaves the mean.
    """
    del probe
    assert rollout.reward is not None
    policy = models.policy
    free = rollout.reveal_step >= 0
    masked = bernoulli(row_keys(key, rollout.row), free, mask_ratio(rollout.row, inner, hp))
    counted = masked & upto_eos(rollout.tokens, policy.eos_id)
    batch = surrogate.Batch(
        prompt=rollout.prompt,
        prompt_valid=rollout.prompt_valid,
        state=jnp.where(masked, policy.mask_id, rollout.tokens),
        labels=rollout.tokens[:, None],
        advantage=advantage.group_relative(rollout.reward, rollout.group, hp.divide_by_std)[
            :, None
        ],
        weight=surrogate.weight(counted[:, None], "sequence"),
        old=None,
        reference=None,
    )
    reference = surrogate.reference(models, hp.beta)
    return surrogate.with_frozen(batch, models.behaviour, reference, ratio_alone=True)


def idle(batch: surrogate.Batch, hp: Hyper) -> Bool[Array, " n"]:
    """Items that the loss gets no gradient from."""
    return surrogate.idle(batch.advantage, batch.weight, hp.beta > 0)


def loss(models: Models, batch: surrogate.Batch, hp: Hyper) -> tuple[Float[Array, ""], Metrics]:
    """The equation above; `batch.weight` carries 1/|M_j| and the mean over the whole batch."""
    return surrogate.loss(models.policy, batch, hp.epsilon, hp.beta, "token")
