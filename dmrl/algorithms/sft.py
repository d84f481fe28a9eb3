"""Supervised masked-diffusion training (LLaDA, arXiv 2502.09992, eq. 5).

L = mean over examples of  1/(t * length) * sum over masked i of -log p(x_i | prompt, x_t)
t ~ U(0, 1); each response token masked with probability t; the prompt stays clean
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmrl.diffusion.likelihood import state_log_prob
from dmrl.diffusion.masking import mask_uniform
from dmrl.types import Inner, Metrics, Models, PRNGKey, Probe, Rollout


@dataclasses.dataclass(frozen=True)
class Hyper:
    """No hyper-parameters beyond the data."""


class Batch(NamedTuple):
    """N noised examples."""

    prompt: Int[Array, "n p"]
    prompt_valid: Bool[Array, "n p"]
    state: Int[Array, "n l"]
    labels: Int[Array, "n z l"]
    weight: Float[Array, "n z l"]


def prepare(
    models: Models,
    rollout: Rollout,
    probe: Probe | None,
    key: PRNGKey,
    inner: Inner,
    hp: Hyper,
) -> Batch:
    """Noises each example once; `rollout` holds the targets, its template stays visible."""
    del probe, inner, hp
    free = rollout.reveal_step >= 0
    state, masked, t = mask_uniform(key, rollout.row, rollout.tokens, free, models.policy.mask_id)
    length = jnp.maximum(jnp.sum(free, axis=1), 1)
    weight = masked / (t * length * free.shape[0])[:, None]
    return Batch(
        rollout.prompt, rollout.prompt_valid, state, rollout.tokens[:, None], weight[:, None]
    )


def loss(models: Models, batch: Batch, hp: Hyper) -> tuple[Float[Array, ""], Metrics]:
    """The equation above."""
    del hp
    log_prob = state_log_prob(
        models.policy, batch.prompt, batch.prompt_valid, batch.state, batch.labels
    )
    counted = batch.weight > 0
    return -jnp.sum(batch.weight * jnp.where(counted, log_prob, 0.0)), {}
