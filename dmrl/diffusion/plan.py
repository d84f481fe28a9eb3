"""The steps of a decoding: which block each opens, and how much of it a fixed schedule reveals."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dmrl.diffusion import schedule
from dmrl.diffusion.sampling import Sampling


class Step(NamedTuple):
    """What is known of a step beforehand; with an adaptive schedule only its number, and how
    many positions it reveals at least."""

    number: Int[Array, "*n"]
    start: Int[Array, "*n"]
    stop: Int[Array, "*n"]
    progress: Float[Array, "*n"]
    """From 0 at a block's first step to 1 at its last."""
    reveals: Int[Array, "*n b"]
    remain: Int[Array, "*n b"]
    """Masks of the block after the step."""


def plan(config: Sampling, masked: Bool[Array, "b l"]) -> Step:
    """All T steps, for rows of a template with these masks."""
    blocks = config.layout
    steps = [i for i, block in enumerate(blocks) for _ in range(block.steps)]
    start = np.array([blocks[i].start for i in steps], np.int32)
    stop = np.array([blocks[i].start + blocks[i].size for i in steps], np.int32)
    inside = np.concatenate([np.arange(block.steps) for block in blocks])
    last = np.array([max(blocks[i].steps - 1, 1) for i in steps])
    progress = inside / last
    if isinstance(config.schedule_rule, schedule.Doubling):
        progress = (2.0 ** np.arange(1, len(steps) + 1) - 1) / 2 ** len(steps)
    total = jnp.stack([jnp.sum(masked[:, b.start : b.start + b.size], -1) for b in blocks], 1)
    if config.adaptive:  # at least so many that `steps` suffice
        least = -(-config.block_length // (config.steps // config.blocks))
        count = jnp.full((masked.shape[0], len(steps)), least, jnp.int32)
    else:
        count = schedule.counts(config.schedule_rule, blocks, total)
    remain = jnp.concatenate(
        [
            jnp.cumsum(part[:, ::-1], axis=1)[:, ::-1] - part
            for part in jnp.split(count, np.cumsum([b.steps for b in blocks])[:-1], axis=1)
        ],
        axis=1,
    )
    number = jnp.arange(len(steps), dtype=jnp.int32)
    done = jnp.asarray(progress, jnp.float32)
    return Step(number, jnp.asarray(start), jnp.asarray(stop), done, count.T, remain.T)
