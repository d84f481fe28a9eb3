"""SPG: sandwiched policy gradient (arXiv 2510.09541).

L = -sum_j (n_j / sum n) A_j l_j,   l_j = ELBO_j if A_j > 0, else EUBO_j or
    Mix_j = (1 - omega) ELBO_j + omega EUBO_j                                  (eqs. 5 and 8)
ELBO = (1/m) sum_tau (1/|V_tau|) sum_{i in V_tau} log p(x_i | z_tau)                  (eq. 2)
EUBO = (1/beta) (1/|U|) sum_{i in U} log( (1/m) sum_tau 1[i in V_tau] p(x_i | z_tau)^beta
       n / |V_tau| )                                                                  (eq. 7)

z_1..z_m hide parts of the completion of n tokens up to EOS, V_tau its hidden tokens in z_tau,
U their union. Both estimates are per token. A = r - mean of the group. No ratio, no clip, no KL.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmrl.algorithms import advantage
from dmrl.diffusion import likelihood, masking
from dmrl.diffusion.noise import fold_in, row_keys
from dmrl.types import Inner, Metrics, Models, PRNGKey, Probe, Rollout, RowKeys

BLIND_AFTER_EOS = True
"""Nothing after the first EOS enters: a rollout may stop there."""

CHOICES = {
    "masking": ("block_random", "random", "all"),
    "negative": ("mix", "eubo", "elbo", "zero"),
    "positions": ("masked", "block"),
}
RANGES = {
    "samples": (1, math.inf),
    "block_length": (1, math.inf),
    "p_mask_prompt": (0, 1),
    "omega": (0, 1),
    "eubo_beta": (1, math.inf),
}


@dataclasses.dataclass(frozen=True)
class Hyper:
    """Defaults are the paper's; its `eubo_beta` is 1.0 for Sudoku."""

    samples: int = 2
    """m, maskings of a completion and forwards of an update; `num_t` in the authors' code."""
    masking: str = "block_random"
    """`block_random`: as a block-by-block sampler would see it (section 3.3). `random`: a uniform
    number of positions anywhere. `all`: everything, one step."""
    negative: str = "mix"
    """What stands for log pi where A < 0; `zero` ignores those completions."""
    omega: float = 0.5
    eubo_beta: float = 1.5
    p_mask_prompt: float = 0.15
    """Noise on the prompt and, with `block_random`, on the blocks before the chosen one."""
    block_length: int = 32
    positions: str = "masked"
    """V: `masked`, every hidden token, as the paper's equations and the authors' loss have it.
    `block`, only those of the chosen block, weighted so that the ELBO is the unbiased one of a
    block-by-block sampler; the authors' code builds that mask and leaves it unused."""

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {choices}")
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)} must be in [{low}, {high}]")
        if self.positions == "block" and self.masking != "block_random":
            raise ValueError("positions='block' needs masking='block_random': it has the blocks")


class Batch(NamedTuple):
    """N items: a completion under M maskings."""

    prompt: Int[Array, "n m p"]
    prompt_valid: Bool[Array, "n p"]
    state: Int[Array, "n m l"]
    labels: Int[Array, "n l"]
    inverse_t: Float[Array, "n m l"]
    """n / |V| on V, 0 elsewhere."""
    length: Int[Array, " n"]
    advantage: Float[Array, " n"]
    share: Float[Array, " n"]
    """n_j / sum n over the whole batch, so that microbatches add up."""
    logged: Float[Array, " n"]
    """The same over the completions that train, for the metrics."""


def prepare(
    models: Models,
    rollout: Rollout,
    probe: Probe | None,
    key: PRNGKey,
    inner: Inner,
    hp: Hyper,
) -> Batch:
    """One item a completion; fresh masks for each inner update. What follows EOS is hidden.

    Raises ValueError if the blocks do not tile the completion.
    """
    del probe, inner
    assert rollout.reward is not None
    tokens, mask_id = rollout.tokens, models.policy.mask_id
    if hp.masking == "block_random" and tokens.shape[1] % hp.block_length:
        parts = f"block_length={hp.block_length} does not divide the completion length"
        raise ValueError(f"{parts} {tokens.shape[1]}: choose the sampler's")
    free = rollout.reveal_step >= 0
    counted = free & masking.upto_eos(tokens, models.policy.eos_id)
    length = jnp.sum(counted, axis=1)
    keys = fold_in(row_keys(key, rollout.row), 0)  # 1.. are those of `mask_prompts`
    hidden, inverse_t = _maskings(keys, counted, hp)
    hidden |= (free & ~counted)[:, None]
    noise = (hp.p_mask_prompt, mask_id, hp.samples)
    credit = advantage.group_relative(rollout.reward, rollout.group)
    trains = jnp.where(_unused(credit, hp), 0, length)
    return Batch(
        prompt=masking.mask_prompts(key, rollout.row, rollout.prompt, *noise),
        prompt_valid=rollout.prompt_valid,
        state=jnp.where(hidden, mask_id, tokens[:, None]),
        labels=tokens,
        inverse_t=inverse_t,
        length=length,
        advantage=credit,
        share=length / jnp.maximum(jnp.sum(length), 1),
        logged=trains / jnp.maximum(jnp.sum(trains), 1),
    )


def _maskings(
    keys: RowKeys, counted: Bool[Array, "n l"], hp: Hyper
) -> tuple[Bool[Array, "n m l"], Float[Array, "n m l"]]:
    """(hidden counted positions, 1/t on V) of the M maskings."""
    if hp.masking == "block_random":
        args = (hp.block_length, hp.samples, hp.p_mask_prompt)
        hidden, weight = masking.block_random(keys, counted, *args)
        if hp.positions == "block":
            return hidden, weight
    elif hp.masking == "random":
        hidden = masking.random_subsets(keys, counted, hp.samples)
    else:
        hidden = jnp.repeat(counted[:, None], hp.samples, axis=1)
    t = jnp.sum(hidden, axis=2) / jnp.maximum(jnp.sum(counted, axis=1), 1)[:, None]
    return hidden, hidden / jnp.where(t > 0, t, 1.0)[:, :, None]


def idle(batch: Batch, hp: Hyper) -> Bool[Array, " n"]:
    """Items that the loss gets no gradient from."""
    return _unused(batch.advantage, hp)


def _unused(credit: Float[Array, " n"], hp: Hyper) -> Bool[Array, " n"]:
    return credit <= 0 if hp.negative == "zero" else credit == 0


def loss(models: Models, batch: Batch, hp: Hyper) -> tuple[Float[Array, ""], Metrics]:
    """The equations above; logs both bounds of what trains, in nats per token."""
    log_prob = likelihood.masks_log_prob(
        models.policy,
        batch.prompt,
        batch.prompt_valid,
        batch.state,
        batch.labels,
        batch.inverse_t > 0,
    )
    lower, upper = likelihood.sandwich(log_prob, batch.inverse_t, batch.length, hp.eubo_beta)
    mix = likelihood.mixture(lower, upper, hp.omega)
    negative = {"mix": mix, "eubo": upper, "elbo": lower, "zero": jnp.zeros_like(lower)}
    estimate = jnp.where(batch.advantage > 0, lower, negative[hp.negative])
    metrics = {"elbo": jnp.sum(batch.logged * lower), "eubo": jnp.sum(batch.logged * upper)}
    return -jnp.sum(batch.share * batch.advantage * estimate), metrics
