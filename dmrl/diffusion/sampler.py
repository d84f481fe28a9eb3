"""The reverse process of LLaDA (arXiv 2502.09992): semi-autoregressive blocks in one scan.

A pure function of (denoiser, prompt, template, key). Noise is keyed by row and step, so a row's
result does not depend on the batch it is sampled in.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dmrl.diffusion import order
from dmrl.diffusion.likelihood import over_positions
from dmrl.diffusion.masking import upto_eos
from dmrl.diffusion.noise import fold_in, perturb, row_keys
from dmrl.types import TEMPLATE, Denoiser, PRNGKey, Rollout


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to decode `length` tokens in `steps` denoising steps, block by block."""

    length: int
    steps: int
    block_length: int
    temperature: float = 0.0
    """Gumbel temperature of the proposed tokens; 0 takes the argmax."""
    order: str = "low_confidence"
    cfg_scale: float = 0.0
    """Classifier-free guidance: u + (scale + 1)(c - u), u with the prompt masked."""

    def __post_init__(self) -> None:
        if self.block_length < 1 or self.length % self.block_length:
            raise ValueError(
                f"block_length={self.block_length} does not divide length={self.length}; "
                f"choose one of {_divisors(self.length)}"
            )
        if self.steps < 1 or self.steps % self.blocks or self.steps > self.length:
            valid = [self.blocks * n for n in range(1, self.block_length + 1)]
            raise ValueError(
                f"steps={self.steps} must be a multiple of the {self.blocks} block(s) "
                f"(length={self.length}, block_length={self.block_length}) and at most "
                f"{self.length}; choose one of {_shorten(valid)}"
            )
        if self.order not in order.ORDERS:
            raise ValueError(f"order={self.order!r}: choose one of {', '.join(order.ORDERS)}")
        if self.temperature < 0 or self.cfg_scale < 0:
            raise ValueError(
                f"temperature={self.temperature} and cfg_scale={self.cfg_scale} must be >= 0"
            )

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.length // self.block_length

    def reveals(self, masked: Int[Array, "*b"]) -> Int[Array, "*b steps"]:
        """Tokens to reveal at each step of a block that starts with `masked` masks.

        masked // steps each, the first masked % steps steps one more: LLaDA's schedule, which
        for a partly given block spreads what is left over all of the block's steps.
        """
        steps = self.steps // self.blocks
        base, more = jnp.divmod(masked[..., None], steps)
        return base + (jnp.expand_dims(jnp.arange(steps), range(masked.ndim)) < more)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _shorten(values: list[int]) -> str:
    head = ", ".join(map(str, values[:8]))
    return head if len(values) <= 8 else f"{head}, ... {values[-1]}"


def guided(denoiser: Denoiser, scale: float, prompt_length: int) -> Denoiser:
    """Classifier-free guidance around `encode` and `window`, combined in float32.

    The head is linear, so combining hidden states combines logits.
    """

    def around(read: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def both(tokens: Int[Array, "b s"], valid: Bool[Array, "b s"], *where: Any) -> jax.Array:
            prompt = jnp.expand_dims(jnp.arange(tokens.shape[1]) < prompt_length, 0)
            blind = jnp.where(prompt, denoiser.mask_id, tokens)
            twice = (jnp.concatenate([tokens, blind]), jnp.concatenate([valid, valid]))
            cond, uncond = jnp.split(read(*twice, *where).astype(jnp.float32), 2)
            return uncond + (scale + 1) * (cond - uncond)

        return both

    window = denoiser.window and around(denoiser.window)
    return denoiser._replace(encode=around(denoiser.encode), window=window)


def tempered(denoiser: Denoiser, temperature: float) -> Denoiser:
    """The model whose distributions are softmax(logits / temperature): what Gumbel noise draws.

    The head is linear, so dividing hidden states divides logits.
    """
    if temperature == 1:
        return denoiser

    def encode(tokens: Int[Array, "b s"], valid: Bool[Array, "b s"]) -> jax.Array:
        return denoiser.encode(tokens, valid) / temperature

    return denoiser._replace(encode=encode, window=None)


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
    MLP: nothing else can be revealed, so this is exact. A step at which no row has a token to
    reveal costs nothing.

    `group_size` > 1 promises that rows come in runs of that many with one prompt and template:
    before the first step their states are the same, so one of them passes through the model.

    `drafts` also keeps the full prediction of every step (`Rollout.drafts`), for which all
    positions pass through the head, at every step that has a mask left somewhere; tokens and
    reveal steps are the same with and without.

    `stop_at_eos` fills no block after the one with a row's first EOS: what is left becomes EOS
    with `reveal_step` T, and everything up to that EOS is the same with and without. Once all rows
    have ended, steps cost nothing.

    Raises:
      ValueError: `template` is not `config.length` long, or `group_size` does not divide the rows.
    """
    if template.shape[1] != config.length:
        raise ValueError(f"template is {template.shape[1]} long, config.length={config.length}")
    if template.shape[0] % group_size:
        raise ValueError(f"group_size={group_size} does not divide the {template.shape[0]} rows")
    prompt_length, width = prompt.shape[1], config.block_length
    if config.cfg_scale:
        denoiser = guided(denoiser, config.cfg_scale, prompt_length)
    valid = jnp.concatenate([prompt_valid, jnp.ones(template.shape, bool)], axis=1)
    score_of = order.ORDERS[config.order]
    keys = row_keys(key, row)

    def read(tokens, start, alike):
        """Hidden states (of the whole completion where drafts need them, of the block).

        Of every `alike` rows the first is read for all.
        """
        sequence = jnp.concatenate([prompt, tokens], axis=1)[::alike]
        seen = valid[::alike]
        if denoiser.window and not drafts and width < sequence.shape[1]:
            block = denoiser.window(sequence, seen, prompt_length + start, width)
            return None, jnp.repeat(block, alike, axis=0)
        whole = denoiser.encode(sequence, seen)[:, prompt_length:]
        whole = jnp.repeat(whole, alike, axis=0)
        return whole, jax.lax.dynamic_slice_in_dim(whole, start, width, axis=1)

    def reveal(carry, step, alike=1):
        tokens, reveal_step, log_prob, entropy = carry
        number, start, count = step
        whole, hidden = read(tokens, start, alike)
        logits = denoiser.logits(hidden)
        log_p = jax.nn.log_softmax(logits)
        noise_keys = fold_in(keys, number)
        proposal = jnp.argmax(perturb(noise_keys, logits, config.temperature), axis=-1)
        proposal = proposal.astype(tokens.dtype)
        proposal_log_p = jnp.take_along_axis(log_p, proposal[..., None], axis=-1)[..., 0]
        draft = _draft(whole, tokens, proposal, start, noise_keys) if drafts else None

        def block(x):
            return jax.lax.dynamic_slice_in_dim(x, start, width, axis=1)

        masked = block(tokens) == denoiser.mask_id
        score = score_of(log_p, proposal_log_p, fold_in(noise_keys, 1))
        chosen = order.select_top(score, masked, count)
        news = (proposal, jnp.full_like(proposal, number), proposal_log_p, entropy_of(log_p))
        revealed = tuple(
            jax.lax.dynamic_update_slice_in_dim(
                old, jnp.where(chosen, new, block(old)), start, axis=1
            )
            for old, new in zip((tokens, reveal_step, log_prob, entropy), news, strict=True)
        )
        return revealed, draft

    def ended(tokens, start):
        before = jnp.expand_dims(jnp.arange(config.length) < start, 0)
        return jnp.any((tokens == denoiser.eos_id) & before, axis=1)

    def maybe_reveal(carry, step, alike=1):
        if stop_at_eos:
            number, start, count = step
            step = (number, start, jnp.where(ended(carry[0], start), 0, count))
        due = jnp.any(step[2] > 0)
        if drafts:  # a template may leave a step without a reveal and later blocks masked
            due |= jnp.any(carry[0] == denoiser.mask_id)
        idle = carry[0] if drafts else None
        act = functools.partial(reveal, alike=alike)
        return jax.lax.cond(due, act, lambda c, _: (c, idle), carry, step)

    def _draft(whole, tokens, proposal, start, keys):
        """A token for every mask: the block's proposals, and draws of their own elsewhere."""

        def draw(chunk, hidden):
            noisy = perturb(fold_in(fold_in(keys, 2), chunk), denoiser.logits(hidden), temperature)
            return jnp.argmax(noisy, axis=-1)

        temperature = config.temperature
        drawn = over_positions(draw, whole).astype(tokens.dtype)
        drawn = jax.lax.dynamic_update_slice_in_dim(drawn, proposal, start, axis=1)
        return jnp.where(tokens == denoiser.mask_id, drawn, tokens)

    zeros = jnp.zeros(template.shape, jnp.float32)
    never = jnp.where(template == denoiser.mask_id, config.steps, TEMPLATE)
    carry = (template, never.astype(jnp.int32), zeros, zeros)
    masks = (template == denoiser.mask_id).reshape(template.shape[0], config.blocks, width)
    counts = config.reveals(jnp.sum(masks, axis=-1)).reshape(template.shape[0], config.steps)
    number = jnp.arange(config.steps, dtype=jnp.int32)
    start = number // (config.steps // config.blocks) * width
    schedule: tuple[Any, ...] = (number, start, counts.T)
    first = None
    if group_size > 1:
        carry, first = maybe_reveal(carry, jax.tree.map(lambda x: x[0], schedule), group_size)
        schedule = jax.tree.map(lambda x: x[1:], schedule)
    (tokens, reveal_step, log_prob, entropy), kept = jax.lax.scan(maybe_reveal, carry, schedule)
    if first is not None:
        kept = jnp.concatenate([first[None], kept])
    if stop_at_eos:
        tokens = jnp.where(tokens == denoiser.mask_id, denoiser.eos_id, tokens)
    return Rollout(
        prompt=prompt,
        prompt_valid=prompt_valid,
        tokens=tokens,
        reveal_step=reveal_step,
        log_prob=log_prob,
        entropy=entropy,
        row=row,
        group=group,
        length=jnp.sum(upto_eos(tokens, denoiser.eos_id), axis=1),
        drafts=None if kept is None else jnp.moveaxis(kept, 0, 1),
    )


def entropy_of(log_p: jax.Array) -> jax.Array:
    """Entropy in nats over the last axis; impossible tokens (-inf) add nothing."""
    return -jnp.sum(jnp.where(log_p == -jnp.inf, 0.0, jnp.exp(log_p) * log_p), axis=-1)
