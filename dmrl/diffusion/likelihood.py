"""Estimates of log pi(completion | prompt) under a masked diffusion model."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmrl.diffusion.masking import random_subset, stratified_counts
from dmrl.diffusion.noise import fold_in
from dmrl.types import Denoiser, RowKeys


def completion_hidden(
    denoiser: Denoiser,
    prompt: Int[Array, "n p"],
    prompt_valid: Bool[Array, "n p"],
    state: Int[Array, "n l"],
) -> Float[Array, "n l d"]:
    """What the model's head reads at every position of `state`: one forward."""
    tokens = jnp.concatenate([prompt, state], axis=1)
    valid = jnp.concatenate([prompt_valid, jnp.ones(state.shape, bool)], axis=1)
    length = state.shape[1]
    return denoiser.encode(tokens, valid, length)[:, -length:]


def state_log_prob(
    denoiser: Denoiser,
    prompt: Int[Array, "n p"],
    prompt_valid: Bool[Array, "n p"],
    state: Int[Array, "n l"],
    labels: Int[Array, "n z l"],
    needed: Bool[Array, "n l"] | None = None,
) -> Float[Array, "n z l"]:
    """log p(labels_i | prompt, state) at every position i, float32, one forward for all Z.

    The mean-field estimate that diffu-GRPO (state all masked) and DiSPO (state half-filled)
    share. Meaningful where `state` is masked; elsewhere it is what the model predicts at a
    position whose token it can see. Positions that are not `needed` may be left out.
    """
    if denoiser.score is not None and needed is not None:
        return denoiser.score(prompt, prompt_valid, state, labels, needed)
    hidden = completion_hidden(denoiser, prompt, prompt_valid, state)
    return jnp.moveaxis(denoiser.log_prob(hidden, jnp.moveaxis(labels, 1, -1), needed), -1, 1)


def masks_log_prob(
    denoiser: Denoiser,
    prompt: Int[Array, "n m p"],
    prompt_valid: Bool[Array, "n p"],
    state: Int[Array, "n m l"],
    labels: Int[Array, "n l"],
    needed: Bool[Array, "n m l"] | None = None,
) -> Float[Array, "n m l"]:
    """log p(labels_i | prompt_m, state_m) under each of M maskings of one completion.

    One forward a masking, all in one batch. Meaningful where `state` is masked; positions that are
    not `needed` may be left out.
    """
    n, m, length = state.shape
    log_prob = state_log_prob(
        denoiser,
        prompt.reshape(n * m, -1),
        jnp.repeat(prompt_valid, m, axis=0),
        state.reshape(n * m, length),
        jnp.repeat(labels, m, axis=0)[:, None],
        None if needed is None else needed.reshape(n * m, length),
    )
    return log_prob.reshape(n, m, length)


def elbo(log_prob: Float[Array, "*n m l"], weight: Float[Array, "*n m l"]) -> Float[Array, "*n"]:
    """Mean over M maskings of sum_i weight_i log p_i: at most log pi in expectation.

    `weight` is w(t) where a position is masked and 0 elsewhere: 1/t for t ~ U(0,1), or
    n/(number masked) for a uniform count (LLaDA, arXiv 2502.09992, eqs. 4 and 6). In nats of the
    whole completion; divide the weight by its length for a score per token.
    """
    terms = jnp.where(weight > 0, log_prob, 0.0) * weight
    return jnp.mean(jnp.sum(terms, axis=-1), axis=-1)


def stratified_elbo(
    denoiser: Denoiser,
    tokens: Int[Array, "n s"],
    valid: Bool[Array, "n s"],
    scored: Bool[Array, "n w"],
    keys: RowKeys,
    samples: int,
) -> Float[Array, " n"]:
    """LLaDA's estimate of log p(the scored tokens | the others of a sequence), in nats.

    `scored` marks some of the last W positions, the only ones that pass through the vocabulary
    head. The mean over M maskings of n/l * sum log p, each hiding a uniform subset of l of the n
    scored tokens, l by `masking.stratified_counts`: in expectation the ELBO, exact for n = 1. One
    masking after the other, so that a batch takes the memory of one.

    Source: `get_log_likelihood` of the released LLaDA code (arXiv 2502.09992, eq. 6), M = 128.
    """
    total, width = jnp.sum(scored, axis=1), scored.shape[1]
    counts = stratified_counts(keys, total, samples)
    labels = tokens[:, -width:]

    def one(column: tuple[Int[Array, ""], Int[Array, " n"]]) -> Float[Array, " n"]:
        number, count = column
        # Counted from the end: how many positions stand before the scored ones changes nothing.
        hidden = random_subset(fold_in(keys, number), scored[:, ::-1], count)[:, ::-1]
        seen = jnp.where(hidden, denoiser.mask_id, labels)
        states = denoiser.encode(jnp.concatenate([tokens[:, :-width], seen], axis=1), valid, width)
        log_prob = denoiser.log_prob(states[:, -width:], labels[..., None], hidden)[..., 0]
        weight = hidden * (total / jnp.maximum(count, 1))[:, None]
        return elbo(log_prob[:, None], weight[:, None])

    return jnp.mean(jax.lax.map(one, (jnp.arange(samples), counts.T)), axis=0)


def eubo(
    log_prob: Float[Array, "*n m l"], weight: Float[Array, "*n m l"], beta: float
) -> Float[Array, "*n l"]:
    """(1/beta) log( mean over M maskings of weight_i p_i^beta ) of every position, in log space.

    Summed over positions, over infinitely many maskings and plus the constant of
    `bounds.eubo_constant`, an upper bound of log pi (SPG, arXiv 2510.09541: Renyi bound,
    beta >= 1). With M maskings the mean under the logarithm is an estimate, so the result is too
    small in expectation (Jensen), the more so the smaller M. 0 where no masking hides the position.
    """
    seen = weight > 0
    ever = jnp.any(seen, axis=-2)
    inside = jnp.where(seen, beta * log_prob + jnp.log(jnp.where(seen, weight, 1.0)), -jnp.inf)
    inside = jnp.where(ever[..., None, :], inside, 0.0)  # no -inf alone under logsumexp: NaN
    total = jax.nn.logsumexp(inside, axis=-2) - math.log(log_prob.shape[-2])
    return jnp.where(ever, total / beta, 0.0)


def sandwich(
    log_prob: Float[Array, "*n m l"],
    weight: Float[Array, "*n m l"],
    length: Int[Array, "*n"],
    beta: float,
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """(ELBO, EUBO) per token from the same M maskings, as SPG normalises them; 0 if none hides.

    `elbo` over the `length` tokens; `eubo` over those that some masking hides, so that positions
    never seen count as the average of the others.
    """
    lower = elbo(log_prob, weight) / jnp.maximum(length, 1)
    union = jnp.sum(jnp.any(weight > 0, axis=-2), axis=-1)
    return lower, jnp.sum(eubo(log_prob, weight, beta), axis=-1) / jnp.maximum(union, 1)


def mixture(
    lower: Float[Array, "*n"], upper: Float[Array, "*n"], omega: float
) -> Float[Array, "*n"]:
    """(1 - omega) ELBO + omega EUBO (SPG, arXiv 2510.09541, eq. 8)."""
    return (1 - omega) * lower + omega * upper


def optimal_omega(
    lower: Float[Array, "s d"], upper: Float[Array, "s d"], probability: Float[Array, " s"]
) -> Float[Array, ""]:
    """The omega whose mixture of two gradients has the least total variance over D coordinates.

        omega* = (Var g_l - Cov(g_l, g_u)) / (Var g_l + Var g_u - 2 Cov(g_l, g_u))

    each summed over the coordinates; the S outcomes have the given probabilities (1/S each for
    draws). Source: SPG, Proposition 1 and its footnote. The minimum beats BOTH ends only if omega*
    is neither 0 nor 1, which the proposition leaves out; nor does it have to lie in [0, 1]. NaN
    if the two gradients differ by a constant.
    """

    def covariance(x: jax.Array, y: jax.Array) -> jax.Array:
        centred = y - jnp.matmul(probability, y, precision="highest")[None]
        return jnp.sum(probability[:, None] * x * centred)

    gap = upper - lower
    return -covariance(lower, gap) / covariance(gap, gap)


POSITIONS = 32
"""Positions whose whole vocabulary rows exist at one time: the width of a LLaDA block."""


def over_positions(
    f: Callable[[Int[Array, ""], Float[Array, "n w d"]], Any],
    hidden: Float[Array, "n l d"],
    axis: int = -1,
) -> Any:
    """Maps `f(chunk number, hidden chunk)` over the length and joins the results along `axis`.

    For what needs whole vocabulary rows (sampling, entropy): memory is that of POSITIONS rows,
    and the batch axis stays whole, hence sharded. `f` returns an array, or a tree of arrays, with
    the N rows first and the W positions of its chunk at `axis`.
    """
    length = hidden.shape[1]
    width = next(w for w in range(min(POSITIONS, length), 0, -1) if length % w == 0)
    chunks = jnp.moveaxis(hidden.reshape(hidden.shape[0], -1, width, hidden.shape[2]), 1, 0)
    mapped = jax.lax.map(lambda args: f(*args), (jnp.arange(chunks.shape[0]), chunks))

    def join(x: jax.Array) -> jax.Array:
        at = axis % (x.ndim - 1)
        x = jnp.moveaxis(x, 0, at)
        return x.reshape(*x.shape[:at], length, *x.shape[at + 2 :])

    return jax.tree.map(join, mapped)
