"""Other models made of one: guided away from its blind self, cooled, cut to a nucleus."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmrl.types import Denoiser


def guided(denoiser: Denoiser, scale: float, prompt_length: int) -> Denoiser:
    """Classifier-free guidance around `encode` and `window`, combined in float32.

    The head is linear, so combining hidden states combines logits.
    """

    def around(read: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def both(tokens: Int[Array, "b s"], valid: Bool[Array, "b s"], *where: Any) -> jax.Array:
            prompt = jnp.expand_dims(jnp.arange(tokens.shape[1]) < prompt_length, 0)
            blind = jnp.where(prompt, denoiser.mask_id, tokens)
            twice = (jnp.concatenate([tokens, blind]), jnp.concatenate([valid, valid]))
            # A window's start, where each row has its own.
            own = [jnp.concatenate([x, x]) if getattr(x, "ndim", 0) else x for x in where]
            cond, uncond = jnp.split(read(*twice, *own).astype(jnp.float32), 2)
            return uncond + (scale + 1) * (cond - uncond)

        return both

    window = denoiser.window and around(denoiser.window)
    return denoiser._replace(encode=around(denoiser.encode), window=window, score=None)


def tempered(denoiser: Denoiser, temperature: float) -> Denoiser:
    """The model whose distributions are softmax(logits / temperature): what Gumbel noise draws.

    The head is linear, so dividing hidden states divides logits.
    """
    if temperature == 1:
        return denoiser

    def encode(tokens: Int[Array, "b s"], valid: Bool[Array, "b s"], *last: int) -> jax.Array:
        return denoiser.encode(tokens, valid, *last) / temperature

    return denoiser._replace(encode=encode, window=None, score=None)


def nucleus(
    logits: Float[Array, "*lead v"], top_p: float, temperature: float
) -> Float[Array, "*lead v"]:
    """The logits of the fewest most probable tokens that hold `top_p` together; -inf elsewhere.

    Probabilities at `temperature`, at 1 where that is 0. Tokens that tie with the last one stay.
    """
    if top_p == 1:
        return logits
    ordered = jnp.flip(jnp.sort(logits / (temperature or 1.0), axis=-1), axis=-1)
    p = jax.nn.softmax(ordered)
    before = jnp.cumsum(p, axis=-1) - p
    least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits / (temperature or 1.0) >= least, logits, -jnp.inf)
