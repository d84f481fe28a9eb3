"""Probes: rebuild an intermediate state and ask what the model would finish with from there."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmrl.diffusion.likelihood import completion_hidden, over_positions
from dmrl.diffusion.noise import categorical, fold_in, row_keys
from dmrl.types import Denoiser, PRNGKey, Probe, ProbePlan, Rollout


def state_at(rollout: Rollout, step: Int[Array, "b k"], mask_id: int) -> Int[Array, "b k l"]:
    """The completion before denoising step `step`, exactly as the sampler saw it."""
    if rollout.states is not None:
        return jnp.take_along_axis(rollout.states, step[:, :, None], axis=1)
    revealed = rollout.reveal_step[:, None] < step[:, :, None]
    return jnp.where(revealed, rollout.tokens[:, None], mask_id)


def steps_taken(rollout: Rollout) -> Int[Array, " b"]:
    """How many denoising steps revealed something; states 0..n-1 have at least one mask."""
    return jnp.max(rollout.reveal_step, axis=1) + 1


def step_entropy(
    rollout: Rollout, stop_at_eos: bool = False
) -> tuple[Float[Array, "b steps"], Bool[Array, "b steps"]]:
    """Mean entropy of the tokens that each step revealed (0 if none), and whether it revealed any.

    With `stop_at_eos` only steps up to the last one that revealed a token up to the first EOS are
    marked. Steps are numbered up to the length of the completion: no schedule has more.
    """
    steps = jnp.arange(rollout.tokens.shape[1])[None]
    revealed = rollout.reveal_step[:, None] == steps[..., None]
    tokens = jnp.sum(revealed, axis=-1)
    total = jnp.sum(jnp.where(revealed, rollout.entropy[:, None], 0.0), axis=-1)
    marked = tokens > 0
    if stop_at_eos:
        answer = jnp.where(steps < rollout.length[:, None], rollout.reveal_step, 0)
        marked &= steps <= jnp.max(answer, axis=1, keepdims=True)
    return total / jnp.maximum(tokens, 1), marked


def evenly_spaced(marked: Bool[Array, "b steps"], count: int) -> Int[Array, "b count"]:
    """The last marked step of each row, after `count` - 1 from the first to the one before it.

    Repeats steps of a row that has fewer marked than `count`; step 0 where none is.
    """
    number = jnp.cumsum(marked, axis=1) - 1
    last = number[:, -1:]
    spaced = jnp.arange(count - 1)[None] * jnp.maximum(last - 1, 0) // max(count - 2, 1)
    wanted = jnp.concatenate([spaced, last], axis=1)
    return jnp.argmax((number[:, None] == wanted[:, :, None]) & marked[:, None], axis=-1)


def fill(denoiser: Denoiser, rollout: Rollout, plan: ProbePlan, key: PRNGKey) -> Probe:
    """Fills every mask of the planned states in one shot, Z times from one forward each.

    The fillings are i.i.d. draws of prod_i p(x_i | state) at `plan.temperature` (0: greedy).
    Equal in law to drawing from logits kept during the rollout, without keeping any. With
    `plan.own` the sampler's own drafts are returned instead, at no further forward. States
    are visited K at a time, one row after the other along K, so memory holds one state a row.
    """
    if plan.own:
        return _own_drafts(rollout, plan, denoiser.mask_id)
    keys = row_keys(key, rollout.row)

    def one_state(column):
        number, step = column
        state = state_at(rollout, step[:, None], denoiser.mask_id)[:, 0]
        hidden = completion_hidden(denoiser, rollout.prompt, rollout.prompt_valid, state)
        state_keys = fold_in(keys, number)

        def draw(chunk, hidden_chunk):
            logits, chunk_keys = denoiser.logits(hidden_chunk), fold_in(state_keys, chunk)

            def filling(z):
                return categorical(fold_in(chunk_keys, z), logits, plan.temperature)

            return jax.vmap(filling, out_axes=1)(jnp.arange(plan.fillings))

        drawn = over_positions(draw, hidden).astype(state.dtype)
        return state, jnp.where(state[:, None] == denoiser.mask_id, drawn, state[:, None])

    columns = (jnp.arange(plan.step.shape[1]), plan.step.T)
    state, fills = jax.lax.map(one_state, columns)
    return Probe(plan.step, jnp.moveaxis(state, 0, 1), jnp.moveaxis(fills, 0, 1))


def _own_drafts(rollout: Rollout, plan: ProbePlan, mask_id: int) -> Probe:
    """What the sampler itself predicted at the planned states."""
    assert rollout.drafts is not None
    fills = jnp.take_along_axis(rollout.drafts, plan.step[:, :, None], axis=1)
    return Probe(plan.step, state_at(rollout, plan.step, mask_id), fills[:, :, None])
