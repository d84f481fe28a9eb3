"""The reverse process of LLaDA (arXiv 2502.09992): semi-autoregressive blocks in one scan.

A pure function of (denoiser, prompt, template, key). Noise is keyed by row and step, so a row's
result does not depend on the batch it is sampled in. What happens at a step is composed of
rules, each a small object of its own file: `schedule` (how many), `order` (which), `remask`
(what is taken back); the token rule is a temperature, a nucleus and guidance.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dmrl.diffusion import order, schedule, stored
from dmrl.diffusion.guidance import guided, nucleus
from dmrl.diffusion.likelihood import POSITIONS, over_positions
from dmrl.diffusion.masking import upto_eos
from dmrl.diffusion.noise import fold_in, perturb, row_keys
from dmrl.diffusion.remask import Rcr, Turn
from dmrl.diffusion.sampling import Sampling
from dmrl.types import TEMPLATE, Denoiser, PRNGKey, Rollout, RowKeys


def sample(
    denoiser: Denoiser,
    prompt: Int[Array, "b p"],
    prompt_valid: Bool[Array, "b p"],
    template: Int[Array, "b l"],
    row: Int[Array, " b"],
    group: Int[Array, " b"],
    key: PRNGKey,
    config: Sampling,
    drafts: bool = False,
    group_size: int = 1,
    stop_at_eos: bool = False,
) -> Rollout:
    """Fills every masked position of `template`; the others stay as they are.

    Only the current block passes through the vocabulary head and the last layer's queries and
    MLP: nothing else can be revealed, so this is exact. (Remasking across blocks and blocks of
    different sizes read the whole completion.) A step at which no row has a token to reveal costs
    nothing. With an adaptive schedule all rows work on one block, each row counts its own steps,
    and a row that has finished the block waits.

    `group_size` > 1 promises that rows come in runs of that many with one prompt and template:
    before the first step their states are the same, so one of them passes through the model.

    `drafts` also keeps the full prediction of every step (`Rollout.drafts`), for which all
    positions pass through the head, at every step that has a mask left somewhere; tokens and
    reveal steps are the same with and without.

    `stop_at_eos` fills no block after the one with a row's first EOS: what is left becomes EOS
    with `reveal_step` T, and everything up to that EOS is the same with and without. Once all rows
    have ended, steps cost nothing.

    Raises:
      ValueError: `template` is not `config.length` long, `group_size` does not divide the rows,
        or two things are asked for that exclude each other.
    """
    if template.shape[1] != config.length:
        raise ValueError(f"template is {template.shape[1]} long, config.length={config.length}")
    if template.shape[0] % group_size:
        raise ValueError(f"group_size={group_size} does not divide the {template.shape[0]} rows")
    _check(denoiser, config, drafts, stop_at_eos)
    if config.cfg_scale:
        denoiser = guided(denoiser, config.cfg_scale, prompt.shape[1])
    walk = _Walk(denoiser, prompt, prompt_valid, row_keys(key, row), config, drafts, stop_at_eos)
    state, kept = _scan(walk, template, group_size)
    tokens = state.tokens
    if stop_at_eos:
        tokens = jnp.where(tokens == denoiser.mask_id, denoiser.eos_id, tokens)
    return Rollout(
        prompt=prompt,
        prompt_valid=prompt_valid,
        tokens=tokens,
        reveal_step=state.reveal_step,
        log_prob=state.log_prob,
        entropy=state.entropy,
        row=row,
        group=group,
        length=jnp.sum(upto_eos(tokens, denoiser.eos_id), axis=1),
        states=_with_last(kept.before, state.tokens),
        drafts=None if kept.draft is None else jnp.moveaxis(kept.draft, 0, 1),
        order_log_prob=state.order_log_prob,
    )


def _check(denoiser: Denoiser, config: Sampling, drafts: bool, stop_at_eos: bool) -> None:
    if config.approximate and (drafts or denoiser.cached is None):
        raise ValueError(
            f"cache={config.cache!r} reads the open block alone, "
            + ("but drafts need every position" if drafts else "and this model has no cache")
        )
    if config.learned and (drafts or denoiser.order is None):
        raise ValueError(
            f"order={config.order!r} "
            + ("keeps no drafts" if drafts else "is learned, but this model came without one")
        )
    if config.adaptive and drafts:
        raise ValueError(
            f"drafts are kept step by step, but with schedule={config.schedule!r} every row has "
            "steps of its own: choose a fixed schedule"
        )
    if stop_at_eos and config.remasks:
        raise ValueError(f"remask={config.remask!r} may take an EOS back: do not stop at it")


class _State(NamedTuple):
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


class _Kept(NamedTuple):
    """What a step leaves behind."""

    draft: Any = None
    before: Any = None


class _Step(NamedTuple):
    """What is known of a step beforehand; with an adaptive schedule only its number."""

    number: Int[Array, "*n"]
    start: Int[Array, "*n"]
    stop: Int[Array, "*n"]
    progress: Float[Array, "*n"]
    reveals: Int[Array, "*n b"]
    remain: Int[Array, "*n b"]


def _plan(config: Sampling, masked: Bool[Array, "b l"]) -> _Step:
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
    return _Step(number, jnp.asarray(start), jnp.asarray(stop), done, count.T, remain.T)


def _scan(walk: "_Walk", template: jax.Array, group_size: int) -> tuple[_State, _Kept]:
    """All steps, in runs of which the first reads everything and the others its cache."""
    config, rows = walk.config, template.shape[0]
    zeros = jnp.zeros(template.shape, jnp.float32)
    masked = template == walk.denoiser.mask_id
    never = jnp.where(masked, config.steps, TEMPLATE).astype(jnp.int32)
    clock = jnp.zeros((rows,), jnp.int32)
    never_sure, laws = jnp.full_like(zeros, jnp.inf), zeros if config.learned else None
    state = _State(template, never, zeros, zeros, never_sure, clock, laws)
    plan, every = _plan(config, masked), config.cache_rule.every
    runs = jax.tree.map(lambda x: x.reshape(-1, every, *x.shape[1:]), plan)
    first = None
    if group_size > 1 and every == 1:
        state, first = walk.run(state, jax.tree.map(lambda x: x[0], runs), group_size)
        runs = jax.tree.map(lambda x: x[1:], runs)
    state, kept = jax.lax.scan(walk.run, state, runs)
    if first is not None:
        kept = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, kept)
    return state, kept


def _with_last(before: Any, tokens: Int[Array, "b l"]) -> Any:
    if before is None:
        return None
    return jnp.concatenate([jnp.moveaxis(before, 0, 1), tokens[:, None]], axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class _Walk:
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

    def run(self, state: _State, steps: _Step, alike: int = 1) -> tuple[_State, _Kept]:
        """Consecutive steps of one block, [n]; nothing where no row has a token to reveal."""
        config = self.config
        kept = _Kept(
            state.tokens if self.drafts else None, state.tokens if config.remasks else None
        )
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

    def opened(self, state: _State, steps: _Step) -> _Step:
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

    def narrowed(self, state: _State, step: _Step) -> _Step:
        """An adaptive step without the rows that have finished its block."""
        if not self.config.adaptive:
            return step
        masked = self.cut(state.tokens, step.start) == self.denoiser.mask_id
        left = jnp.sum(masked, axis=-1)
        if self.stop_at_eos:
            left = jnp.where(self.ended(state.tokens, step.start), 0, left)
        progress = 1 - jnp.sum(masked, axis=-1) / self.config.block_length
        return step._replace(reveals=jnp.minimum(step.reveals, left), progress=progress)

    def ended(self, tokens: Int[Array, "b l"], start: Int[Array, ""]) -> Bool[Array, " b"]:
        """Rows with an EOS before the block."""
        before = jnp.expand_dims(jnp.arange(self.config.length) < start, 0)
        return jnp.any((tokens == self.denoiser.eos_id) & before, axis=1)

    def cut(self, x: Array, start: Int[Array, ""]) -> Array:
        """The open positions of [B,L]."""
        if self.width == self.config.length:
            return x
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
            whole = self.denoiser.encode(sequence, seen)[:, length:]
            whole = jnp.repeat(whole, alike, axis=0)
            return whole, self.cut(whole, start), None
        return None, jnp.repeat(block, alike, axis=0), policy

    def prefill(self, tokens: jax.Array, start: jax.Array) -> tuple[jax.Array, Any]:
        """Hidden states of the block, and what later steps need of everything else."""
        assert self.denoiser.cached is not None
        at = self.prompt.shape[1] + start
        return self.denoiser.cached.prefill(self.sequence(tokens), self.valid, at, self.width)

    def reveal(
        self, state: _State, step: _Step, whole: Any, hidden: jax.Array, policy: Any = None
    ) -> tuple[_State, Any]:
        """One step, given what the head reads; with the draft where it is kept."""
        config, mask_id, open_ = self.config, self.denoiser.mask_id, self.cut
        number = state.clock if config.adaptive else jnp.full_like(state.clock, step.number)
        keys = fold_in(self.keys, number)
        proposal, log_prob, entropy, seen, measured = self.predict(keys, hidden)
        position = jnp.arange(config.length, dtype=jnp.int32)[None]
        tokens, before_stop = (
            open_(state.tokens, step.start),
            open_(position < step.stop, step.start),
        )
        masked = (tokens == mask_id) & before_stop
        look = order.Look(
            measured, proposal, masked, step.progress, fold_in(keys, 1), self.denoiser.eos_id
        )
        if policy is not None:
            look = look._replace(law=config.order_rule.law(policy, measured, masked))
        score = config.order_rule.score(look)
        confidence = open_(state.confidence, step.start)
        if config.adaptive:
            trusted = config.schedule_rule.trusts(score, masked, seen, entropy)
            chosen = order.select_top(score, masked, step.reveals)
            chosen |= masked & trusted & (step.reveals > 0)[:, None]
            again = jnp.zeros_like(chosen)
        else:
            sampled = (open_(state.reveal_step, step.start) >= 0) & (tokens != mask_id)
            turn = Turn(
                score, masked, sampled, confidence, step.reveals, step.remain, fold_in(keys, 3)
            )
            chosen, again, changed = config.remask_rule.change(turn)
            # A step that is there for other rows only: alone, the row would not take it.
            due = step.reveals[:, None] > 0
            chosen, again = chosen & due, again & due
            confidence = jnp.where(due, changed, confidence)
        draft = self.draft(keys, whole, state.tokens, proposal, step.start)
        news = (
            jnp.where(again, mask_id, proposal),
            jnp.where(again, config.steps, number[:, None]),
            log_prob,
            entropy,
        )
        tokens, reveal_step, log_prob, entropy = (
            self.put(old, jnp.where(chosen | again, new, open_(old, step.start)), step.start)
            for old, new in zip(state[:4], news, strict=True)
        )
        confidence = self.put(state.confidence, confidence, step.start)
        clock, laws = state.clock + (step.reveals > 0), state.order_log_prob
        if laws is not None and look.law is not None:
            laws = self.put(laws, jnp.where(chosen, look.law, open_(laws, step.start)), step.start)
        return _State(tokens, reveal_step, log_prob, entropy, confidence, clock, laws), draft

    def put(self, x: Array, new: Array, start: Int[Array, ""]) -> Array:
        """The open positions of [B,L] replaced."""
        if self.width == self.config.length:
            return new
        return jax.lax.dynamic_update_slice_in_dim(x, new, start, axis=1)

    def predict(self, keys: RowKeys, hidden: Float[Array, "b w d"]) -> tuple[Any, ...]:
        """Of every open position: the proposed token, its log-probability and the entropy at
        temperature 1, its log-probability within the nucleus, what the order measures.

        A few positions at a time: whole vocabulary rows are large.
        """

        def some(keys, hidden):
            logits = self.denoiser.logits(hidden)
            kept = nucleus(logits, self.config.top_p, self.config.temperature)
            proposal = jnp.argmax(perturb(keys, kept, self.config.temperature), axis=-1)
            proposal = proposal.astype(jnp.int32)
            log_p = jax.nn.log_softmax(logits)
            inside = log_p if kept is logits else jax.nn.log_softmax(kept)
            own, seen = (
                jnp.take_along_axis(x, proposal[..., None], axis=-1)[..., 0]
                for x in (log_p, inside)
            )
            measured = self.config.order_rule.measure(inside, seen)
            return proposal, own, order.entropy_of(log_p), seen, measured

        if self.width <= POSITIONS:
            return some(keys, hidden)
        own = fold_in(keys, 4)  # a chunk's number alone would be one of the step's other keys
        return over_positions(lambda i, part: some(fold_in(own, i), part), hidden, axis=1)

    def draft(self, keys, whole, tokens, proposal, start) -> Any:
        """A token for every mask: the proposals, and draws of their own where none is open."""
        if not self.drafts:
            return None
        drawn = proposal
        if self.width < self.config.length:

            def draw(chunk, hidden):
                logits = self.denoiser.logits(hidden)
                kept = nucleus(logits, self.config.top_p, self.config.temperature)
                noise = fold_in(fold_in(keys, 2), chunk)
                return jnp.argmax(perturb(noise, kept, self.config.temperature), axis=-1)

            drawn = over_positions(draw, whole).astype(tokens.dtype)
            drawn = jax.lax.dynamic_update_slice_in_dim(drawn, proposal, start, axis=1)
        return jnp.where(tokens == self.denoiser.mask_id, drawn, tokens)


__all__ = ["Sampling", "sample"]
