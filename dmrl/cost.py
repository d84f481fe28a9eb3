"""Analytic parameter counts, memory and FLOPs of a run, before anything is compiled.

Everything here is `predicted`: formulas over shapes, not measurements.
"""

import math
from typing import Any, NamedTuple

GB = 1e9
CHUNK_BYTES = 4096 * 4
"""float32 logits of one row in one vocabulary chunk."""


class Shape(NamedTuple):
    """The numbers that decide the cost of a run."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp_hidden_size: int
    vocab_size: int
    lora_rank: int
    param_bytes: int
    compute_bytes: int
    remat: bool


def shape_of(cfg: Any) -> Shape:
    """From a model config."""
    size = {"float32": 4, "bfloat16": 2, "float16": 2}
    return Shape(
        cfg.d_model,
        cfg.n_layers,
        cfg.n_heads,
        cfg.n_kv_heads,
        cfg.mlp_hidden_size,
        cfg.vocab_size,
        cfg.lora_rank,
        size[cfg.param_dtype],
        size[cfg.dtype],
        cfg.remat != "none",
    )


def linears(s: Shape) -> list[tuple[int, int]]:
    """(in, out) of the seven projections of one layer."""
    kv = s.d_model // s.n_heads * s.n_kv_heads
    d, ff = s.d_model, s.mlp_hidden_size
    return [(d, d), (d, kv), (d, kv), (d, d), (d, ff), (d, ff), (ff, d)]


def body_params(s: Shape) -> int:
    """Weights of all layers and the final norm."""
    layer = sum(i * o for i, o in linears(s)) + 2 * s.d_model
    return s.n_layers * layer + s.d_model


def total_params(s: Shape) -> int:
    """All base weights: body, embedding and untied head."""
    return body_params(s) + 2 * s.vocab_size * s.d_model


def lora_params(s: Shape) -> int:
    """Weights of the adapter on all seven projections."""
    return s.n_layers * s.lora_rank * sum(i + o for i, o in linears(s))


def order_params(s: Shape) -> int:
    """Weights of the unmasking policy: a layer, and three as wide as what they read."""
    width = s.d_model + FEATURES
    layer = sum(i * o for i, o in linears(s)) + 3 * s.d_model
    return layer + 3 * (width * width + 2 * width) + width


FEATURES = 10
"""What the policy reads of a position beside its hidden state, of a vocabulary above 8."""


def trained_params(s: Shape, order: bool) -> int:
    """An order's, an adapter's, or all."""
    return order_params(s) if order else lora_params(s) if s.lora_rank else total_params(s)


def forward_flops(s: Shape, queries: int, keys: int, logit_rows: int) -> float:
    """One sequence: projections, attention scores and values, vocabulary rows."""
    matmuls = 2.0 * s.n_layers * sum(i * o for i, o in linears(s)) * queries
    attention = 4.0 * s.n_layers * s.d_model * queries * keys
    return matmuls + attention + 2.0 * s.d_model * s.vocab_size * logit_rows


class Memory(NamedTuple):
    """Bytes on one device."""

    weights: float
    trained_state: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """Their sum; a peak also holds compiler temporaries, which only compiling shows."""
        return sum(self)


def memory(
    s: Shape,
    sequences: int,
    length: int,
    block: int,
    shards: int,
    full_ft_ref: bool,
    order: bool = False,
) -> Memory:
    """Per device, weights and state over `shards` devices, `sequences` a device at a time.

    Trained weights (the order's alone with `order`) are float32 with gradient and two moments: 16
    bytes each.
    """
    trained = trained_params(s, order)
    frozen = total_params(s) * s.param_bytes if s.lora_rank or full_ft_ref or order else 0
    carry = s.n_layers * s.d_model * s.compute_bytes
    layer = s.compute_bytes * (4 * s.d_model + 3 * s.mlp_hidden_size)
    kept = carry + layer if s.remat else s.n_layers * layer
    rows = sequences * length
    return Memory(
        weights=frozen / shards,
        trained_state=16 * trained / shards,
        activations=rows * kept,
        logits=max(rows * CHUNK_BYTES, sequences * block * s.vocab_size * 4),
    )


def rollout_flops(
    s: Shape, sequences: int, prompt: int, length: int, block: int, steps: int
) -> float:
    """`steps` forwards a sequence, with the head on the current block alone."""
    span = prompt + length
    return sequences * steps * forward_flops(s, span, span, block)


def update_flops(
    s: Shape, sequences: int, prompt: int, length: int, passes: dict[str, int]
) -> float:
    """Forwards without gradient (`forward`) and with (`gradient`), all a sequence.

    A gradient pass costs 3 forwards, 2 under an adapter (frozen weights need no gradient of
    their own), and one more where layers are recomputed.
    """
    span = prompt + length
    backward = (2 if s.lora_rank else 3) + (1 if s.remat else 0)
    one = forward_flops(s, span, span, length)
    return sequences * one * (passes["forward"] + backward * passes["gradient"])


def dry_run(recipe: Any) -> str:
    """The estimate that `--config.dry_run` prints."""
    s, loop, sampling = shape_of(recipe.model), recipe.loop, recipe.sampling
    completions = loop.prompts_per_step * loop.num_generations
    prompt, length = recipe.max_prompt_length, sampling.length
    states = [getattr(t.hyper, "states", 0) for t in recipe.terms]
    beta = [t for t in recipe.terms if getattr(t.hyper, "beta", 0) > 0]
    mu, order = loop.num_iterations, sampling.learned
    gradient = mu * sum(n or 1 for n in states)
    forward = sum(states) + (gradient if mu > 1 else 0)
    forward += mu * sum(getattr(t.hyper, "states", 0) or 1 for t in beta)
    if order:  # the denoiser, again in the backward pass; the policy is a layer in as many
        gradient = 0
        forward = mu * sum(t.hyper.steps * (1 if t.hyper.keep_inputs else 2) for t in recipe.terms)
    rollout = rollout_flops(s, completions, prompt, length, sampling.block_length, sampling.steps)
    update = update_flops(
        s, completions, prompt, length, {"forward": forward, "gradient": gradient}
    )
    mesh = dict(recipe.mesh)
    lines = [
        f"parameters        {total_params(s):,} base, {_trained(s, order)}",
        f"completions       {completions} a step ({loop.prompts_per_step} prompts x "
        f"{loop.num_generations}), {prompt} + {length} tokens",
        f"FLOPs a step      rollout {_tera(rollout)}, update {_tera(update)} (predicted)",
    ]
    for shards in sorted({1, 4, 8, _size(mesh)} - {0}):
        share = math.ceil(completions / loop.microbatches / shards)
        at_once = max(share, math.ceil(completions / loop.rollout_chunks / shards))
        m = memory(s, at_once, prompt + length, sampling.block_length, shards, bool(beta), order)
        lines.append(
            f"memory, {shards} device(s)".ljust(18)
            + f"{m.total / GB:.2f} GB each: weights {m.weights / GB:.2f}, "
            f"trained state {m.trained_state / GB:.2f}, activations {m.activations / GB:.2f}, "
            f"logits {m.logits / GB:.2f} (predicted, fully sharded)"
        )
    named = ", ".join(f"{axis}={size if size != -1 else 'rest'}" for axis, size in mesh.items())
    return "\n".join([*lines, f"mesh              {named}"])


def _trained(s: Shape, order: bool) -> str:
    if order:
        return f"frozen; {order_params(s):,} of the order trained"
    if s.lora_rank:
        return f"{lora_params(s):,} trained (LoRA rank {s.lora_rank})"
    return "all trained"


def _size(mesh: dict[str, int]) -> int:
    return 0 if -1 in mesh.values() else math.prod(mesh.values())


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.3g} TFLOP" if flops >= 1e11 else f"{flops / 1e9:,.3g} GFLOP"
