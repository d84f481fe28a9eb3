"""The forward process: which tokens a loss hides from the model."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmrl.diffusion.noise import fold_in, row_keys
from dmrl.diffusion.order import select_top
from dmrl.types import PRNGKey, RowKeys


def mask_prompt(
    key: PRNGKey,
    row: Int[Array, " b"],
    prompt: Int[Array, "b p"],
    probability: float,
    mask_id: int,
) -> Int[Array, "b p"]:
    """Each prompt token becomes MASK with `probability` (diffu-GRPO, arXiv 2504.12216).

    Keyed by (key, row) and the distance from the prompt's end alone: whoever asks with the same
    key sees the same mask, however much padding stands before the prompt.
    """
    if probability == 0:
        return prompt
    draw = jax.vmap(lambda k: jax.random.bernoulli(k, probability, prompt.shape[1:]))
    return jnp.where(draw(row_keys(key, row))[:, ::-1], mask_id, prompt)


def mask_prompts(
    key: PRNGKey,
    row: Int[Array, " b"],
    prompt: Int[Array, "b p"],
    probability: float,
    mask_id: int,
    samples: int,
) -> Int[Array, "b m p"]:
    """`mask_prompt` for each of M maskings of a completion, independently.

    The first is `mask_prompt` of the same key, hence what the other terms of an objective see.
    """
    first = mask_prompt(key, row, prompt, probability, mask_id)[:, None]
    keys, everywhere = row_keys(key, row), jnp.ones(prompt.shape, bool)
    chance = jnp.full(prompt.shape[:1], probability)
    more = [
        jnp.where(bernoulli(fold_in(keys, m), everywhere, chance)[:, ::-1], mask_id, prompt)[
            :, None
        ]
        for m in range(1, samples)
    ]
    return jnp.concatenate([first, *more], axis=1)


def mask_uniform(
    key: PRNGKey,
    row: Int[Array, " b"],
    tokens: Int[Array, "b l"],
    allowed: Bool[Array, "b l"],
    mask_id: int,
    minimum: float = 1e-3,
) -> tuple[Int[Array, "b l"], Bool[Array, "b l"], Float[Array, " b"]]:
    """LLaDA's forward process: t ~ U(minimum, 1), each allowed token MASK with probability t.

    Returns (noised tokens, which are masked, t). Source: arXiv 2502.09992, eq. 3; `minimum`
    is the 1e-3 of its published training code.
    """
    keys = row_keys(key, row)
    t = jax.vmap(lambda k: jax.random.uniform(k, minval=minimum, maxval=1.0))(keys)
    masked = bernoulli(fold_in(keys, 1), allowed, t)
    return jnp.where(masked, mask_id, tokens), masked, t


def bernoulli(
    keys: RowKeys, allowed: Bool[Array, "b l"], t: Float[Array, " b"]
) -> Bool[Array, "b l"]:
    """Each allowed position with probability t of its row."""
    noise = jax.vmap(lambda k: jax.random.uniform(k, allowed.shape[1:]))(keys)
    return allowed & (noise < t[:, None])


def random_subset(
    keys: RowKeys, allowed: Bool[Array, "b l"], count: Int[Array, " b"]
) -> Bool[Array, "b l"]:
    """A uniformly random subset of `count` allowed positions of each row (all if fewer)."""
    noise = jax.vmap(lambda k: jax.random.uniform(k, allowed.shape[1:]))(keys)
    return select_top(noise, allowed, count)


def random_subsets(
    keys: RowKeys, allowed: Bool[Array, "b l"], samples: int
) -> Bool[Array, "b m l"]:
    """M independent maskings of a row: a `uniform_count` of the allowed positions, at random."""
    total = jnp.sum(allowed, axis=1)

    def one(number: Int[Array, ""]) -> Bool[Array, "b l"]:
        own = fold_in(keys, number)
        return random_subset(fold_in(own, 1), allowed, uniform_count(own, total))

    return jax.vmap(one, out_axes=1)(jnp.arange(samples))


def uniform_count(keys: RowKeys, total: Int[Array, " b"]) -> Int[Array, " b"]:
    """A mask count l ~ U{1..total} for each row; 0 where total is 0.

    With a uniform subset of that size this is the law of masking with t ~ U(0, 1), given that
    something is masked.
    """
    u = jax.vmap(jax.random.uniform)(keys)
    return jnp.minimum((u * total).astype(jnp.int32) + 1, total)


def stratified_counts(keys: RowKeys, total: Int[Array, " b"], samples: int) -> Int[Array, "b m"]:
    """LLaDA's mask counts for `samples` estimates: evenly spread over 1..total from a random one.

    Source: `get_log_likelihood` of the released LLaDA code (arXiv 2502.09992): k ~ U{1..n}, then
    ((round(linspace(k, k + (m - 1) n / m, m)) - 1) mod n) + 1. Here halves are always rounded up,
    so each count alone is U{1..n}; theirs go to the even neighbour, which favours some counts
    where n / m is an odd multiple of 1/2.
    """
    first = uniform_count(keys, total)[:, None]
    n = jnp.maximum(total, 1)[:, None]
    offset = (2 * jnp.arange(samples)[None] * n + samples) // (2 * samples)
    return jnp.minimum((first - 1 + offset) % n + 1, total[:, None])


def complementary(
    keys: RowKeys, allowed: Bool[Array, "b l"]
) -> tuple[Bool[Array, "b l"], Bool[Array, "b l"]]:
    """A random subset S of the allowed positions, l ~ U{1..n-1} of n, and the rest of them.

    Together they predict every allowed position exactly once. A row with one allowed position
    has it in S and an empty rest.
    """
    total = jnp.sum(allowed, axis=1)
    count = uniform_count(keys, jnp.maximum(total - 1, jnp.minimum(total, 1)))
    chosen = random_subset(fold_in(keys, 1), allowed, count)
    return chosen, allowed & ~chosen


def block_random(
    keys: RowKeys,
    counted: Bool[Array, "b l"],
    block_length: int,
    samples: int,
    noise: float = 0.0,
) -> tuple[Bool[Array, "b m l"], Float[Array, "b m l"]]:
    """SPG's block-wise forward process: what a block-by-block sampler could be looking at.

    Each of M maskings picks one of the blocks that have a counted position and hides a uniform
    number >= 1 of its counted positions, drawn at random, all counted positions of later blocks,
    and each counted position of earlier blocks with probability `noise`. The blocks of the M
    maskings are a random order of the row's blocks, repeated if M is more: each alone is uniform.
    Returns (hidden, weight): weight is 0 outside the chosen block and such that, without noise,
    `likelihood.elbo` is unbiased for the bound of a sampler that goes block by block.
    `block_length` must divide L.

    Source: SPG, arXiv 2510.09541, section 3.3. Its code takes a random order of ALL blocks modulo
    the number used, which is not uniform.
    """
    rows, length = counted.shape
    used = jnp.any(counted.reshape(rows, length // block_length, block_length), axis=2)
    score = jax.vmap(lambda k: jax.random.uniform(k, used.shape[1:]))(keys)
    order = jnp.argsort(jnp.where(used, score, jnp.inf), axis=1)
    blocks = jnp.maximum(jnp.sum(used, axis=1, keepdims=True), 1)
    drawn = jnp.take_along_axis(order, jnp.arange(samples)[None] % blocks, axis=1)
    position = jnp.arange(length)[None] // block_length

    def one(number: Int[Array, ""], block: Int[Array, " b"]) -> tuple[jax.Array, jax.Array]:
        own = fold_in(keys, number)
        inside = counted & (position == block[:, None])
        total = jnp.sum(inside, axis=1)
        count = uniform_count(own, total)
        chosen = random_subset(fold_in(own, 1), inside, count)
        before = counted & (position < block[:, None])
        noised = bernoulli(fold_in(own, 2), before, jnp.full(rows, noise))
        weight = blocks * (total / jnp.maximum(count, 1))[:, None]
        return chosen | noised | counted & (position > block[:, None]), chosen * weight

    return jax.vmap(one, in_axes=(0, 1), out_axes=1)(jnp.arange(samples), drawn)


def upto_eos(tokens: Int[Array, "*b l"], eos_id: int) -> Bool[Array, "*b l"]:
    """True up to and including the first EOS of a row; everywhere if it has none."""
    is_eos = tokens == eos_id
    return jnp.cumsum(is_eos, axis=-1) - is_eos == 0
