"""Supervised masked-diffusion training (LLaDA, arXiv 2502.09992, eq. 5).

L = mean over examples of  1/(t * length) * sum over masked i of -log p(x_i | prompt, x_t)
t ~ U(0, 1); each response token masked with probability t; the prompt stays clean

With complementary masks (LLaDA2.0, arXiv 2512.15745) an example comes twice: what one copy
hides, with probability t, the other shows. Both probabilities are uniform, so half the sum of
their losses, 1/t and 1/(1 - t) being the weights, estimates the same L from every token once.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmrl.diffusion.likelihood import state_log_prob
from dmrl.diffusion.masking import bernoulli, mask_uniform
from dmrl.diffusion.noise import fold_in, row_keys
from dmrl.types import Inner, Metrics, Models, PRNGKey, Probe, Rollout, RowKeys

MINIMUM = 1e-3
"""Smallest masking probability, as `mask_uniform` has it."""


@dataclasses.dataclass(frozen=True)
class Hyper:
    """The published training of LLaDA by default."""

    complementary: bool = False
    """Each example twice, under a mask and its inverse."""


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
    """Noises each example; `rollout` holds the targets, its template stays visible.

    One item an example, or with complementary masks two, next to each other.
    """
    del probe, inner
    free = rollout.reveal_step >= 0
    mask_id = models.policy.mask_id
    if hp.complementary:
        masked, t = _both_masks(row_keys(key, rollout.row), free)
    else:
        _, once, t_once = mask_uniform(key, rollout.row, rollout.tokens, free, mask_id)
        masked, t = once[:, None], t_once[:, None]
    copies = masked.shape[1]
    length = jnp.maximum(jnp.sum(free, axis=1), 1)
    weight = masked / (t * (length * free.shape[0] * copies)[:, None])[..., None]

    def items(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])

    return Batch(
        prompt=jnp.repeat(rollout.prompt, copies, axis=0),
        prompt_valid=jnp.repeat(rollout.prompt_valid, copies, axis=0),
        state=items(jnp.where(masked, mask_id, rollout.tokens[:, None])),
        labels=jnp.repeat(rollout.tokens, copies, axis=0)[:, None],
        weight=items(weight)[:, None],
    )


def _both_masks(
    keys: RowKeys, free: Bool[Array, "b l"]
) -> tuple[Bool[Array, "b two l"], Float[Array, "b two"]]:
    """A mask and its inverse, and their probabilities t and 1 - t, both U(1e-3, 1 - 1e-3)."""
    t = jax.vmap(lambda k: jax.random.uniform(k, minval=MINIMUM, maxval=1 - MINIMUM))(keys)
    one = bernoulli(fold_in(keys, 1), free, t)
    return jnp.stack([one, free & ~one], axis=1), jnp.stack([t, 1 - t], axis=1)


def loss(models: Models, batch: Batch, hp: Hyper) -> tuple[Float[Array, ""], Metrics]:
    """The equation above."""
    del hp
    counted = batch.weight > 0
    log_prob = state_log_prob(models.policy, *batch[:4], jnp.any(counted, axis=1))
    return -jnp.sum(batch.weight * jnp.where(counted, log_prob, 0.0)), {}
