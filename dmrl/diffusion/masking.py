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

    Keyed by (key, row) alone: whoever asks with the same key sees the same mask.
    """
    if probability == 0:
        return prompt
    draw = jax.vmap(lambda k: jax.random.bernoulli(k, probability, prompt.shape[1:]))
    return jnp.where(draw(row_keys(key, row)), mask_id, prompt)


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
    ((round(linspace(k, k + (m - 1) n / m, m)) - 1) mod n) + 1. Each count alone is U{1..n}.
    """
    first = uniform_count(keys, total).astype(jnp.float32)
    spread = jnp.arange(samples, dtype=jnp.float32)[None] * (total / samples)[:, None]
    n = jnp.maximum(total, 1)[:, None]
    counts = jnp.mod(jnp.round(first[:, None] + spread).astype(jnp.int32) - 1, n) + 1
    return jnp.minimum(counts, total[:, None])


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


def upto_eos(tokens: Int[Array, "*b l"], eos_id: int) -> Bool[Array, "*b l"]:
    """True up to and including the first EOS of a row; everywhere if it has none."""
    is_eos = tokens == eos_id
    return jnp.cumsum(is_eos, axis=-1) - is_eos == 0
