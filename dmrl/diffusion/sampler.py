"""The reverse process of LLaDA (arXiv 2502.09992): semi-autoregressive blocks in one scan.

A pure function of (denoiser, prompt, template, key). Noise is keyed by row and step, so a row's
result does not depend on the batch it is sampled in. What happens at a step is composed of
rules, each a small object of its own file: `schedule` (how many), `order` (which), `remask`
(what is taken back); the token rule is a temperature, a nucleus and guidance.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dmrl.diffusion.guidance import guided
from dmrl.diffusion.masking import upto_eos
from dmrl.diffusion.noise import row_keys
from dmrl.diffusion.plan import plan
from dmrl.diffusion.sampling import Sampling
from dmrl.diffusion.walk import Kept, State, Walk, begin
from dmrl.types import Denoiser, PRNGKey, Rollout


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
    walk = Walk(denoiser, prompt, prompt_valid, row_keys(key, row), config, drafts, stop_at_eos)
    state, kept = _scan(walk, template, group_size)
    context = (prompt, prompt_valid, row, group)
    return rollout_of(denoiser, context, state, stop_at_eos)._replace(
        states=_with_last(kept.before, state.tokens),
        drafts=None if kept.draft is None else jnp.moveaxis(kept.draft, 0, 1),
    )


def rollout_of(
    denoiser: Denoiser, context: tuple[Array, ...], state: State, stop_at_eos: bool
) -> Rollout:
    """The rollout whose last state this is; `context` is (prompt, prompt_valid, row, group)."""
    prompt, prompt_valid, row, group = context
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


def _scan(walk: Walk, template: jax.Array, group_size: int) -> tuple[State, Kept]:
    """All steps, in runs of which the first reads everything and the others its cache."""
    config, masked = walk.config, template == walk.denoiser.mask_id
    state = begin(config, template, walk.denoiser.mask_id)
    every = config.cache_rule.every
    runs = jax.tree.map(lambda x: x.reshape(-1, every, *x.shape[1:]), plan(config, masked))
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


__all__ = ["Sampling", "sample"]
