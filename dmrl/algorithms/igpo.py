"""IGPO: diffu-GRPO on groups rescued by inpainting (arXiv 2509.10396).

Where all of a group's answers are wrong, GRPO has no signal; some of them are replaced by right
ones sampled around injected pieces of a reference trace (`dmrl/rescue.py`). The objective:

    L = -1/G sum_i 1/L_i sum_k g_ik ( min(rho_i A_i, clip(rho_i, 1-eps, 1+eps) A_i) - beta k3_ik )
    A_i = r_i - mean of the group;  log pi(x_k) = log p(x_k | clean prompt, completion all masked)
    g_ik = 0 for a hint that is not among the ceil(tau * hints) most uncertain ones of its
           completion, by the entropy of the policy's own prediction there; else 1
    L_i = sum_k g_ik: every completion weighs the same, however many of its hints are left out

The restored gradient of a group with a share rho of right answers is
rho (1 - rho) (mean score of the right - mean score of the wrong), largest at rho = 1/2.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmrl.algorithms import advantage, surrogate
from dmrl.diffusion.likelihood import completion_hidden, over_positions
from dmrl.diffusion.masking import upto_eos
from dmrl.diffusion.order import entropy_of, select_top
from dmrl.types import HINT, TEMPLATE, Denoiser, Inner, Metrics, Models, PRNGKey, Probe, Rollout

BLIND_AFTER_EOS = True
"""Nothing after the first EOS enters: a rollout may stop there."""


@dataclasses.dataclass(frozen=True)
class Hyper:
    """`tau` is the paper's; clip range and KL weight are not published (GRPO's and d1's here)."""

    tau: float = 0.2
    """Share of a completion's hints that get gradient, the most uncertain first; 1 keeps all
    (published as unstable), 0 none."""
    epsilon: float | None = 0.2
    beta: float = 0.04
    ratio_level: str = "sequence"
    """`sequence`, one ratio a completion (the product over its tokens), as the paper's text says;
    `token` as its formula."""

    def __post_init__(self) -> None:
        surrogate.check(0.0, self.epsilon, self.beta, self.ratio_level)
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau={self.tau} is a share of the hints: choose one in [0, 1]")


def needs(hp: Hyper) -> frozenset[str]:
    """A reference if there is a KL penalty."""
    return surrogate.needs(hp.beta)


def uncertain(
    entropy: Float[Array, "b l"], hint: Bool[Array, "b l"], tau: float
) -> Bool[Array, "b l"]:
    """The ceil(tau * hints) hints of highest entropy of each row; ties go to the leftmost."""
    # A table of exact values: in float32 a product like 0.3 * 10 may fall above the integer.
    kept = jnp.array([math.ceil(round(tau * n, 6)) for n in range(hint.shape[1] + 1)], jnp.int32)
    return select_top(entropy, hint, kept[jnp.sum(hint, axis=1)])


def prepare(
    models: Models,
    rollout: Rollout,
    probe: Probe | None,
    key: PRNGKey,
    inner: Inner,
    hp: Hyper,
) -> surrogate.Batch:
    """One item a completion.

    The state hides the hints too: what was injected is predicted like everything else. The
    forward for the entropies runs only where the rollout has a hint.
    """
    del probe, key, inner
    assert rollout.reward is not None
    policy = models.policy
    counted = (rollout.reveal_step != TEMPLATE) & upto_eos(rollout.tokens, policy.eos_id)
    hint = counted & (rollout.reveal_step == HINT)
    state = jnp.where(rollout.reveal_step == TEMPLATE, rollout.tokens, policy.mask_id)
    entropy = jax.lax.cond(
        jnp.any(hint),
        lambda: _entropy(policy, rollout, state),
        lambda: jnp.zeros(hint.shape, jnp.float32),
    )
    trained = (counted & ~hint) | uncertain(entropy, hint, hp.tau)
    batch = surrogate.Batch(
        prompt=rollout.prompt,
        prompt_valid=rollout.prompt_valid,
        state=state,
        labels=rollout.tokens[:, None],
        advantage=advantage.group_relative(rollout.reward, rollout.group)[:, None],
        weight=surrogate.weight(trained[:, None], "sequence"),
        old=None,
        reference=None,
    )
    reference = surrogate.reference(models, hp.beta)
    return surrogate.with_frozen(batch, models.behaviour, reference, ratio_alone=True)


def _entropy(policy: Denoiser, rollout: Rollout, state: Int[Array, "b l"]) -> Float[Array, "b l"]:
    """Entropy in nats of the mean-field prediction at every position, no gradient."""
    hidden = completion_hidden(policy, rollout.prompt, rollout.prompt_valid, state)
    return over_positions(
        lambda _, some: entropy_of(jax.nn.log_softmax(policy.logits(some))), hidden
    )


def idle(batch: surrogate.Batch, hp: Hyper) -> Bool[Array, " n"]:
    """Items that the loss gets no gradient from."""
    return surrogate.idle(batch.advantage, batch.weight, hp.beta > 0)


def loss(models: Models, batch: surrogate.Batch, hp: Hyper) -> tuple[Float[Array, ""], Metrics]:
    """The equation above."""
    return surrogate.loss(models.policy, batch, hp.epsilon, hp.beta, hp.ratio_level)
