"""Adding a LoRA adapter to the weights it was trained on (arXiv 2106.09685)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dmrl.models.config import Config
from dmrl.models.weights import Read


def merge(variables: Mapping[str, Any], cfg: Config) -> dict[str, Any]:
    """{'params', 'lora'} -> parameters of the same model without an adapter."""
    params = traverse_util.flatten_dict(variables["params"], sep="/")
    lora = traverse_util.flatten_dict(variables["lora"], sep="/")
    for path in lora:
        module, _, side = path.rpartition("/")
        if side == "a":
            kernel = f"{module}/kernel"
            params[kernel] = _add(params[kernel], lora[path], lora[f"{module}/b"], cfg)
    return traverse_util.unflatten_dict(params, sep="/")


def read_merged(read: Read, read_lora: Read, cfg: Config) -> Read:
    """`merge` tensor by tensor: a reader of the base weights with the adapter added."""

    def merged(path: str, layer: int | None) -> np.ndarray:
        values = read(path, layer)
        module, _, kind = path.rpartition("/")
        if kind != "kernel":
            return values
        a, b = read_lora(f"{module}/a", layer), read_lora(f"{module}/b", layer)
        return np.asarray(_add(values, a, b, cfg))

    return merged


def _add(kernel: Any, a: Any, b: Any, cfg: Config) -> jax.Array:
    """W + (alpha/r) A B in float32, cast back; a layer axis may lead."""
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    update = cfg.lora_alpha / cfg.lora_rank * jnp.matmul(a, b, precision="highest")
    return (jnp.asarray(kernel, jnp.float32) + update).astype(kernel.dtype)
