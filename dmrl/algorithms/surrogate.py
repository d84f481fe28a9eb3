"""The clipped surrogate that the GRPO family shares."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmrl.diffusion.likelihood import state_log_prob
from dmrl.types import Denoiser, Metrics


class Batch(NamedTuple):
    """N items: a state and Z completions of it, with all that does not depend on theta."""

    prompt: Int[Array, "n p"]
    """Already corrupted: policy, behaviour and reference see the same prompt mask."""
    prompt_valid: Bool[Array, "n p"]
    state: Int[Array, "n l"]
    labels: Int[Array, "n z l"]
    advantage: Float[Array, "n z"]
    weight: Float[Array, "n z l"]
    """Which tokens count; sums to 1 over the whole batch, so that microbatches add up."""
    old: Float[Array, "n z l"] | None
    """log pi_old under the same prompt mask; None while the policy is still theta_old."""
    reference: Float[Array, "n z l"] | None


def clipped(
    log_ratio: Float[Array, "*n"],
    advantage: Float[Array, "*#n"],
    epsilon: float | None,
    epsilon_high: float | None = None,
) -> Float[Array, "*n"]:
    """-min(rho A, clip(rho, 1-eps, 1+eps_high) A), rho = exp(log_ratio); no clip if eps is None.

    `epsilon_high` is `epsilon` unless given.
    """
    rho = jnp.exp(log_ratio)
    if epsilon is None:
        return -rho * advantage
    high = epsilon if epsilon_high is None else epsilon_high
    return -jnp.minimum(rho * advantage, jnp.clip(rho, 1 - epsilon, 1 + high) * advantage)


def k3(log_prob: Float[Array, "*n"], reference: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Schulman's estimate of KL(pi || pi_ref): e^(ref-lp) - (ref-lp) - 1."""
    gap = reference - log_prob
    return jnp.exp(gap) - gap - 1


def needs(beta: float) -> frozenset[str]:
    """What a KL penalty of weight `beta` asks of the trainer."""
    return frozenset({"reference"}) if beta > 0 else frozenset()


RATIO_LEVELS = ("token", "sequence")


def check(p_mask_prompt: float, epsilon: float | None, beta: float, ratio_level: str) -> None:
    """Raises ValueError on a value of the shared hyper-parameters that cannot work."""
    if not 0 <= p_mask_prompt <= 1:
        raise ValueError(f"p_mask_prompt={p_mask_prompt} is no probability: choose one in [0, 1]")
    if epsilon is not None and not epsilon > 0:
        raise ValueError(f"epsilon={epsilon} must be positive, or None for no clip")
    if beta < 0:
        raise ValueError(f"beta={beta} must be >= 0")
    if ratio_level not in RATIO_LEVELS:
        raise ValueError(f"ratio_level={ratio_level!r}: choose one of {RATIO_LEVELS}")


def weight(counted: Bool[Array, "n z l"], ratio_level: str) -> Float[Array, "n z l"]:
    """Weights that sum to 1 over the whole batch (0 if nothing counts).

    `token`: every counted token the same. `sequence`: every completion that has a counted token
    the same, split evenly over its tokens.
    """
    if ratio_level == "token":
        return counted / jnp.maximum(jnp.sum(counted), 1)
    tokens = jnp.sum(counted, axis=-1, keepdims=True)
    sequences = jnp.maximum(jnp.sum(tokens > 0), 1)
    return counted / (jnp.maximum(tokens, 1) * sequences)


def loss(
    policy: Denoiser, batch: Batch, epsilon: float | None, beta: float, ratio_level: str
) -> tuple[Float[Array, ""], Metrics]:
    """sum_i w_i ( -min(rho_i A, clip(rho_i) A) + beta * k3_i ), and sums for the log.

    `ratio_level` "token": rho_i per token (diffu-GRPO's code). "sequence": one rho for the
    product over a completion's counted tokens (DiSPO eq. 5), shared by those tokens.
    """
    log_prob = state_log_prob(policy, batch.prompt, batch.prompt_valid, batch.state, batch.labels)
    counted = batch.weight > 0
    log_prob = jnp.where(counted, log_prob, 0.0)
    old = jax.lax.stop_gradient(log_prob) if batch.old is None else batch.old
    log_ratio = jnp.where(counted, log_prob - old, 0.0)
    if ratio_level == "sequence":
        log_ratio = jnp.broadcast_to(jnp.sum(log_ratio, -1, keepdims=True), log_ratio.shape)
    objective = clipped(log_ratio, batch.advantage[..., None], epsilon)
    metrics = {"clip_ratio/region_mean": _clipped_share(log_ratio, batch, epsilon)}
    if batch.reference is not None:
        kl = jnp.where(counted, k3(log_prob, batch.reference), 0.0)
        objective = objective + beta * kl
        metrics["kl"] = jnp.sum(batch.weight * kl)
    return jnp.sum(batch.weight * objective), metrics


def _clipped_share(log_ratio: jax.Array, batch: Batch, epsilon: float | None) -> jax.Array:
    """Weight share of tokens whose clip is active (outside the range on the paying side)."""
    if epsilon is None:
        return jnp.zeros(())
    rho, advantage = jnp.exp(log_ratio), batch.advantage[..., None]
    active = ((rho > 1 + epsilon) & (advantage > 0)) | ((rho < 1 - epsilon) & (advantage < 0))
    return jnp.sum(batch.weight * active)


def with_frozen(batch: Batch, behaviour: Denoiser | None, reference: Denoiser | None) -> Batch:
    """Adds log pi_old and log pi_ref, each under the batch's own prompt mask."""

    def score(denoiser: Denoiser | None) -> jax.Array | None:
        if denoiser is None:
            return None
        args = (batch.prompt, batch.prompt_valid, batch.state, batch.labels)
        scored = state_log_prob(denoiser, *args)
        return jnp.where(batch.weight > 0, scored, 0.0)

    return batch._replace(old=score(behaviour), reference=score(reference))
