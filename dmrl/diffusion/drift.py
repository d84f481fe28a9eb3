"""How far a sampler's stored keys and values are from the model they stand for."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dmrl.diffusion import stored
from dmrl.diffusion.divergence import categorical_kl
from dmrl.diffusion.noise import favourite
from dmrl.diffusion.probe import state_at, steps_taken
from dmrl.diffusion.sampling import Sampling
from dmrl.types import Denoiser, Metrics, PRNGKey, Rollout


class Place(NamedTuple):
    """A step that read stored keys and values, of each row."""

    step: Int[Array, " b"]
    filled: Int[Array, " b"]
    """The step at which they were stored."""
    start: Int[Array, " b"]
    """First position of the open block."""
    weight: Float[Array, " b"]
    """0 where the row has no such step."""


def places(rollout: Rollout, config: Sampling, key: PRNGKey) -> Place:
    """One such step of each row, uniformly drawn."""
    rows, length = rollout.tokens.shape
    every, width = config.cache_rule.every, config.block_length
    steps = jnp.arange(length)[None]
    revealed = rollout.reveal_step[:, None] == steps[..., None]
    block = jnp.argmax(revealed, axis=-1) // width
    if config.adaptive:  # each row counts its own steps: a block begins with its first reveal
        blocks = rollout.reveal_step.reshape(rows, -1, width)
        first = jnp.min(jnp.where(blocks < 0, length, blocks), axis=-1)
        inside = steps - jnp.take_along_axis(first, block, axis=1)
    else:
        inside = steps % (config.steps // config.blocks)
    reads = jnp.any(revealed, axis=-1) & (inside % every > 0)
    reads &= steps < steps_taken(rollout)[:, None]
    noise = jax.random.uniform(key, reads.shape)
    step = jnp.argmax(jnp.where(reads, noise, -1.0), axis=1)

    def of_step(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(jnp.broadcast_to(x, reads.shape), step[:, None], axis=1)[:, 0]

    weight = of_step(reads).astype(jnp.float32)
    return Place(step, step - of_step(inside) % every, of_step(block) * width, weight)


def measure(denoiser: Denoiser, rollout: Rollout, config: Sampling, key: PRNGKey) -> Metrics:
    """KL(exact || cached) in nats a masked position of the open block, and how often both have
    the same most probable token, at one stored step of each row: four forwards a row.

    `drift/states` says over how many states. Rows go one by one: each has a block of its own.
    """
    cached = denoiser.cached
    assert cached is not None
    at, length, width = places(rollout, config, key), config.length, config.block_length
    states = state_at(rollout, jnp.stack([at.filled, at.step], axis=1), denoiser.mask_id)
    prompt = rollout.prompt.shape[1]

    def one(row):
        before, valid, pair, start = row
        seen = jnp.concatenate([valid, jnp.ones((length,), bool)])[None]
        old, new = (jnp.concatenate([before, state])[None] for state in pair)
        _, store = cached.prefill(old, seen, prompt + start, width)
        hidden = stored.block(denoiser, config, new, seen, store, start)
        exact, _ = cached.prefill(new, seen, prompt + start, width)
        p, q = (jax.nn.log_softmax(denoiser.logits(x[0])) for x in (exact, hidden))
        open_ = jax.lax.dynamic_slice_in_dim(pair[1], start, width) == denoiser.mask_id
        share = open_ / jnp.maximum(jnp.sum(open_), 1)
        same = favourite(p) == favourite(q)
        return jnp.sum(categorical_kl(p, q) * share), jnp.sum(same * share)

    kl, same = jax.lax.map(one, (rollout.prompt, rollout.prompt_valid, states, at.start))
    total = jnp.sum(at.weight)
    return {
        "drift/kl": jnp.sum(kl * at.weight) / jnp.maximum(total, 1),
        "drift/agreement": jnp.sum(same * at.weight) / jnp.maximum(total, 1),
        "drift/states": total,
    }
