"""Small networks beside the vocabulary head, each with parameters of its own.

A head reads the policy's hidden states without sending a gradient into them; its parameters are
the collection 'heads' beside 'params' and 'lora', by name.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from dmrl.models.config import Config
from dmrl.types import Denoiser

WIDTH = 256


class LogZ(nn.Module):
    """[N, D] -> [N], float32: a two-layer perceptron, 0 before any training."""

    @nn.compact
    def __call__(self, pooled: Float[Array, "n d"]) -> Float[Array, " n"]:
        precision = jax.lax.Precision.HIGHEST
        x = nn.silu(nn.Dense(WIDTH, precision=precision, name="up")(pooled))
        zeros = nn.initializers.zeros
        return nn.Dense(1, precision=precision, kernel_init=zeros, name="down")(x)[:, 0]


HEADS = {"log_z": LogZ()}
"""`log_z(prompt [N,P], prompt_valid [N,P], template [N,L]) -> [N]`: log of a prompt's normaliser
(TraFL, arXiv 2605.13935)."""


def init(cfg: Config, names: Iterable[str], key: jax.Array) -> dict[str, Any]:
    """Fresh parameters of the heads `names`, float32. A head's depend on (key, its name) alone.

    Raises ValueError for a name that is no head.
    """
    params = {}
    for name in sorted(names):
        if name not in HEADS:
            raise ValueError(f"no head {name!r}; there are {', '.join(sorted(HEADS))}")
        own = jax.random.fold_in(key, sorted(HEADS).index(name))
        params[name] = HEADS[name].init(own, jnp.zeros((1, cfg.d_model)))["params"]
    return params


def bind(params: Mapping[str, Any], denoiser: Denoiser) -> dict[str, Callable[..., Array]]:
    """The functions of the heads in `params`, over the hidden states of `denoiser`."""

    def of_prompt(module: nn.Module, own: Any) -> Callable[..., Array]:
        def head(
            prompt: Int[Array, "n p"], prompt_valid: Bool[Array, "n p"], template: Int[Array, "n l"]
        ) -> Float[Array, " n"]:
            tokens = jnp.concatenate([prompt, template], axis=1)
            valid = jnp.concatenate([prompt_valid, jnp.ones(template.shape, bool)], axis=1)
            hidden = jax.lax.stop_gradient(denoiser.encode(tokens, valid)).astype(jnp.float32)
            total = jnp.sum(jnp.where(valid[:, :, None], hidden, 0.0), axis=1)
            pooled = total / jnp.sum(valid, axis=1, keepdims=True)
            return jnp.asarray(module.apply({"params": own}, pooled))

        return head

    return {name: of_prompt(HEADS[name], own) for name, own in params.items()}
