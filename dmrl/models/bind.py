"""Parameters -> `Denoiser`: the only door between Flax and the rest of the house."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmrl.models import heads, llada, logprob
from dmrl.types import Cached, Denoiser


def bind(cfg: llada.Config, variables: Mapping[str, Any], keep_mask: bool = False) -> Denoiser:
    """Closes a LLaDA's functions over `variables`: 'params' and maybe 'lora' and 'heads'.

    The mask token is never a prediction: its logit is -inf and it leaves every normaliser,
    unless `keep_mask` (parity with code that keeps it).
    """
    module = llada.LLaDA(cfg)
    network = {name: tree for name, tree in variables.items() if name != "heads"}
    head = variables["params"]["head"]
    dropped = None if keep_mask else cfg.mask_token_id

    def encode(tokens: Int[Array, "b s"], valid: Bool[Array, "b s"]) -> Float[Array, "b s d"]:
        return jnp.asarray(module.apply(network, tokens, valid))

    def window(
        tokens: Int[Array, "b s"], valid: Bool[Array, "b s"], start: Int[Array, ""], width: int
    ) -> Float[Array, "b w d"]:
        return jnp.asarray(module.apply(network, tokens, valid, (start, width), method="window"))

    def prefill(
        tokens: Int[Array, "b s"], valid: Bool[Array, "b s"], start: Int[Array, ""], width: int
    ) -> Any:
        return module.apply(network, tokens, valid, (start, width), method="prefill")

    def extend(
        tokens: Int[Array, "b s"],
        valid: Bool[Array, "b s"],
        store: Any,
        start: Int[Array, ""] | int,
        width: int,
    ) -> Float[Array, "b w d"]:
        window = (jnp.asarray(start, jnp.int32), width)
        return jnp.asarray(module.apply(network, tokens, valid, store, window, method="extend"))

    def logits(hidden: Float[Array, "*lead d"]) -> Float[Array, "*lead v"]:
        return logprob.logits(hidden, head, dropped)

    def log_prob(
        hidden: Float[Array, "*lead d"], labels: Int[Array, "*lead z"]
    ) -> Float[Array, "*lead z"]:
        return logprob.log_prob(hidden, head, labels, dropped)

    ids = (cfg.mask_token_id, cfg.eos_token_id)
    cached = Cached(prefill, extend)
    denoiser = Denoiser(encode, logits, log_prob, *ids, window=window, cached=cached)
    return denoiser._replace(heads=heads.bind(variables.get("heads", {}), denoiser))
