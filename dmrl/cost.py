"""Analytic parameter counts, memory and FLOPs of a run, before anything is compiled.

Everything here is `predicted`: formulas over shapes, not measurements.
"""

import math
from typing import Any, NamedTuple

GB = 1e9
CHUNK_BYTES = 4096 * 4
"""float32 logits of one row in one vocabulary chunk."""
ORDER_FEATURES = 10
"""What a learned order reads of a position beside the residual stream (`types.FLAGS`, `TOP`)."""


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
    kernel_bytes: int
    """Of a weight of the seven projections, where they are frozen."""


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
        1 if cfg.int8 else size[cfg.param_dtype],
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


def frozen_bytes(s: Shape) -> int:
    """Of all base weights where they are not trained."""
    kernels = s.n_layers * sum(i * o for i, o in linears(s))
    return total_params(s) * s.param_bytes - kernels * (s.param_bytes - s.kernel_bytes)


def lora_params(s: Shape) -> int:
    """Weights of the adapter on all seven projections."""
    return s.n_layers * s.lora_rank * sum(i + o for i, o in linears(s))


def order_params(s: Shape) -> int:
    """Weights of an unmasking policy: a layer, a norm, three more (`models.unmasking`)."""
    wide = s.d_model + ORDER_FEATURES
    layer = sum(i * o for i, o in linears(s)) + 2 * s.d_model
    return layer + s.d_model + 3 * (wide * wide + 2 * wide) + wide


def order_flops(s: Shape, keys: int, queries: int) -> float:
    """One decision of that policy: all positions are keys, those of the block are scored."""
    wide, d = s.d_model + ORDER_FEATURES, s.d_model
    (_, k, v, *_), every = linears(s), sum(i * o for i, o in linears(s))
    stored = k[0] * k[1] + v[0] * v[1]
    scored = every - stored + 3 * wide * wide + wide
    return 2.0 * keys * stored + 2.0 * queries * scored + 4.0 * d * queries * keys


def forward_flops(
    s: Shape, queries: int, keys: int, logit_rows: int, read: int | None = None
) -> float:
    """One sequence: projections, attention scores and values, vocabulary rows.

    If only `read` positions will be read, the last layer computes keys and values alone of the
    others.
    """
    left = 0 if read is None else queries - read
    (_, k, v, *_), every = linears(s), sum(i * o for i, o in linears(s))
    spared = every - k[0] * k[1] - v[0] * v[1]
    matmuls = 2.0 * (s.n_layers * every * queries - spared * left)
    attention = 4.0 * s.d_model * keys * (s.n_layers * queries - left)
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
    order_inputs: int = 0,
) -> Memory:
    """Per device, weights and state over `shards` devices, `sequences` a device at a time.

    Trained weights are float32 with a sum of gradients and two moments: 16 bytes each. Beside them
    a microbatch's gradient: of an adapter in float32, of whole weights in the compute type, in
    which their products read a copy. `order_inputs` > 0: an order beside a frozen denoiser, which
    keeps so many states' residual streams.
    """
    trained = lora_params(s) if s.lora_rank else total_params(s)
    if order_inputs:
        trained = order_params(s)
    passing = 4 if s.lora_rank or order_inputs else 2 * s.compute_bytes
    frozen = frozen_bytes(s) if s.lora_rank or full_ft_ref or order_inputs else 0
    carry = (order_inputs or s.n_layers) * s.d_model * s.compute_bytes
    layer = s.compute_bytes * (4 * s.d_model + 3 * s.mlp_hidden_size)
    kept = carry + layer if s.remat or order_inputs else s.n_layers * layer
    rows = sequences * length
    return Memory(
        weights=frozen / shards,
        trained_state=(16 + passing) * trained / shards,
        activations=rows * kept,
        logits=max(rows * CHUNK_BYTES, sequences * block * s.vocab_size * 4),
    )


def rollout_flops(
    s: Shape, sequences: int, prompt: int, length: int, block: int, steps: int
) -> float:
    """`steps` forwards a sequence, of which the current block alone is read."""
    span = prompt + length
    return sequences * steps * forward_flops(s, span, span, block, block)


def scoring_flops(s: Shape, prompt: int, length: int) -> float:
    """One forward of a loss on one sequence, of which the completion is read.

    Only where layers are not recomputed does the last one leave the prompt out (`LLaDA.tail`).
    """
    span = prompt + length
    return forward_flops(s, span, span, length, span if s.remat else length)


def update_flops(
    s: Shape, sequences: int, prompt: int, length: int, passes: dict[str, int]
) -> float:
    """Forwards without gradient (`forward`) and with (`gradient`), all a sequence.

    A gradient pass costs 3 forwards, 2 under an adapter (frozen weights need no gradient of
    their own), and one more where layers are recomputed.
    """
    backward = (2 if s.lora_rank else 3) + (1 if s.remat else 0)
    one = scoring_flops(s, prompt, length)
    return sequences * one * (passes["forward"] + backward * passes["gradient"])


def order_update_flops(
    s: Shape, sequences: int, prompt: int, length: int, block: int, steps: int, kept: bool
) -> float:
    """One update of a learned order on all `steps` decisions of a trajectory.

    The denoiser runs forward, and again where its states are not `kept`; the policy runs forward
    twice and backward at the cost of two.
    """
    span = prompt + length
    denoiser = forward_flops(s, span, span, block, block) * (1 if kept else 2)
    return sequences * steps * (denoiser + 4 * order_flops(s, span, block))


def dry_run(recipe: Any) -> str:
    """The estimate that `--config.dry_run` prints."""
    s, loop, sampling = shape_of(recipe.model), recipe.loop, recipe.sampling
    completions = loop.prompts_per_step * loop.num_generations
    prompt, length = recipe.max_prompt_length, sampling.length
    states = [getattr(t.hyper, "states", 0) for t in recipe.terms]
    beta = [t for t in recipe.terms if getattr(t.hyper, "beta", 0) > 0]
    mu = loop.num_iterations
    gradient = mu * sum(n or 1 for n in states)
    forward = sum(states) + (gradient if mu > 1 else 0)
    forward += mu * sum(getattr(t.hyper, "states", 0) or 1 for t in beta)
    rollout = rollout_flops(s, completions, prompt, length, sampling.block_length, sampling.steps)
    update = update_flops(
        s, completions, prompt, length, {"forward": forward, "gradient": gradient}
    )
    inputs = 0
    if sampling.learned:
        size, steps = (prompt, length, sampling.block_length), sampling.steps
        kept = any(getattr(t.hyper, "keep_inputs", False) for t in recipe.terms)
        inputs = steps if kept else 1
        rollout += completions * steps * order_flops(s, prompt + length, sampling.block_length)
        update = mu * order_update_flops(s, completions, *size, steps, kept)
    mesh = dict(recipe.mesh)
    trained = "all trained"
    if s.lora_rank:
        trained = f"{lora_params(s):,} trained (LoRA rank {s.lora_rank})"
    elif inputs:
        trained = f"frozen; {order_params(s):,} trained (an order)"
    lines = [
        f"parameters        {total_params(s):,} base, {trained}",
        f"completions       {completions} a step ({loop.prompts_per_step} prompts x "
        f"{loop.num_generations}), {prompt} + {length} tokens",
        f"FLOPs a step      rollout {_tera(rollout)}, update {_tera(update)} (predicted)",
    ]
    for shards in sorted({1, 4, 8, _size(mesh)} - {0}):
        share = math.ceil(completions / loop.microbatches / shards)
        at_once = max(share, math.ceil(completions / loop.rollout_chunks / shards))
        block, reference = sampling.block_length, bool(beta)
        m = memory(s, at_once, prompt + length, block, shards, reference, inputs)
        lines.append(
            f"memory, {shards} device(s)".ljust(18)
            + f"{m.total / GB:.2f} GB each: weights {m.weights / GB:.2f}, "
            f"trained state {m.trained_state / GB:.2f}, activations {m.activations / GB:.2f}, "
            f"logits {m.logits / GB:.2f} (predicted, fully sharded)"
        )
    named = ", ".join(f"{axis}={size if size != -1 else 'rest'}" for axis, size in mesh.items())
    return "\n".join([*lines, f"mesh              {named}"])


def _size(mesh: dict[str, int]) -> int:
    return 0 if -1 in mesh.values() else math.prod(mesh.values())


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.3g} TFLOP" if flops >= 1e11 else f"{flops / 1e9:,.3g} GFLOP"
