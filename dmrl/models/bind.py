"""Parameters -> `Denoiser`: the only door between Flax and the rest of the house."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dmrl.models import heads, llada, logprob, unmasking
from dmrl.models.config import Config
from dmrl.types import Cached, Denoiser


@functools.partial(jax.jit, static_argnames=("cfg", "method", "width"))
def _run(
    cfg: Config,
    method: str,
    network: Any,
    *args: Any,
    start: jax.Array | None = None,
    width: int | None = None,
) -> Any:
    """A method of the network; of a window if there is a width, of the end if it has no start.

    Jitted inside of what is jitted, so that a program traces it once for all forwards of a shape.
    """
    where: Any = width if start is None else (start, width)
    args = args if width is None else (*args, where)
    return llada.LLaDA(cfg).apply(network, *args, method=method)


def bind(cfg: Config, variables: Mapping[str, Any], keep_mask: bool = False) -> Denoiser:
    """Closes a LLaDA's functions over `variables`: 'params', maybe 'lora', 'heads' and 'order'.

    The mask token is never a prediction: its logit is -inf and it leaves every normaliser,
    unless `keep_mask` (parity with code that keeps it).
    """
    network = {name: tree for name, tree in variables.items() if name in ("params", "lora")}
    head = variables["params"]["head"]
    dropped = None if keep_mask else cfg.mask_token_id

    def encode(
        tokens: Int[Array, "b s"], valid: Bool[Array, "b s"], last: int | None = None
    ) -> Float[Array, "b w d"]:
        method = "__call__" if last is None else "tail"
        return jnp.asarray(_run(cfg, method, network, tokens, valid, width=last))

    def window(
        tokens: Int[Array, "b s"], valid: Bool[Array, "b s"], start: Int[Array, "*b"], width: int
    ) -> Float[Array, "b w d"]:
        return jnp.asarray(_run(cfg, "window", network, tokens, valid, start=start, width=width))

    def prefill(
        tokens: Int[Array, "b s"], valid: Bool[Array, "b s"], start: Int[Array, ""], width: int
    ) -> Any:
        return _run(cfg, "prefill", network, tokens, valid, start=start, width=width)

    def extend(
        tokens: Int[Array, "b s"],
        valid: Bool[Array, "b s"],
        store: Any,
        start: Int[Array, ""] | int,
        width: int,
    ) -> Float[Array, "b w d"]:
        args = (network, tokens, valid, store)
        return jnp.asarray(_run(cfg, "extend", *args, start=jnp.int32(start), width=width))

    def order(
        tokens: Int[Array, "b s"], valid: Bool[Array, "b s"], start: Int[Array, ""], width: int
    ) -> tuple[Float[Array, "b w d"], Callable[[Array], Array]]:
        stream = _run(cfg, "trunk", network, tokens, valid)
        hidden = _run(cfg, "finish", network, stream, valid, start=start, width=width)
        read = checkpoint_name(jax.lax.stop_gradient(stream), "order_input")

        def score(features: Float[Array, "b w f"]) -> Float[Array, "b w"]:
            own = {"params": variables["order"]}
            policy = unmasking.network(cfg)
            return jnp.asarray(policy.apply(own, read, valid, features, start))

        return jnp.asarray(hidden), score

    def logits(hidden: Float[Array, "*lead d"]) -> Float[Array, "*lead v"]:
        return logprob.logits(hidden, head, dropped)

    def log_prob(
        hidden: Float[Array, "*lead d"],
        labels: Int[Array, "*lead z"],
        needed: Bool[Array, "*lead"] | None = None,
    ) -> Float[Array, "*lead z"]:
        return logprob.log_prob(hidden, head, labels, dropped, needed)

    ids = (cfg.mask_token_id, cfg.eos_token_id)
    learned = order if "order" in variables else None
    denoiser = Denoiser(
        encode,
        logits,
        log_prob,
        *ids,
        window=window,
        order=learned,
        cached=Cached(prefill, extend),
    )
    return denoiser._replace(heads=heads.bind(variables.get("heads", {}), denoiser))
