"""DiSPO: step-wise policy gradients from branched fillings (arXiv 2602.06462).

At an intermediate state s of a trajectory, Z one-shot fillings a_1..a_Z of all its masks are
scored by the terminal reward:

    A_z    = R(fill(s, a_z)) - mean_z' R(fill(s, a_z'))                                 (eq. 3)
    rho_z  = prod over masked i of pi(a_z,i | s~) / pi_old(a_z,i | s~)              (eqs. 4, 5)
    L_step = -mean_z rho_z A_z,  s~ = s with the prompt corrupted as in diffu-GRPO      (eq. 6)

Revealed tokens are part of the state and get no gradient. A plug-in: add it to any terminal
term, as in L = L_base + alpha_step * L_step (eq. 8).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmrl.algorithms import advantage, surrogate
from dmrl.diffusion.masking import mask_prompt, upto_eos
from dmrl.diffusion.noise import row_keys
from dmrl.diffusion.probe import steps_taken
from dmrl.types import TEMPLATE, Inner, Metrics, Models, PRNGKey, Probe, ProbePlan, Rollout

STATE_LAWS = ("late", "uniform", "early")
GRADIENTS = ("action", "all")


@dataclasses.dataclass(frozen=True)
class Hyper:
    """Defaults are the paper's where it states them, else d1's (see docs/methods)."""

    fillings: int = 2
    """Z."""
    states: int = 1
    """Intermediate states per rollout; the paper uses one, shared by a prompt's group."""
    state_law: str = "late"
    """Over steps t of T: late ((t+1)/T)^k, early ((T-t)/T)^k, or uniform (our reading of
    "late-biased polynomial"; the paper gives no formula)."""
    exponent: float = 4.0
    branch_temperature: float = 1.0
    """1 makes the ratio an exact importance weight; the paper does not state its value."""
    gradient: str = "action"
    """`action`: masked positions only. `all`: the paper's ablation (Table 3)."""
    baseline: str = "mean"
    p_mask_prompt: float = 0.15
    epsilon: float | None = 0.5
    beta: float = 0.04
    ratio_level: str = "token"
    """`token` is d1's implementation form, `sequence` the paper's equation 5."""

    def __post_init__(self) -> None:
        surrogate.check(self.p_mask_prompt, self.epsilon, self.beta, self.ratio_level)
        if self.fillings < 2 or self.states < 1:
            raise ValueError(
                f"need fillings >= 2 and states >= 1, got {self.fillings=} {self.states=}"
            )
        for name, choices in (
            ("state_law", STATE_LAWS),
            ("gradient", GRADIENTS),
            ("baseline", advantage.BASELINES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {choices}")


def state_log_weights(
    taken: Int[Array, " b"], steps: int, law: str, exponent: float
) -> Float[Array, "b t"]:
    """log omega(t) for t = 0..steps-1, -inf where a trajectory of `taken` steps has no state."""
    t = jnp.arange(steps)[None, :]
    total = jnp.maximum(taken, 1)[:, None]
    progress = {"late": (t + 1) / total, "early": (total - t) / total, "uniform": jnp.ones_like(t)}
    inside = t < total
    return jnp.where(inside, exponent * jnp.log(jnp.where(inside, progress[law], 1.0)), -jnp.inf)


def probes(rollout: Rollout, key: PRNGKey, hp: Hyper) -> ProbePlan:
    """Draws the states to branch from: i.i.d. from omega, the same for a whole group."""
    steps = rollout.tokens.shape[1]  # T <= L: Sampling refuses more
    weights = state_log_weights(steps_taken(rollout), steps, hp.state_law, hp.exponent)
    keys = row_keys(key, rollout.group)
    step = jax.vmap(lambda k, w: jax.random.categorical(k, w, shape=(hp.states,)))(keys, weights)
    return ProbePlan(step.astype(jnp.int32), hp.fillings, hp.branch_temperature)


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
    """One item a state, carrying its Z fillings: one forward serves them all."""
    del inner
    assert probe is not None
    assert probe.reward is not None
    policy, states = models.policy, probe.state.shape[1]
    prompt = mask_prompt(key, rollout.row, rollout.prompt, hp.p_mask_prompt, policy.mask_id)
    masked = probe.state == policy.mask_id
    if hp.gradient == "all":
        masked = jnp.broadcast_to(rollout.reveal_step[:, None] > TEMPLATE, masked.shape)
    counted = masked[:, :, None] & upto_eos(probe.fills, policy.eos_id)

    def items(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])

    batch = surrogate.Batch(
        prompt=jnp.repeat(prompt, states, axis=0),
        prompt_valid=jnp.repeat(rollout.prompt_valid, states, axis=0),
        state=items(probe.state),
        labels=items(probe.fills),
        advantage=items(advantage.within(probe.reward, hp.baseline)),
        weight=surrogate.weight(items(counted), hp.ratio_level),
        old=None,
        reference=None,
    )
    reference = surrogate.reference(models, hp.beta)
    return surrogate.with_frozen(batch, models.behaviour, reference, ratio_alone=True)


def idle(batch: surrogate.Batch, hp: Hyper) -> Bool[Array, " n"]:
    """Items that the loss gets no gradient from."""
    return surrogate.idle(batch.advantage, batch.weight, hp.beta > 0)


def loss(models: Models, batch: surrogate.Batch, hp: Hyper) -> tuple[Float[Array, ""], Metrics]:
    """L_step averaged over states and fillings."""
    return surrogate.loss(models.policy, batch, hp.epsilon, hp.beta, hp.ratio_level)
