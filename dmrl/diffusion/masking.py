"""The forward process: which tokens a loss hides from the model."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmrl.diffusion.noise import fold_in, row_keys
from dmrl.types import PRNGKey


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
    noise = jax.vmap(lambda k: jax.random.uniform(k, tokens.shape[1:]))(fold_in(keys, 1))
    masked = allowed & (noise < t[:, None])
    return jnp.where(masked, mask_id, tokens), masked, t


def upto_eos(tokens: Int[Array, "*b l"], eos_id: int) -> Bool[Array, "*b l"]:
    """True up to and including the first EOS of a row; everywhere if it has none."""
    is_eos = tokens == eos_id
    return jnp.cumsum(is_eos, axis=-1) - is_eos == 0
