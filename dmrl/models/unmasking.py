"""The unmasking policy: which position to reveal next, learned beside a frozen denoiser.

Its parameters are the collection 'order', apart from those of the denoiser: a trained order
decodes for every denoiser of the same width. Source: UPO, arXiv 2510.05725, Figure 2.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from dmrl.models.config import Config
from dmrl.models.layers import Block, Linear, RMSNorm, turns
from dmrl.types import FLAGS, TOP

HIDDEN_LAYERS = 3


class Unmasking(nn.Module):
    """A transformer layer, a norm and a three-layer perceptron: a score for every position asked.

    The layer is LLaDA's with weights of its own; every position is a key, those of the window
    alone are queries. The perceptron is as wide as what it reads, D + F (268.7 million parameters
    in all for LLaDA-8B). Scores are float32, whatever the layers compute in.
    """

    cfg: Config

    @nn.compact
    def __call__(
        self,
        stream: Float[Array, "b s d"],
        valid: Bool[Array, "b s"],
        features: Float[Array, "b w f"],
        start: Int[Array, ""],
    ) -> Float[Array, "b w"]:
        cfg, (rows, width, _) = self.cfg, features.shape
        x = stream.reshape(-1, cfg.d_model).astype(cfg.dtype)
        x, _ = Block(cfg, name="block")(x, valid, turns(cfg, valid), (start, width))
        x = RMSNorm(cfg, name="norm")(x)
        x = jnp.concatenate([x, features.reshape(rows * width, -1).astype(x.dtype)], axis=-1)
        for i in range(HIDDEN_LAYERS):
            x = Linear(cfg, x.shape[-1], name=f"hidden_{i}")(x)
            x = nn.silu(nn.LayerNorm(dtype=jnp.float32, name=f"norm_{i}")(x)).astype(cfg.dtype)
        return Linear(cfg, 1, name="score")(x.astype(jnp.float32)).reshape(rows, width)


def network(cfg: Config) -> Unmasking:
    """The policy for a denoiser of that shape: trained in float32, without an adapter."""
    return Unmasking(dataclasses.replace(cfg, param_dtype="float32", lora_rank=0, int8=False))


def init(cfg: Config, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters, float32: an order that is nobody's."""
    stream = jnp.zeros((1, 1, cfg.d_model))
    features = jnp.zeros((1, 1, FLAGS + min(TOP, cfg.vocab_size - 1)))
    made = network(cfg).init(key, stream, jnp.ones((1, 1), bool), features, jnp.int32(0))
    return dict(made["params"])
