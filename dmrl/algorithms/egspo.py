"""EGSPO and EGSPO-SA: policy gradients of whole denoising steps (arXiv 2603.12554).

    log pi(t) = sum of log p(x_i | x_t) over the tokens that step t revealed
    rho_t = pi(t) / pi_old(t),  R_t = (r + lambda (r - rhat_t)) / (1 + lambda)
    A_t = R_t - mean of the group's R_t
    L = mean_t ( -min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps_high) A_t) + beta KL_t ) / n

over the K steps of a completion with the highest entropy; n tokens a step on average. rhat_t, the
reward of the greedy one-shot completion of x_t, depends on the state alone and hence is a baseline
(lambda > 0 is EGSPO-SA). The k-th step of a completion is compared with the k-th of its group.

Every revealed token counts, after an EOS too: it was part of the action, and which EOS is the first
shows only in hindsight. The gradient is exact for the sampler's random order and evenly spaced
steps: a confident order depends on theta itself, and a rank by entropy on what came later.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dmrl.algorithms import advantage, surrogate
from dmrl.diffusion import divergence
from dmrl.diffusion.guidance import tempered
from dmrl.diffusion.likelihood import completion_hidden
from dmrl.diffusion.probe import evenly_spaced, step_entropy
from dmrl.types import Inner, Metrics, Models, PRNGKey, Probe, ProbePlan, Rollout

CHOICES = {
    "selection": ("entropy", "uniform"),
    "baseline": ("return", "reward"),
    "aggregate": ("sum", "mean"),
    "kl": ("k3", "exact"),
}

READS_REVEAL_STEP = True
"""Scores what each step revealed, so no revealed token may change."""


@dataclasses.dataclass(frozen=True)
class Hyper:
    """Defaults are those of the authors' released training script."""

    states: int = 8
    """K."""
    selection: str = "entropy"
    """`entropy` of the tokens a step revealed, or `uniform`: the ablation, evenly spaced."""
    coverage: float | None = None
    """Train only on the fewest of the K that hold this share of a completion's entropy (alpha of
    the authors' adaptive variant, 0.7, which takes the batch's largest number for all)."""
    stop_at_eos: bool = False
    """Select no step after the last one that revealed a token up to the first EOS."""
    lam: float = 0.5
    """lambda; 0 is plain EGSPO."""
    normalize: bool = True
    """Divide by 1 + lambda; without, the expected gradient is that much larger."""
    baseline: str = "return"
    """The group's mean is that of R_t, or of the terminal `reward` alone."""
    aggregate: str = "sum"
    """`mean`: over the step's tokens, in log pi(t) and KL, and no division by n. (The authors'
    code then averages the exact KL over the vocabulary too; not so here.)"""
    temperature: float = 1.0
    """Of the scored policy. The authors score at 1 what they draw at 0.9; with the sampler's own
    the gradient is that of the policy which acted."""
    epsilon: float = 0.2
    epsilon_high: float = 0.5
    beta: float = 0.04
    kl: str = "k3"
    """`k3` of log pi(t), or `exact` over the vocabulary at one more forward of the reference."""

    def __post_init__(self) -> None:
        surrogate.check(0.0, self.epsilon, self.beta, "sequence")
        if self.states < 1 or self.lam < 0 or not self.temperature > 0 or not self.epsilon_high > 0:
            raise ValueError(
                "need states >= 1, lam >= 0, temperature > 0 and epsilon_high > 0, got "
                f"{self.states=} {self.lam=} {self.temperature=} {self.epsilon_high=}"
            )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {choices}")
        if self.coverage is not None and (
            not 0 < self.coverage <= 1 or self.selection == "uniform"
        ):
            raise ValueError(
                f"coverage={self.coverage} with selection={self.selection!r}: must be in (0, 1], "
                "of steps selected by 'entropy', or None"
            )


def probes(rollout: Rollout, key: PRNGKey, hp: Hyper) -> ProbePlan:
    """K steps of each completion, filled greedily; by entropy, the highest comes first.

    Raises:
      ValueError: more states than the completion has positions.
    """
    del key
    entropy, allowed = step_entropy(rollout, hp.stop_at_eos)
    if hp.states > allowed.shape[1]:
        raise ValueError(f"states={hp.states}: a completion has {allowed.shape[1]} steps at most")
    if hp.selection == "uniform":
        step = evenly_spaced(allowed, hp.states)
    else:
        _, step = jax.lax.top_k(jnp.where(allowed, entropy, -jnp.inf), hp.states)
    return ProbePlan(step.astype(jnp.int32), fillings=1, temperature=0.0)


def needs(hp: Hyper) -> frozenset[str]:
    """A reference if there is a KL penalty."""
    return surrogate.needs(hp.beta)


def _trained(rollout: Rollout, probe: Probe, hp: Hyper) -> Bool[Array, "b k l"]:
    """The tokens of U_t of every planned step that is trained on."""
    entropy, allowed = step_entropy(rollout, hp.stop_at_eos)
    trained = jnp.take_along_axis(allowed, probe.step, axis=1)
    if hp.coverage is not None:
        held = jnp.where(trained, jnp.take_along_axis(entropy, probe.step, axis=1), 0.0)
        total = jnp.sum(jnp.where(allowed, entropy, 0.0), axis=1, keepdims=True)
        trained &= jnp.cumsum(held, axis=1) - held < hp.coverage * total
    return (rollout.reveal_step[:, None] == probe.step[:, :, None]) & trained[:, :, None]


def prepare(
    models: Models,
    rollout: Rollout,
    probe: Probe | None,
    key: PRNGKey,
    inner: Inner,
    hp: Hyper,
) -> surrogate.Batch:
    """One item a (completion, state)."""
    del key, inner
    assert rollout.reward is not None
    assert probe is not None
    assert probe.reward is not None
    gain = hp.lam * (rollout.reward[:, None] - probe.reward[..., 0])
    if hp.baseline == "return":
        centre = jax.vmap(advantage.group_relative, in_axes=(1, None), out_axes=1)
        credit = centre(rollout.reward[:, None] + gain, rollout.group)
    else:
        credit = advantage.group_relative(rollout.reward, rollout.group)[:, None] + gain
    credit = credit / (1 + hp.lam) if hp.normalize else credit
    counted = _trained(rollout, probe, hp).reshape(credit.size, 1, -1)
    batch = surrogate.Batch(
        prompt=jnp.repeat(rollout.prompt, hp.states, axis=0),
        prompt_valid=jnp.repeat(rollout.prompt_valid, hp.states, axis=0),
        state=probe.state.reshape(credit.size, -1),
        labels=jnp.repeat(rollout.tokens, hp.states, axis=0)[:, None],
        advantage=credit.reshape(-1, 1),
        weight=surrogate.weight(counted, "token" if hp.aggregate == "sum" else "sequence"),
        old=None,
        reference=None,
    )
    frozen = (models.behaviour, models.reference if hp.beta > 0 and hp.kl == "k3" else None)
    old, reference = (None if m is None else tempered(m, hp.temperature) for m in frozen)
    return surrogate.with_frozen(batch, old, reference, pieces=hp.states)


def idle(batch: surrogate.Batch, hp: Hyper) -> Bool[Array, " n"]:
    """Items that the loss gets no gradient from."""
    return surrogate.idle(batch.advantage, batch.weight, hp.beta > 0)


def loss(models: Models, batch: surrogate.Batch, hp: Hyper) -> tuple[Float[Array, ""], Metrics]:
    """The equation above; with weights of tokens, mean_t ( . ) / n is sum_t ( . ) / #tokens."""
    policy = tempered(models.policy, hp.temperature)
    hidden = completion_hidden(policy, *batch[:3])
    counted = batch.weight[:, 0] > 0
    tokens = jnp.maximum(jnp.sum(counted, axis=-1), 1)
    mean = hp.aggregate == "mean"

    def of_step(x: Float[Array, "n l"]) -> Float[Array, " n"]:
        return jnp.sum(jnp.where(counted, x, 0.0), axis=-1) / (tokens if mean else 1)

    log_prob = of_step(policy.log_prob(hidden, batch.labels[:, 0, :, None], counted)[..., 0])
    old = jax.lax.stop_gradient(log_prob) if batch.old is None else of_step(batch.old[:, 0])
    rho, credit = jnp.exp(log_prob - old), batch.advantage[:, 0]
    objective = surrogate.clipped(log_prob - old, credit, hp.epsilon, hp.epsilon_high)
    high, low = rho > 1 + hp.epsilon_high, rho < 1 - hp.epsilon
    active = (high & (credit > 0)) | (low & (credit < 0))
    share = jnp.sum(batch.weight, axis=(1, 2))
    weight = share / (1 if mean else tokens)
    metrics = {"clip_ratio/region_mean": jnp.sum(share * active)}
    if hp.beta > 0:
        if hp.kl == "exact":
            assert models.reference is not None
            reference = tempered(models.reference, hp.temperature)
            theirs = jax.lax.stop_gradient(completion_hidden(reference, *batch[:3]))
            kl = of_step(divergence.kl(policy, reference, hidden, theirs))
        else:
            assert batch.reference is not None
            kl = surrogate.k3(log_prob, of_step(batch.reference[:, 0]))
        objective = objective + hp.beta * kl
        metrics["kl"] = jnp.sum(weight * kl)
    return jnp.sum(weight * objective), metrics
