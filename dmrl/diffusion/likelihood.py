"""Estimates of log pi(completion | prompt) under a masked diffusion model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmrl.types import Denoiser


def state_log_prob(
    denoiser: Denoiser,
    prompt: Int[Array, "n p"],
    prompt_valid: Bool[Array, "n p"],
    state: Int[Array, "n l"],
    labels: Int[Array, "n z l"],
) -> Float[Array, "n z l"]:
    """log p(labels_i | prompt, state) at every position i, float32, one forward for all Z.

    The mean-field estimate that diffu-GRPO (state all masked) and DiSPO (state half-filled)
    share. Meaningful where `state` is masked; elsewhere it is what the model predicts at a
    position whose token it can see.
    """
    tokens = jnp.concatenate([prompt, state], axis=1)
    valid = jnp.concatenate([prompt_valid, jnp.ones(state.shape, bool)], axis=1)
    hidden = denoiser.encode(tokens, valid)[:, prompt.shape[1] :]
    return jnp.moveaxis(denoiser.log_prob(hidden, jnp.moveaxis(labels, 1, -1)), -1, 1)


POSITIONS = 32
"""Positions whose whole vocabulary rows exist at one time: the width of a LLaDA block."""


def over_positions(
    f: Callable[[Int[Array, ""], Float[Array, "n w d"]], Array], hidden: Float[Array, "n l d"]
) -> Array:
    """Maps `f(chunk number, hidden chunk) -> [N, ..., W]` over the length and joins the results.

    For what needs whole vocabulary rows (sampling, entropy): memory is that of POSITIONS rows,
    and the batch axis stays whole, hence sharded.
    """
    length = hidden.shape[1]
    width = next(w for w in range(min(POSITIONS, length), 0, -1) if length % w == 0)
    chunks = jnp.moveaxis(hidden.reshape(hidden.shape[0], -1, width, hidden.shape[2]), 1, 0)
    mapped = jax.lax.map(lambda args: f(*args), (jnp.arange(chunks.shape[0]), chunks))
    joined = jnp.moveaxis(mapped, 0, -2)
    return joined.reshape(*joined.shape[:-2], length)
