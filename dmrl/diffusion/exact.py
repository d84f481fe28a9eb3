"""Exact enumeration on tiny models: the oracle of tests, benchmarks and notebooks.

Nothing here scales: every function walks all outcomes, so keep V^(masked positions) small.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dmrl.diffusion.likelihood import state_log_prob
from dmrl.diffusion.sampler import Sampling
from dmrl.types import TEMPLATE, Denoiser, PRNGKey

Params = dict[str, Float[Array, "..."]]
Outcome = tuple[tuple[int, ...], tuple[int, ...]]
"""(tokens, reveal_step) of one completion."""


def init(key: PRNGKey, vocab: int, seq: int, width: int = 8, scale: float = 1.5) -> Params:
    """Random parameters of `bind`'s model over `seq` positions and `vocab` ids, MASK included."""
    shapes = {"read": (seq, vocab, width), "write": (seq, width, width), "head": (width, vocab)}
    keys = jax.random.split(key, len(shapes))
    return {
        name: scale * jax.random.normal(k, shape) / math.sqrt(shape[-2])
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def bind(params: Params, mask_id: int, eos_id: int) -> Denoiser:
    """A two-layer perceptron of all visible tokens with its own output at every position.

    The smallest model whose predictions depend on the whole state, as a denoiser's do. An
    `eos_id` outside the vocabulary gives a model that never ends a completion early.
    """
    read, write, head = params["read"], params["write"], params["head"]
    vocab = head.shape[1]

    def encode(
        tokens: Int[Array, "b s"], valid: Bool[Array, "b s"], *_: int
    ) -> Float[Array, "b s d"]:
        seen = jax.nn.one_hot(tokens, vocab) * valid[:, :, None]
        return jnp.einsum("bh,shd->bsd", jnp.tanh(jnp.einsum("bsv,svh->bh", seen, read)), write)

    def logits(hidden: Float[Array, "*lead d"]) -> Float[Array, "*lead v"]:
        out = hidden @ head
        masked = jnp.expand_dims(jnp.arange(vocab) == mask_id, range(out.ndim - 1))
        return jnp.where(masked, -jnp.inf, out)

    def log_prob(
        hidden: Float[Array, "*lead d"],
        labels: Int[Array, "*lead z"],
        needed: Bool[Array, "*lead"] | None = None,
    ) -> Float[Array, "*lead z"]:
        del needed  # the truth everywhere
        return jnp.take_along_axis(jax.nn.log_softmax(logits(hidden)), labels, axis=-1)

    return Denoiser(encode, logits, log_prob, mask_id, eos_id)


def fillings(state: Int[Array, " l"], vocab: int, mask_id: int) -> Int[Array, "f l"]:
    """All (vocab - 1)^masked completions of `state`; MASK is no filling."""
    tokens = [v for v in range(vocab) if v != mask_id]
    choices = (tokens if x == mask_id else [x] for x in state.tolist())
    return jnp.array(list(itertools.product(*choices)))


def sampler_law(
    denoiser: Denoiser,
    prompt: Int[Array, " p"],
    template: Int[Array, " l"],
    vocab: int,
    config: Sampling,
) -> dict[Outcome, float]:
    """Probability of every outcome of `sampler.sample` on one unpadded prompt.

    Follows LLaDA's text (arXiv 2502.09992), not our sampler: all masked positions of the block
    propose a token from softmax(logits / T); those with the most probable proposals at
    temperature 1 (or a uniformly random subset) are revealed. Who wins depends on all proposals,
    so these are enumerated jointly. Raises ValueError at temperature 0, where the law is a point.
    """
    if config.temperature == 0:
        raise ValueError("temperature=0 decodes greedily: enumerate the law of a temperature > 0")
    mask, start = denoiser.mask_id, tuple(template.tolist())
    states = list(itertools.product(*(range(vocab) if x == mask else [x] for x in start)))
    log_p, proposal_p = _predictions(denoiser, prompt, states, config)
    index = {state: i for i, state in enumerate(states)}
    law = {(start, tuple(config.steps if x == mask else TEMPLATE for x in start)): 1.0}
    per_block = config.steps // config.blocks
    for step in range(config.steps):
        first = step // per_block * config.block_length
        base, more = divmod(start[first : first + config.block_length].count(mask), per_block)
        count = base + (step % per_block < more)
        after: dict[Outcome, float] = defaultdict(float)
        for (tokens, when), p in law.items():
            i = index[tokens]
            block = range(first, first + config.block_length)
            masked = [j for j in block if tokens[j] == mask]
            for news, q in _reveals(log_p[i], proposal_p[i], masked, count, config.order):
                revealed, steps = list(tokens), list(when)
                for j, token in news:
                    revealed[j], steps[j] = token, step
                after[tuple(revealed), tuple(steps)] += p * q
        law = dict(after)
    return law


def _predictions(
    denoiser: Denoiser, prompt: Int[Array, " p"], states: list[tuple[int, ...]], config: Sampling
) -> tuple[np.ndarray, np.ndarray]:
    """log p at temperature 1 and the law of the proposals, [N,L,V]; MASK has none."""

    def logits(context: jax.Array) -> jax.Array:
        context = jnp.broadcast_to(context, (len(states), *context.shape))
        tokens = jnp.concatenate([context, jnp.array(states)], axis=1)
        length = len(states[0])
        hidden = denoiser.encode(tokens, jnp.ones(tokens.shape, bool), length)[:, -length:]
        return denoiser.logits(hidden).at[..., denoiser.mask_id].set(-1e30)  # finite: subtracted

    @jax.jit
    def laws() -> tuple[jax.Array, jax.Array]:
        blind, clean = logits(jnp.full_like(prompt, denoiser.mask_id)), logits(prompt)
        guided = blind + (config.cfg_scale + 1) * (clean - blind)
        return jax.nn.log_softmax(guided), jax.nn.softmax(guided / config.temperature)

    log_p, proposal_p = laws()
    return np.asarray(log_p), np.asarray(proposal_p)


def _reveals(
    log_p: np.ndarray, proposal_p: np.ndarray, masked: list[int], count: int, order: str
) -> Iterator[tuple[list[tuple[int, int]], float]]:
    """Every ([(position, token) revealed in this step], probability)."""
    tokens = [v for v in range(log_p.shape[-1]) if proposal_p[0, v] > 0]
    for proposal in itertools.product(tokens, repeat=len(masked)):
        news = list(zip(masked, proposal, strict=True))
        p = math.prod(float(proposal_p[new]) for new in news)
        if order == "low_confidence":
            yield sorted(news, key=lambda new: -log_p[new])[:count], p
        else:
            subsets = list(itertools.combinations(news, min(count, len(news))))
            yield from ((list(subset), p / len(subsets)) for subset in subsets)


def filling_log_prob(
    denoiser: Denoiser, prompt: Int[Array, " p"], state: Int[Array, " l"], fills: Int[Array, "f l"]
) -> Float[Array, " f"]:
    """log prod over masked i of p(fill_i | prompt, state): the law of DiSPO's actions."""
    valid = jnp.ones((1, *prompt.shape), bool)
    log_p = state_log_prob(denoiser, prompt[None], valid, state[None], fills[None])[0]
    return jnp.sum(jnp.where((state == denoiser.mask_id)[None], log_p, 0.0), axis=-1)


def step_objective(
    denoiser: Denoiser,
    prompt: Int[Array, " p"],
    state: Int[Array, " l"],
    fills: Int[Array, "f l"],
    reward: Float[Array, " f"],
) -> Float[Array, ""]:
    """J_step(theta) = E over fillings of R (DiSPO, arXiv 2602.06462), exact; differentiable.

    `fills` are all `fillings` of `state` and `reward` theirs. A state of masks alone gives the
    sequence objective of the one-step mean-field policy (diffu-GRPO).
    """
    return jnp.sum(jnp.exp(filling_log_prob(denoiser, prompt, state, fills)) * reward)
