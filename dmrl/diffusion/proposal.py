"""What the model proposes at the open positions: the token rule, read off vocabulary rows."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dmrl.diffusion.guidance import nucleus
from dmrl.diffusion.likelihood import POSITIONS, over_positions
from dmrl.diffusion.noise import categorical, fold_in
from dmrl.diffusion.order import entropy_of
from dmrl.diffusion.sampling import Sampling
from dmrl.types import Denoiser, RowKeys


class Proposal(NamedTuple):
    """Of every open position."""

    token: Int[Array, "b w"]
    log_prob: Float[Array, "b w"]
    """Of the token, at temperature 1."""
    entropy: Float[Array, "b w"]
    """Of the distribution at temperature 1, in nats."""
    inside: Float[Array, "b w"]
    """Log-probability of the token within the nucleus."""
    measured: Any
    """What the order measures."""


def draw(
    keys: RowKeys, logits: Float[Array, "b w v"], config: Sampling
) -> tuple[Int[Array, "b w"], Float[Array, "b w v"]]:
    """A token at every position, by temperature and nucleus; the logits that the nucleus keeps."""
    kept = nucleus(logits, config.top_p, config.temperature)
    return categorical(keys, kept, config.temperature), kept


def propose(
    denoiser: Denoiser, config: Sampling, keys: RowKeys, hidden: Float[Array, "b w d"]
) -> Proposal:
    """Reads the vocabulary rows of all open positions, a few at a time: they are large."""

    def some(keys: RowKeys, hidden: jax.Array) -> Proposal:
        logits = denoiser.logits(hidden)
        token, kept = draw(keys, logits, config)
        log_p = jax.nn.log_softmax(logits)
        allowed = log_p if kept is logits else jax.nn.log_softmax(kept)
        own, inside = (
            jnp.take_along_axis(x, token[..., None], axis=-1)[..., 0] for x in (log_p, allowed)
        )
        measured = config.order_rule.measure(allowed, inside)
        return Proposal(token, own, entropy_of(log_p), inside, measured)

    if hidden.shape[1] <= POSITIONS:
        return some(keys, hidden)
    own = fold_in(keys, 4)  # a chunk's number alone would be one of the step's other keys
    found: Proposal = over_positions(lambda i, part: some(fold_in(own, i), part), hidden, axis=1)
    return found
