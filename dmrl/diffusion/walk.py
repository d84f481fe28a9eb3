"""One walk of the reverse process: the state, and what a step does to it.

A step reads the open positions, lets the token rule propose, the order rule score and the remask
rule choose, and writes what they decided. All rows of a batch are at the same block or, with
refill, each at its own.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmrl.diffusion import order, stored
from dmrl.diffusion.likelihood import over_positions
from dmrl.diffusion.noise import fold_in
from dmrl.diffusion.plan import Step
from dmrl.diffusion.proposal import Proposal, draw, propose
from dmrl.diffusion.remask import Rcr, Turn
from dmrl.diffusion.sampling import Sampling
from dmrl.types import TEMPLATE, Denoiser, RowKeys


class State(NamedTuple):
    """What a step changes."""

    tokens: Int[Array, "b l"]
    reveal_step: Int[Array, "b l"]
    log_prob: Float[Array, "b l"]
    entropy: Float[Array, "b l"]
    confidence: Float[Array, "b l"]
    """Of `remask.Turn`."""
    clock: Int[Array, " b"]
    """Steps of the row so far, with an adaptive schedule."""
    order_log_prob: Float[Array, "b l"] | None
    """With a learned order."""


def begin(config: Sampling, template: Int[Array, "b l"], mask_id: int) -> State:
    """Before the first step."""
    zeros = jnp.zeros(template.shape, jnp.float32)
    never = jnp.where(template == mask_id, config.steps, TEMPLATE).astype(jnp.int32)
    clock = jnp.zeros((template.shape[0],), jnp.int32)
    sure, laws = jnp.full_like(zeros, jnp.inf), zeros if config.learned else None
    return State(template, never, zeros, zeros, sure, clock, laws)


class Kept(NamedTuple):
    """What a step leaves behind."""

    draft: Any = None
    before: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Walk:
    """One call of `sample`: what is the same at every step."""

    denoiser: Denoiser
    prompt: Int[Array, "b p"]
    prompt_valid: Bool[Array, "b p"]
    keys: RowKeys
    config: Sampling
    drafts: bool
    stop_at_eos: bool

    @functools.cached_property
    def width(self) -> int:
        """Positions that are open at a step: a block, or all of them."""
        blocks, across = self.config.layout, isinstance(self.config.remask_rule, Rcr)
        return self.config.length if across or len({b.size for b in blocks}) > 1 else blocks[0].size

    def run(self, state: State, steps: Step, alike: int = 1) -> tuple[State, Kept]:
        """Consecutive steps of one block, [n]; nothing where no row has a token to reveal."""
        config = self.config
        kept = Kept(state.tokens if self.drafts else None, state.tokens if config.remasks else None)
        steps = self.opened(state, steps)
        due = jnp.any(steps.reveals > 0)
        if self.drafts:  # a template may leave a step without a reveal and later blocks masked
            due |= jnp.any(state.tokens == self.denoiser.mask_id)

        def act(state):
            first = jax.tree.map(lambda x: x[0], steps)
            if config.cache_rule.every == 1:
                state, draft = self.reveal(
                    state, first, *self.read(state.tokens, first.start, alike)
                )
                return state, kept._replace(draft=draft)
            hidden, store = self.prefill(state.tokens, first.start)
            state, _ = self.reveal(state, first, None, hidden)

            def again(state, step):
                step = self.narrowed(state, step)

                def extend(state):
                    tokens = self.sequence(state.tokens)
                    args = (self.denoiser, config, tokens, self.valid, store, step.start)
                    return self.reveal(state, step, None, stored.block(*args))[0]

                return jax.lax.cond(jnp.any(step.reveals > 0), extend, lambda s: s, state), None

            return jax.lax.scan(again, state, jax.tree.map(lambda x: x[1:], steps))[0], kept

        return jax.lax.cond(due, act, lambda state: (state, kept), state)

    def opened(self, state: State, steps: Step) -> Step:
        """The steps with their block, where the state decides, and no count for rows at rest."""
        if not self.config.adaptive:
            if self.stop_at_eos:
                still = ~self.ended(state.tokens, steps.start[0])
                steps = steps._replace(reveals=jnp.where(still[None], steps.reveals, 0))
            return steps
        masked, width = state.tokens == self.denoiser.mask_id, self.config.block_length
        open_ = jnp.any(masked.reshape(masked.shape[0], -1, width), axis=-1)
        if self.stop_at_eos:
            edges = jnp.arange(self.config.blocks) * width
            ended = jax.vmap(lambda edge: self.ended(state.tokens, edge), out_axes=1)(edges)
            open_ &= ~ended
        start = (jnp.argmax(jnp.any(open_, axis=0)) * width).astype(jnp.int32)
        count = jnp.where(jnp.any(open_, axis=0)[start // width], steps.reveals, 0)
        start = jnp.broadcast_to(start, steps.start.shape)
        steps = steps._replace(start=start, stop=start + width, reveals=count)
        return jax.vmap(lambda step: self.narrowed(state, step))(steps)

    def narrowed(self, state: State, step: Step) -> Step:
        """An adaptive step without the rows that have finished its block."""
        if not self.config.adaptive:
            return step
        masked = self.cut(state.tokens, step.start) == self.denoiser.mask_id
        left = jnp.sum(masked, axis=-1)
        if self.stop_at_eos:
            left = jnp.where(self.ended(state.tokens, step.start), 0, left)
        progress = 1 - jnp.sum(masked, axis=-1) / self.config.block_length
        return step._replace(reveals=jnp.minimum(step.reveals, left), progress=progress)

    def ended(self, tokens: Int[Array, "b l"], start: Int[Array, "*b"]) -> Bool[Array, " b"]:
        """Rows with an EOS before the block."""
        return jnp.any((tokens == self.denoiser.eos_id) & self.before(start), axis=1)

    def before(self, stop: Int[Array, "*b"]) -> Bool[Array, "#b l"]:
        """The positions before `stop`."""
        return jnp.expand_dims(jnp.arange(self.config.length), 0) < stop.reshape(-1, 1)

    def cut(self, x: Array, start: Int[Array, "*b"]) -> Array:
        """The open positions of [B,L]."""
        if self.width == self.config.length:
            return x
        if start.ndim:
            return jax.vmap(jax.lax.dynamic_slice_in_dim, (0, 0, None))(x, start, self.width)
        return jax.lax.dynamic_slice_in_dim(x, start, self.width, axis=1)

    @property
    def valid(self) -> Bool[Array, "b s"]:
        """Prompt and completion."""
        rows = self.prompt.shape[0]
        return jnp.concatenate([self.prompt_valid, jnp.ones((rows, self.config.length), bool)], 1)

    def sequence(self, tokens: Int[Array, "b l"]) -> Int[Array, "b s"]:
        """Prompt and completion."""
        return jnp.concatenate([self.prompt, tokens], axis=1)

    def read(self, tokens: jax.Array, start: jax.Array, alike: int) -> tuple[Any, Any, Any]:
        """Hidden states (of the whole completion where drafts need them, of what is open), and
        the policy of a learned order.

        Of every `alike` rows the first is read for all.
        """
        sequence, seen = self.sequence(tokens)[::alike], self.valid[::alike]
        length, policy = self.prompt.shape[1], None
        first = length + (jnp.int32(0) if self.width == self.config.length else start)
        if self.config.learned:
            assert self.denoiser.order is not None
            block, score = self.denoiser.order(sequence, seen, first, self.width)

            def policy(features: jax.Array) -> jax.Array:
                return jnp.repeat(score(features[::alike]), alike, axis=0)

        elif self.denoiser.window and not self.drafts and self.width < sequence.shape[1]:
            block = self.denoiser.window(sequence, seen, first, self.width)
        else:
            whole = self.denoiser.encode(sequence, seen, tokens.shape[1])[:, -tokens.shape[1] :]
            whole = jnp.repeat(whole, alike, axis=0)
            return whole, self.cut(whole, start), None
        return None, jnp.repeat(block, alike, axis=0), policy

    def prefill(self, tokens: jax.Array, start: jax.Array) -> tuple[jax.Array, Any]:
        """Hidden states of the block, and what later steps need of everything else."""
        assert self.denoiser.cached is not None
        at = self.prompt.shape[1] + start
        return self.denoiser.cached.prefill(self.sequence(tokens), self.valid, at, self.width)

    def reveal(
        self, state: State, step: Step, whole: Any, hidden: jax.Array, policy: Any = None
    ) -> tuple[State, Any]:
        """One step, given what the head reads; with the draft where it is kept."""
        config, mask_id, start = self.config, self.denoiser.mask_id, step.start
        number = state.clock if config.adaptive else step.number + jnp.zeros_like(state.clock)
        keys = fold_in(self.keys, number)
        found = propose(self.denoiser, config, keys, hidden)
        masked = self.cut(state.tokens, start) == mask_id
        masked &= self.cut(self.before(step.stop), start)
        args = (found.token, masked, step.progress, fold_in(keys, 1), self.denoiser.eos_id)
        look = order.Look(found.measured, *args)
        if policy is not None:
            look = look._replace(law=config.order_rule.law(policy, found.measured, masked))
        chosen, again, confidence = self.choose(state, step, look, found, keys)
        draft = self.draft(keys, whole, state.tokens, found.token, start)
        news = (
            jnp.where(again, mask_id, found.token),
            jnp.where(again, config.steps, number[:, None]),
            found.log_prob,
            found.entropy,
        )
        tokens, reveal_step, log_prob, entropy = (
            self.put(old, jnp.where(chosen | again, new, self.cut(old, start)), start)
            for old, new in zip(state[:4], news, strict=True)
        )
        clock, laws = state.clock + (step.reveals > 0), state.order_log_prob
        if laws is not None and look.law is not None:
            laws = self.put(laws, jnp.where(chosen, look.law, self.cut(laws, start)), start)
        confidence = self.put(state.confidence, confidence, start)
        return State(tokens, reveal_step, log_prob, entropy, confidence, clock, laws), draft

    def choose(
        self, state: State, step: Step, look: order.Look, found: Proposal, keys: RowKeys
    ) -> tuple[Array, Array, Array]:
        """Open positions that are revealed, those masked again, and `confidence` after."""
        config, masked = self.config, look.masked
        score = config.order_rule.score(look)
        confidence = self.cut(state.confidence, step.start)
        due = step.reveals[:, None] > 0
        if config.adaptive:
            trusted = config.schedule_rule.trusts(score, masked, found.inside, found.entropy)
            chosen = order.select_top(score, masked, step.reveals) | (masked & trusted & due)
            return chosen, jnp.zeros_like(chosen), confidence
        sampled = self.cut(state.reveal_step, step.start) >= 0
        sampled &= self.cut(state.tokens, step.start) != self.denoiser.mask_id
        turn = Turn(score, masked, sampled, confidence, step.reveals, step.remain, fold_in(keys, 3))
        chosen, again, changed = config.remask_rule.change(turn)
        # A step that is there for other rows only: alone, the row would not take it.
        return chosen & due, again & due, jnp.where(due, changed, confidence)

    def put(self, x: Array, new: Array, start: Int[Array, "*b"]) -> Array:
        """The open positions of [B,L] replaced."""
        if self.width == self.config.length:
            return new
        if start.ndim:
            return jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))(x, new, start, 0)
        return jax.lax.dynamic_update_slice_in_dim(x, new, start, axis=1)

    def draft(self, keys, whole, tokens, proposal, start) -> Any:
        """A token for every mask: the proposals, and draws of their own where none is open."""
        if not self.drafts:
            return None
        drawn = proposal
        if self.width < self.config.length:

            def some(chunk, hidden):
                noise = fold_in(fold_in(keys, 2), chunk)
                return draw(noise, self.denoiser.logits(hidden), self.config)[0]

            drawn = over_positions(some, whole).astype(tokens.dtype)
            drawn = jax.lax.dynamic_update_slice_in_dim(drawn, proposal, start, axis=1)
        return jnp.where(tokens == self.denoiser.mask_id, drawn, tokens)
