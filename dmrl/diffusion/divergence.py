"""Exact divergences of two models' distributions, a few vocabulary rows at a time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dmrl.diffusion.likelihood import over_positions
from dmrl.types import Denoiser


def kl(
    policy: Denoiser,
    reference: Denoiser,
    hidden: Float[Array, "n l d"],
    reference_hidden: Float[Array, "n l d2"],
) -> Float[Array, "n l"]:
    """KL(pi || pi_ref) in nats over the vocabulary at every position; differentiable in `hidden`.

    The backward pass recomputes the logits, so no [N,L,V] array exists in either direction.
    """

    @jax.checkpoint
    def rows(_: Int[Array, ""], both: Float[Array, "n w d3"]) -> Float[Array, "n w"]:
        log_p = jax.nn.log_softmax(policy.logits(both[..., : hidden.shape[-1]]))
        log_q = jax.nn.log_softmax(reference.logits(both[..., hidden.shape[-1] :]))
        return categorical_kl(log_p, log_q)

    return over_positions(rows, jnp.concatenate([hidden, reference_hidden], axis=-1))


def categorical_kl(log_p: Float[Array, "*n v"], log_q: Float[Array, "*n v"]) -> Float[Array, "*n"]:
    """KL(p || q) in nats of normalised log-probabilities over the last axis."""
    gap = jnp.where(log_p > -jnp.inf, log_p - log_q, 0.0)  # MASK is impossible under both
    return jnp.sum(jnp.exp(log_p) * gap, axis=-1)
