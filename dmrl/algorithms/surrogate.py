"""The clipped surrogate that the GRPO family shares."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmrl.diffusion.likelihood import state_log_prob
from dmrl.diffusion.masking import random_subset
from dmrl.diffusion.noise import row_keys
from dmrl.diffusion.probe import state_at, steps_taken
from dmrl.types import Denoiser, Metrics, Models, PRNGKey, Rollout


class Batch(NamedTuple):
    """N items: a state and Z completions of it, with all that does not depend on theta."""

    prompt: Int[Array, "n p"]
    """Already corrupted: policy, behaviour and reference see the same prompt mask."""
    prompt_valid: Bool[Array, "n p"]
    state: Int[Array, "n l"]
    labels: Int[Array, "n z l"]
    advantage: Float[Array, "n z"]
    weight: Float[Array, "n z l"]
    """Which tokens count; sums to 1 over the whole batch, so that microbatches add up."""
    old: Float[Array, "n z l"] | None
    """log pi_old under the same prompt mask; None while the policy is still theta_old."""
    reference: Float[Array, "n z l"] | None


def clipped(
    log_ratio: Float[Array, "*n"],
    advantage: Float[Array, "*#n"],
    epsilon: float | None,
    epsilon_high: float | None = None,
) -> Float[Array, "*n"]:
    """-min(rho A, clip(rho, 1-eps, 1+eps_high) A), rho = exp(log_ratio); no clip if eps is None.

    `epsilon_high` is `epsilon` unless given.
    """
    rho = jnp.exp(log_ratio)
    if epsilon is None:
        return -rho * advantage
    high = epsilon if epsilon_high is None else epsilon_high
    return -jnp.minimum(rho * advantage, jnp.clip(rho, 1 - epsilon, 1 + high) * advantage)


def k3(log_prob: Float[Array, "*n"], reference: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Schulman's estimate of KL(pi || pi_ref): e^(ref-lp) - (ref-lp) - 1."""
    gap = reference - log_prob
    return jnp.exp(gap) - gap - 1


def needs(beta: float) -> frozenset[str]:
    """What a KL penalty of weight `beta` asks of the trainer."""
    return frozenset({"reference"}) if beta > 0 else frozenset()


def reference(models: Models, beta: float) -> Denoiser | None:
    """The reference, unless it was another term that asked for it."""
    return models.reference if beta > 0 else None


def idle(
    advantage: Float[Array, "n z"], weight: Float[Array, "n z l"], penalised: bool
) -> Bool[Array, " n"]:
    """Items without a gradient: no token counts or, unless there is a penalty, none that counts
    has an advantage."""
    trained = weight > 0
    if not penalised:
        trained &= advantage[..., None] != 0
    return ~jnp.any(trained, axis=(1, 2))


def needed(weight: Float[Array, "n z l"]) -> Bool[Array, "n l"]:
    """Positions of which a label counts: only they pass through the vocabulary head."""
    return jnp.any(weight > 0, axis=1)


RATIO_LEVELS = ("token", "sequence")


def check(p_mask_prompt: float, epsilon: float | None, beta: float, ratio_level: str) -> None:
    """Raises ValueError on a value of the shared hyper-parameters that cannot work."""
    if not 0 <= p_mask_prompt <= 1:
        raise ValueError(f"p_mask_prompt={p_mask_prompt} is no probability: choose one in [0, 1]")
    if epsilon is not None and not epsilon > 0:
        raise ValueError(f"epsilon={epsilon} must be positive, or None for no clip")
    if beta < 0:
        raise ValueError(f"beta={beta} must be >= 0")
    if ratio_level not in RATIO_LEVELS:
        raise ValueError(f"ratio_level={ratio_level!r}: choose one of {RATIO_LEVELS}")


def weight(counted: Bool[Array, "n z l"], ratio_level: str) -> Float[Array, "n z l"]:
    """Weights that sum to 1 over the whole batch (0 if nothing counts).

    `token`: every counted token the same. `sequence`: every completion that has a counted token
    the same, split evenly over its tokens.
    """
    if ratio_level == "token":
        return counted / jnp.maximum(jnp.sum(counted), 1)
    tokens = jnp.sum(counted, axis=-1, keepdims=True)
    sequences = jnp.maximum(jnp.sum(tokens > 0), 1)
    return counted / (jnp.maximum(tokens, 1) * sequences)


def per_part(
    counted: Bool[Array, "b l"], part: Int[Array, "b l"], parts: int
) -> Float[Array, "b l"]:
    """Weights that sum to 1 over the batch, for tokens in numbered parts 0..parts-1.

    Every part that has a counted token weighs the same, split evenly over its tokens.
    """
    part = jnp.where(counted, part, 0)
    tokens = jax.ops.segment_sum(counted.ravel().astype(jnp.int32), part.ravel(), parts)
    return counted / (jnp.maximum(jnp.sum(tokens > 0), 1) * jnp.maximum(tokens, 1)[part])


def loss(
    policy: Denoiser, batch: Batch, epsilon: float | None, beta: float, ratio_level: str
) -> tuple[Float[Array, ""], Metrics]:
    """The `objective` of the log-probabilities of the batch's labels."""
    log_prob = state_log_prob(policy, *batch[:4], needed(batch.weight))
    frozen = (batch.advantage, batch.weight, batch.old, batch.reference)
    return objective(log_prob, *frozen, epsilon, beta, ratio_level)


def objective(
    log_prob: Float[Array, "n z l"],
    advantage: Float[Array, "n z"],
    weight: Float[Array, "n z l"],
    old: Float[Array, "n z l"] | None,
    reference: Float[Array, "n z l"] | None,
    epsilon: float | None,
    beta: float | Float[Array, "*#items"],
    ratio_level: str = "token",
) -> tuple[Float[Array, ""], Metrics]:
    """sum_i w_i ( -min(rho_i A, clip(rho_i) A) + beta * k3_i ), and sums for the log.

    `log_prob` is any estimate of log pi whose frozen readings are `old` and `reference`.
    `ratio_level` "token": rho_i per token (diffu-GRPO's code). "sequence": one rho for the
    product over a completion's counted tokens (DiSPO eq. 5), shared by those tokens.
    """
    counted = weight > 0
    log_prob = jnp.where(counted, log_prob, 0.0)
    old = jax.lax.stop_gradient(log_prob) if old is None else old
    log_ratio = jnp.where(counted, log_prob - old, 0.0)
    if ratio_level == "sequence":
        log_ratio = jnp.broadcast_to(jnp.sum(log_ratio, -1, keepdims=True), log_ratio.shape)
    terms = clipped(log_ratio, advantage[..., None], epsilon)
    metrics = {"clip_ratio/region_mean": _clipped_share(log_ratio, advantage, weight, epsilon)}
    if reference is not None:
        kl = jnp.where(counted, k3(log_prob, reference), 0.0)
        terms = terms + beta * kl
        metrics["kl"] = jnp.sum(weight * kl)
    return jnp.sum(weight * terms), metrics


def _clipped_share(
    log_ratio: jax.Array, advantage: jax.Array, weight: jax.Array, epsilon: float | None
) -> jax.Array:
    """Weight share of tokens whose clip is active (outside the range on the paying side)."""
    if epsilon is None:
        return jnp.zeros(())
    rho, advantage = jnp.exp(log_ratio), advantage[..., None]
    active = ((rho > 1 + epsilon) & (advantage > 0)) | ((rho < 1 - epsilon) & (advantage < 0))
    return jnp.sum(weight * active)


def with_frozen(
    batch: Batch,
    behaviour: Denoiser | None,
    reference: Denoiser | None,
    pieces: int = 1,
    ratio_alone: bool = False,
) -> Batch:
    """Adds log pi_old and log pi_ref, each under the batch's own prompt mask.

    The items go through a model in `pieces` strided cuts, one after the other, for batches of
    more items than fit at once. With `ratio_alone` log pi_old enters through the ratio and nothing
    else: where that is multiplied by no advantage it may be left out.
    """

    def score(denoiser: Denoiser | None, tied: bool = True) -> jax.Array | None:
        if denoiser is None:
            return None

        def piece(cut: Batch) -> jax.Array:
            read = cut.weight if tied else cut.weight * (cut.advantage != 0)[..., None]
            log_prob = state_log_prob(denoiser, *cut[:4], needed(read))
            return jnp.where(read > 0, log_prob, 0.0)

        if pieces == 1:
            return piece(batch)
        cuts = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]), 1, 0),
            batch,
        )
        return jnp.moveaxis(jax.lax.map(piece, cuts), 0, 1).reshape(batch.weight.shape)

    return batch._replace(old=score(behaviour, not ratio_alone), reference=score(reference))


def trajectory(
    rollout: Rollout,
    advantage: Float[Array, " b"],
    weight: Float[Array, "b l"],
    key: PRNGKey,
    mask_id: int,
    states: int,
    merge: int = 1,
) -> Batch:
    """Items are the steps of the trajectory that drew a completion, `states` of them a row.

    Step v stands for the `merge` denoising steps from v * merge on: its state is what the sampler
    saw before the first of them, its tokens are those that they revealed, each with its `weight`.
    A row of at most `states` steps gives all, in order (items to spare have no token). Of a longer
    one that many are drawn uniformly without replacement and weigh more in proportion, so that the
    expectation is the whole trajectory. Memory and time of one item are those of a completion.

    Raises:
      ValueError: the sampler may have changed a revealed token: `reveal_step` then does not tell
        what was drawn at a step.
    """
    if rollout.states is not None:
        raise ValueError("rollout.states is set: take a sampler that keeps what it revealed")
    bound = -(-rollout.tokens.shape[1] // merge)  # T <= L: Sampling refuses more
    kept = min(states, bound)
    taken = (steps_taken(rollout) + merge - 1) // merge
    there = jnp.arange(bound)[None] < taken[:, None]
    chosen = random_subset(row_keys(key, rollout.row), there, jnp.full_like(taken, kept))
    step = jnp.argsort(~chosen, axis=1, stable=True)[:, :kept]
    revealed = rollout.reveal_step[:, None] // merge == step[:, :, None]
    scale = (jnp.maximum(taken, kept) / kept)[:, None]
    state = state_at(rollout, step * merge, mask_id)

    def items(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, kept, axis=0)

    return Batch(
        prompt=items(rollout.prompt),
        prompt_valid=items(rollout.prompt_valid),
        state=state.reshape(-1, state.shape[2]),
        labels=items(rollout.tokens)[:, None],
        advantage=items(advantage)[:, None],
        weight=jnp.where(revealed, (weight * scale)[:, None], 0.0).reshape(-1, 1, state.shape[2]),
        old=None,
        reference=None,
    )
