"""Sampling with refill: a slot whose completion has ended takes the next row of the queue.

`sampler.sample` walks a batch until its longest completion has ended. Here every slot is at a block
of its own, so that the work follows the mean length. All steps of a block are taken together: slots
change hands between blocks alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dmrl.diffusion.guidance import guided
from dmrl.diffusion.noise import row_keys
from dmrl.diffusion.plan import Step, plan
from dmrl.diffusion.sampler import rollout_of
from dmrl.diffusion.sampling import Sampling
from dmrl.diffusion.walk import State, Walk, begin
from dmrl.types import Denoiser, PRNGKey, Rollout


class _Slots(NamedTuple):
    """What S slots hold, and where the queue of Q rows is."""

    row: Int[Array, " s"]
    """Its place in the queue; Q: the slot is empty."""
    block: Int[Array, " s"]
    state: State
    following: Int[Array, ""]
    """The first row that has not begun."""
    done: State
    """Of all rows [Q,L]; those that have ended."""
    turn: Int[Array, ""]
    """Blocks that have been walked."""


def able(config: Sampling) -> bool:
    """Whether these rules go with slots: several blocks alike, whose tokens stay."""
    alike = len({(block.size, block.steps) for block in config.layout}) == 1
    fixed = not (config.adaptive or config.remasks or config.approximate or config.learned)
    return alike and fixed and config.blocks > 1


def sample(
    denoiser: Denoiser,
    prompt: Int[Array, "q p"],
    prompt_valid: Bool[Array, "q p"],
    template: Int[Array, "q l"],
    row: Int[Array, " q"],
    group: Int[Array, " q"],
    key: PRNGKey,
    config: Sampling,
    slots: int,
    pin: Callable[[Any], Any] = lambda rows: rows,
) -> Rollout:
    """What `sampler.sample` gives with `stop_at_eos`, Q rows in `slots` rows of memory and work.

    Noise is keyed by row and step, so a row's result does not depend on when it had its turn. `pin`
    says how the arrays [slots, ...] lie on a mesh.

    Raises:
      ValueError: for rules that do not go with slots (see `able`), or more slots than rows.
    """
    rows = template.shape[0]
    if not able(config):
        raise ValueError(f"{config} does not refill: it needs several equal blocks and no cache")
    if not 1 <= slots <= rows:
        raise ValueError(f"slots={slots} for {rows} rows: choose 1 to {rows}")
    if config.cfg_scale:
        denoiser = guided(denoiser, config.cfg_scale, prompt.shape[1])
    keys, steps = row_keys(key, row), plan(config, template == denoiser.mask_id)
    per_block, last = config.steps // config.blocks, config.blocks

    def load(place: Int[Array, " s"]) -> State:
        at = jnp.minimum(place, rows - 1)
        return begin(config, template[at], denoiser.mask_id)

    def block(slots: _Slots) -> _Slots:
        at = jnp.minimum(slots.row, rows - 1)
        asked, valid = pin((prompt[at], prompt_valid[at]))
        walk = Walk(denoiser, asked, valid, keys[at], config, False, True)
        busy = slots.row < rows

        def step(state: State, inside: Int[Array, ""]) -> tuple[State, None]:
            number = slots.block * per_block + inside
            one = Step(
                number,
                steps.start[number],
                steps.stop[number],
                steps.progress[number],
                jnp.where(busy, steps.reveals[number, at], 0),
                steps.remain[number, at],
            )

            def act(state: State) -> State:
                return walk.reveal(state, one, *walk.read(state.tokens, one.start, 1))[0]

            return jax.lax.cond(jnp.any(one.reveals > 0), act, lambda s: s, state), None

        state, _ = jax.lax.scan(step, slots.state, jnp.arange(per_block, dtype=jnp.int32))
        after = slots.block + 1
        ended = walk.ended(state.tokens, after * config.block_length)
        leaves = busy & (ended | (after == last))
        place = jnp.where(leaves, slots.row, rows)  # outside: dropped
        done = jax.tree.map(lambda x, new: x.at[place].set(new, mode="drop"), slots.done, state)
        rank = slots.following + jnp.cumsum(leaves, dtype=jnp.int32) - 1
        row = jnp.where(leaves, jnp.minimum(rank, rows), slots.row)
        fresh = load(row)

        def choose(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(leaves.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return _Slots(
            row,
            jnp.where(leaves | ~busy, 0, after),
            pin(jax.tree.map(choose, fresh, state)),
            slots.following + jnp.sum(leaves, dtype=jnp.int32),
            done,
            slots.turn + 1,
        )

    first = jnp.arange(slots, dtype=jnp.int32)
    empty = begin(config, template, denoiser.mask_id)
    zero = jnp.int32(0)
    start = _Slots(first, jnp.zeros_like(first), load(first), jnp.int32(slots), empty, zero)
    # Row k begins in turn k // slots * blocks at the latest, so this many always suffice.
    most = -(-rows // slots) * config.blocks

    def left(state: _Slots) -> Bool[Array, ""]:
        return jnp.any(state.row < rows) & (state.turn < most)

    end = jax.lax.while_loop(left, block, start)
    return rollout_of(denoiser, (prompt, prompt_valid, row, group), end.done, stop_at_eos=True)
