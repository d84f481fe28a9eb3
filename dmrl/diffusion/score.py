"""Scores of completions under several maskings that a policy and its reference share.

    s(y | x) = mean over K maskings M of  c/|M| * sum over i in M of log p(y_i | x, y without M)

with c = 1 (per token) or the number of counted tokens (per sequence). Counted are the sampled
tokens up to the first EOS; the template and what follows EOS stay visible and are never scored.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmrl.diffusion.likelihood import masks_log_prob
from dmrl.diffusion.masking import complementary, random_subset, uniform_count, upto_eos
from dmrl.diffusion.noise import fold_in, row_keys
from dmrl.types import Denoiser, PRNGKey, Rollout, RowKeys

LAWS = ("complementary", "independent")
"""`complementary`: pairs of a uniform subset of 1..n-1 tokens and the rest of them: less variance,
never all masked at once. `independent`: each a uniform subset of l ~ U{1..n} tokens, the law of
masking with t ~ U(0,1) given that something is masked; its mean is the ELBO (over n per token)."""
UNITS = ("token", "sequence")


class Masked(NamedTuple):
    """Completions under M maskings each; "*n" are leading axes."""

    prompt: Int[Array, "*n p"]
    prompt_valid: Bool[Array, "*n p"]
    state: Int[Array, "*n m l"]
    labels: Int[Array, "*n l"]
    weight: Float[Array, "*n m l"]
    """c/|M| where a token is masked, else 0."""


def check(masks: int, law: str, unit: str) -> None:
    """Raises ValueError on a way to mask or to score that cannot work."""
    for name, value, choices in (("mask_law", law, LAWS), ("score_unit", unit, UNITS)):
        if value not in choices:
            raise ValueError(f"{name}={value!r}: choose one of {choices}")
    if masks < 1 or (law == "complementary" and masks % 2):
        raise ValueError(
            f"masks={masks}: complementary masks come in pairs, choose 2, 4, ...; "
            "or mask_law='independent' with at least one"
        )


def draw(
    denoiser: Denoiser, rollout: Rollout, key: PRNGKey, masks: int, law: str, unit: str
) -> Masked:
    """Hides sampled tokens of every row `masks` times, keyed by (key, row)."""
    counted = (rollout.reveal_step >= 0) & upto_eos(rollout.tokens, denoiser.eos_id)
    hide = _pairs if law == "complementary" else _subsets
    masked = hide(row_keys(key, rollout.row), counted, masks)
    return Masked(
        prompt=rollout.prompt,
        prompt_valid=rollout.prompt_valid,
        state=jnp.where(masked, denoiser.mask_id, rollout.tokens[:, None]),
        labels=rollout.tokens,
        weight=weights(masked, counted, unit),
    )


def weights(
    masked: Bool[Array, "n m l"], counted: Bool[Array, "n l"], unit: str
) -> Float[Array, "n m l"]:
    """c/|M| of the equation above at masked tokens, 0 elsewhere."""
    share = masked / jnp.maximum(jnp.sum(masked, axis=-1, keepdims=True), 1)
    if unit == "token":
        return share
    return share * jnp.sum(counted, axis=-1)[:, None, None]


def _pairs(keys: RowKeys, counted: Bool[Array, "b l"], masks: int) -> Bool[Array, "b m l"]:
    def pair(number: jax.Array) -> Bool[Array, "2 b l"]:
        chosen, rest = complementary(fold_in(keys, number), counted)
        alone = ~jnp.any(rest, axis=1, keepdims=True)  # one token: an empty mask scores nothing
        return jnp.stack([chosen, jnp.where(alone, chosen, rest)])

    drawn = jax.vmap(pair)(jnp.arange(masks // 2))
    return jnp.moveaxis(drawn.reshape(masks, *counted.shape), 0, 1)


def _subsets(keys: RowKeys, counted: Bool[Array, "b l"], masks: int) -> Bool[Array, "b m l"]:
    def subset(number: jax.Array) -> Bool[Array, "b l"]:
        mask_keys = fold_in(keys, number)
        count = uniform_count(mask_keys, jnp.sum(counted, axis=1))
        return random_subset(fold_in(mask_keys, 1), counted, count)

    return jnp.moveaxis(jax.vmap(subset)(jnp.arange(masks)), 0, 1)


def score(denoiser: Denoiser, masked: Masked) -> Float[Array, "n m"]:
    """The score under each masking, all in one batch of N*M forwards; in nats per `unit`."""
    m = masked.state.shape[1]
    prompt = jnp.broadcast_to(
        masked.prompt[:, None], (masked.prompt.shape[0], m, *masked.prompt.shape[1:])
    )
    used = masked.weight > 0
    log_prob = masks_log_prob(
        denoiser, prompt, masked.prompt_valid, masked.state, masked.labels, used
    )
    return jnp.sum(jnp.where(used, log_prob, 0.0) * masked.weight, axis=-1)


def frozen_score(denoiser: Denoiser, masked: Masked) -> Float[Array, "n m"]:
    """`score`, one masking after the other: a whole batch in the memory of one masking."""

    def one(column: tuple[Int[Array, "n l"], Float[Array, "n l"]]) -> Float[Array, " n"]:
        state, weight = column
        alone = masked._replace(state=state[:, None], weight=weight[:, None])
        return score(denoiser, alone)[:, 0]

    columns = (jnp.moveaxis(masked.state, 1, 0), jnp.moveaxis(masked.weight, 1, 0))
    return jnp.moveaxis(jax.lax.map(one, columns), 0, 1)


def by_group(tree: Any, size: int) -> Any:
    """[B, ...] -> [B / size, size, ...]: contiguous rows are the completions of a prompt.

    Raises ValueError where `size` does not divide B.
    """

    def cut(x: jax.Array) -> jax.Array:
        if x.shape[0] % size:
            raise ValueError(f"group_size={size} does not divide the {x.shape[0]} completions")
        return x.reshape(x.shape[0] // size, size, *x.shape[1:])

    return jax.tree.map(cut, tree)


def by_row(tree: Any) -> Any:
    """The inverse: [N, size, ...] -> [N * size, ...]."""
    # Written out: -1 cannot be inferred where an axis, an absent prompt, has length 0.
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree)


def one_prompt(group: Int[Array, "n g"]) -> Float[Array, " n"]:
    """1 for every item whose rows share a prompt, NaN for others.

    A factor of the weights: whether `group_size` fits the rollout is known on the device only, and
    comparing completions of different prompts must end a run, not spoil it.
    """
    return jnp.where(jnp.all(group == group[:, :1], axis=1), 1.0, jnp.nan)
