"""The decisions of a learned order, visited again along a finished trajectory.

A learned order g(i | x) is a softmax over candidates: the masked positions of the block, or the K
of them that the denoiser is most confident of (`order.Learned`). Source: UPO, arXiv 2510.05725.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dmrl.diffusion.likelihood import over_positions
from dmrl.diffusion.order import features, log_law, most_confident, top_probabilities
from dmrl.types import Denoiser, Rollout


class Trace(NamedTuple):
    """Finished trajectories as far as their decisions are concerned; fields as in `Rollout`."""

    prompt: Int[Array, "n p"]
    prompt_valid: Bool[Array, "n p"]
    tokens: Int[Array, "n l"]
    reveal_step: Int[Array, "n l"]


def trace_of(rollout: Rollout) -> Trace:
    """A rollout's own."""
    return Trace(rollout.prompt, rollout.prompt_valid, rollout.tokens, rollout.reveal_step)


def revealed(rollout: Rollout, steps: int) -> Bool[Array, "n t l"]:
    """What every step revealed."""
    return rollout.reveal_step[:, None] == jnp.arange(steps)[None, :, None]


class Decision(NamedTuple):
    """One step of N trajectories. Where a step revealed nothing, nothing is `chosen`."""

    log_law: Float[Array, "n w"]
    """log g over the candidates, -inf elsewhere."""
    confidence: Float[Array, "n w"]
    """Highest probability of the denoiser at the position."""
    candidates: Bool[Array, "n w"]
    chosen: Bool[Array, "n w"]


def visit(
    denoiser: Denoiser,
    trace: Trace,
    steps: int,
    block_length: int,
    top_k: int,
    read: Callable[[Decision], Any],
    keep_inputs: bool = False,
) -> Any:
    """`read` (arrays [N]) of every decision, stacked to [N, steps].

    The states are rebuilt one after the other, with one forward of the denoiser each, and again
    where a gradient needs them: memory is that of one step. `keep_inputs` keeps what the policy
    reads instead, `steps` times [N, S, D], and saves the denoiser's second forward.
    """
    assert denoiser.order is not None
    asked = denoiser.order
    prompt_length, length = trace.prompt.shape[1], trace.tokens.shape[1]
    completion = jnp.ones(trace.tokens.shape, bool)
    valid = jnp.concatenate([trace.prompt_valid, completion], axis=1)
    per_block = steps * block_length // length

    def decision(number: Int[Array, ""]) -> Any:
        start = number // per_block * block_length
        state = jnp.where(trace.reveal_step < number, trace.tokens, denoiser.mask_id)
        tokens = jnp.concatenate([trace.prompt, state], axis=1)
        hidden, score = asked(tokens, valid, prompt_length + start, block_length)

        def block(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, block_length, axis=1)

        def top(_: jax.Array, chunk: jax.Array) -> jax.Array:
            return top_probabilities(jax.nn.log_softmax(denoiser.logits(chunk)))

        highest = over_positions(top, jax.lax.stop_gradient(hidden), axis=1)
        highest = checkpoint_name(highest, "order_input")
        masked, chosen = block(state) == denoiser.mask_id, block(trace.reveal_step) == number
        confidence = highest[..., 0]
        # Another program rounds otherwise: what was chosen was among the K.
        allowed = most_confident(jnp.where(chosen, jnp.inf, confidence), masked, top_k)
        law = log_law(score(features(highest, masked)), allowed)
        return read(Decision(law, confidence, allowed, chosen))

    saved = jax.checkpoint_policies.save_only_these_names("order_input")
    policy = saved if keep_inputs else jax.checkpoint_policies.nothing_saveable
    remembered = jax.checkpoint(decision, policy=policy, prevent_cse=False)
    _, found = jax.lax.scan(lambda _, n: (None, remembered(n)), None, jnp.arange(steps))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)


class Summary(NamedTuple):
    """What losses read of every decision, float32; 0 where a step revealed nothing."""

    log_prob: Float[Array, "*n"]
    """log g of what was chosen."""
    reference: Float[Array, "*n"]
    """log of the reference there: softmax(confidence / tau), or uniform over the candidates."""
    cross_entropy: Float[Array, "*n"]
    """To max-confidence: one-hot at the most confident candidate, split evenly between ties."""
    agrees: Float[Array, "*n"]
    """1 where the order's favourite is a most confident candidate."""
    entropy: Float[Array, "*n"]
    """Of the order, in nats."""
    due: Float[Array, "*n"]
    """1 where there was a decision."""


def summary(decision: Decision, tau: float | None) -> Summary:
    """One step of N trajectories; `tau` None: a uniform reference."""
    law, confidence, allowed, chosen = decision
    due = jnp.any(chosen, axis=-1).astype(jnp.float32)
    scores = jnp.zeros_like(confidence) if tau is None else confidence / tau
    sure = jnp.where(allowed, confidence, -jnp.inf)
    best = allowed & (sure == jnp.max(sure, axis=-1, keepdims=True))
    target = best / jnp.maximum(jnp.sum(best, axis=-1, keepdims=True), 1)
    favourite = jnp.take_along_axis(best, jnp.argmax(law, axis=-1, keepdims=True), axis=-1)
    p = jax.lax.stop_gradient(jnp.exp(law))

    def over(weight: jax.Array, log_p: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(allowed, weight * log_p, 0.0), axis=-1)

    return Summary(
        log_prob=jnp.sum(jnp.where(chosen, law, 0.0), axis=-1),
        reference=jnp.sum(jnp.where(chosen, log_law(scores, allowed), 0.0), axis=-1),
        cross_entropy=-due * over(target, jnp.where(allowed, law, 0.0)),
        agrees=due * favourite[:, 0],
        entropy=-due * over(p, law),
        due=due,
    )
