"""DTM: discrete tilt matching (arXiv 2604.18739).

A frozen teacher pi_a draws completions x_1 with rewards r. Cross-entropy against weighted labels
fits the policy to the teacher's law tilted by e^{h r}, one forward each and no ratios:

    pi_{a+h}(v | x_t, i) = E_a[ 1{x_1^i = v} e^{h r} | x_t ] / E_a[ e^{h r} | x_t ]
    target_i(v) = c pi_a(v | x_t)_i + 1{x_1^i = v} (e^{h r} - c)
    L = mean over completions of  1/|W| sum_{i in W} -sum_v target_i(v) log pi(v | x_t)_i

x_t hides n ~ U{1..L} tokens as the semi-autoregressive sampler would: all of the last blocks, a
random part of the block before them (the active one), nothing of the earlier ones. Minimiser and
mean gradient do not depend on c, the variance does. Phases add up: a becomes a + h when the
policy becomes the teacher (`Programs.next_phase`).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmrl.algorithms import surrogate
from dmrl.diffusion.likelihood import completion_hidden, over_positions
from dmrl.diffusion.masking import random_subset, uniform_count
from dmrl.diffusion.noise import fold_in, row_keys
from dmrl.types import Inner, Metrics, Models, PRNGKey, Probe, Rollout, RowKeys


@dataclasses.dataclass(frozen=True)
class Hyper:
    """Defaults are those of the authors' Countdown configuration (Sudoku: h = 5, rewards to 2)."""

    h: float = 6.0
    """Tilt of one phase, in 1 / reward: the minimiser is the teacher's law times e^{h r}."""
    control_variate: float = 1.0
    """c, in [0, 1]; 0 needs no forward of the teacher."""
    block_length: int = 32
    """The sampler's."""
    active_block_only: bool = True
    """W is the masked part of the active block, as in both published configurations; else all
    masked positions."""

    def __post_init__(self) -> None:
        if not self.h > 0:
            raise ValueError(f"h={self.h} must be positive: it tilts towards higher rewards")
        if not 0 <= self.control_variate <= 1:
            raise ValueError(f"control_variate={self.control_variate}: choose c in [0, 1]")
        if self.block_length < 1:
            raise ValueError(f"block_length={self.block_length} must be at least 1")


class Batch(NamedTuple):
    """N noised completions."""

    prompt: Int[Array, "n p"]
    prompt_valid: Bool[Array, "n p"]
    state: Int[Array, "n l"]
    labels: Int[Array, "n l"]
    mass: Float[Array, " n"]
    """e^{h r}, to which a target sums."""
    weight: Float[Array, "n l"]
    """1 / (completions |W|) on W, over the whole batch."""


def interpolant(
    keys: RowKeys, free: Bool[Array, "b l"], count: Int[Array, " b"], block_length: int
) -> tuple[Bool[Array, "b l"], Bool[Array, "b l"]]:
    """Hides `count` of each row's free positions; returns (masked, masked in the active block).

    Blocks are those of the completion; of each only the free positions count, so a block that a
    template gives whole is never active. Raises ValueError if blocks do not divide the length.
    """
    rows, length = free.shape
    if length % block_length:
        raise ValueError(
            f"block_length={block_length} does not divide the completion's {length} tokens: give "
            "the block_length of the sampling"
        )
    inside = jnp.sum(free.reshape(rows, -1, block_length), axis=-1)
    after = jnp.cumsum(inside[:, ::-1], axis=1)[:, ::-1] - inside
    left = count[:, None] - after  # to be hidden in this block or before it
    inside, left = (jnp.repeat(x, block_length, axis=1) for x in (inside, left))
    active = free & (left > 0) & (left <= inside)
    part = random_subset(keys, active, jnp.max(jnp.where(active, left, 0), axis=1))
    return part | (free & (left > inside)), part


def prepare(
    models: Models, rollout: Rollout, probe: Probe | None, key: PRNGKey, inner: Inner, hp: Hyper
) -> Batch:
    """Noises each completion once. Rewards below 0 count as 0, so that no target is negative.

    Only sampled positions are hidden: the template stays visible, and so do hints, which makes
    the rest a draw of the teacher given them. Tokens after EOS count, as in the authors' code:
    there the padding is part of the answer.
    """
    del probe, inner
    assert rollout.reward is not None
    free = rollout.reveal_step >= 0
    keys = row_keys(key, rollout.row)
    count = uniform_count(keys, jnp.sum(free, axis=1))
    masked, active = interpolant(fold_in(keys, 1), free, count, hp.block_length)
    counted = active if hp.active_block_only else masked
    return Batch(
        prompt=rollout.prompt,
        prompt_valid=rollout.prompt_valid,
        state=jnp.where(masked, models.policy.mask_id, rollout.tokens),
        labels=rollout.tokens,
        mass=jnp.exp(hp.h * jnp.maximum(rollout.reward, 0.0)),
        weight=surrogate.weight(counted[:, None], "sequence")[:, 0],
    )


def loss(models: Models, batch: Batch, hp: Hyper) -> tuple[Float[Array, ""], Metrics]:
    """The equation above, for `models.behaviour` as the teacher.

    Without phases there is none; the teacher is then the policy of the moment, held constant.
    Whole vocabulary rows exist for a few positions at a time, and are recomputed backwards.
    """
    policy, c = models.policy, hp.control_variate
    teacher = policy if models.behaviour is None else models.behaviour
    own_width = (hidden := completion_hidden(policy, *batch[:3])).shape[-1]
    if c:
        theirs = hidden if models.behaviour is None else completion_hidden(teacher, *batch[:3])
        hidden = jnp.concatenate([hidden, jax.lax.stop_gradient(theirs)], axis=-1)

    @jax.checkpoint
    def cross_entropy(chunk: jax.Array, both: jax.Array) -> jax.Array:
        logits = policy.logits(both[..., :own_width])
        # A token that cannot be predicted (-inf) has no mass in the target either.
        log_pi = jnp.where(logits == -jnp.inf, 0.0, jax.nn.log_softmax(logits))
        labels = jax.lax.dynamic_slice_in_dim(
            batch.labels, chunk * both.shape[1], both.shape[1], axis=1
        )
        of_label = jnp.take_along_axis(log_pi, labels[..., None], axis=-1)[..., 0]
        total = (batch.mass[:, None] - c) * of_label
        if c:
            pi_a = jax.lax.stop_gradient(jax.nn.softmax(teacher.logits(both[..., own_width:])))
            total += c * jnp.sum(pi_a * log_pi, axis=-1)
        return -total

    value = jnp.sum(batch.weight * over_positions(cross_entropy, hidden))
    return value, {"target_mass": jnp.sum(batch.weight * batch.mass[:, None])}
