"""The open block read with stored keys and values (Fast-dLLM, arXiv 2505.22618)."""

from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from dmrl.diffusion.sampling import Sampling
from dmrl.types import Denoiser


def block(
    denoiser: Denoiser,
    config: Sampling,
    tokens: Int[Array, "b s"],
    valid: Bool[Array, "b s"],
    store: Any,
    start: Int[Array, ""],
) -> Float[Array, "b w d"]:
    """Hidden states of the block that begins at `start` of the completion.

    `dual`: its own tokens are read, all others come from the store; `prefix`: so are those after
    it, and the store stands for what is before it.
    """
    cached, width = denoiser.cached, config.block_length
    assert cached is not None
    prompt = tokens.shape[1] - config.length
    if config.cache_rule.kind == "dual":
        return cached.extend(tokens, valid, store, prompt + start, width)

    def rest(edge: int) -> Any:
        length = config.length - edge
        return lambda: cached.extend(tokens, valid, store, prompt + edge, length)[:, :width]

    edges = range(0, config.length, width)
    return jax.lax.switch(start // width, [rest(edge) for edge in edges])
