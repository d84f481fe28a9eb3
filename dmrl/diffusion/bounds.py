"""Exact likelihood, its bounds, and the laws of maskings of estimators, on tiny models.

The oracle of `benchmarks/estimators.py` and the tests of estimators; nothing here scales.
"""

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dmrl.diffusion.likelihood import state_log_prob
from dmrl.types import Denoiser


class Unmaskings(NamedTuple):
    """Every way to unmask L positions, R of them, as sets of positions (bit i: position i)."""

    state: Int[np.ndarray, "r l"]
    """The positions still masked when position i is predicted, itself included."""
    probability: Float[np.ndarray, " r"]


def unmaskings(
    length: int, steps: int | None = None, block_length: int | None = None
) -> Unmaskings:
    """All ordered ways to reveal `length` positions and their probabilities.

    `steps` None: one position at a time in uniformly random order, the limit of continuous time.
    Else each position draws one of `steps` equal denoising steps, and what a step reveals is
    predicted in parallel: k groups in a given order have probability C(steps, k) / steps^length.
    With `block_length` so within each block, blocks from left to right (semi-autoregressive).
    """
    block = block_length or length
    groups = range(block, block + 1) if steps is None else range(1, min(block, steps) + 1)
    ways = []
    for count in groups:
        p = 1 / math.factorial(block)
        if steps is not None:
            p = math.comb(steps, count) / steps**block
        for stage in itertools.product(range(count), repeat=block):
            if len(set(stage)) == count:
                ways.append(
                    ([sum(1 << j for j in range(block) if stage[j] >= s) for s in stage], p)
                )
    later = [(1 << length) - (1 << (first + block)) for first in range(0, length, block)]
    states, probability = [], []
    for choice in itertools.product(ways, repeat=len(later)):
        shifted = zip(range(0, length, block), later, choice, strict=True)
        states.append([(s << first) | rest for first, rest, (way, _) in shifted for s in way])
        probability.append(math.prod(p for _, p in choice))
    return Unmaskings(np.array(states), np.array(probability))


def hidden(length: int) -> Bool[np.ndarray, "s l"]:
    """The 2^L sets of positions as rows of booleans."""
    return (np.arange(2**length)[:, None] >> np.arange(length)[None]) % 2 == 1


def masked_log_prob(
    denoiser: Denoiser, prompt: Int[Array, " p"], tokens: Int[Array, " l"]
) -> Float[Array, "s l"]:
    """log p(tokens_i | prompt, tokens without the positions of set s), for all 2^L sets.

    All that the functions below need to know of a model; differentiable. 0 outside the set.
    """
    mask = jnp.asarray(hidden(tokens.shape[0]))
    state = jnp.where(mask, denoiser.mask_id, tokens[None])
    rows = state.shape[0]
    context = jnp.broadcast_to(prompt[None], (rows, prompt.shape[0]))
    labels = jnp.broadcast_to(tokens[None, None], (rows, 1, tokens.shape[0]))
    log_p = state_log_prob(denoiser, context, jnp.ones(context.shape, bool), state, labels)
    return jnp.where(mask, log_p[:, 0], 0.0)


def log_likelihood(table: Float[Array, "s l"], law: Unmaskings) -> Float[Array, ""]:
    """log p(x) = log E prod_i p(x_i | what was visible), over all unmaskings."""
    return jax.nn.logsumexp(_path_log_prob(table, law), b=jnp.asarray(law.probability))


def elbo(table: Float[Array, "s l"], law: Unmaskings) -> Float[Array, ""]:
    """E sum_i log p(x_i | what was visible): at most `log_likelihood` (Jensen)."""
    return jnp.sum(table * jnp.asarray(_state_law(law)))


def eubo(table: Float[Array, "s l"], law: Unmaskings, beta: float) -> Float[Array, ""]:
    """sum_i (1/beta) log E p(x_i | what was visible)^beta: SPG's bound without its constant.

    Source: SPG, arXiv 2510.09541, eqs. 6 and 7. Grows with beta (power means). For beta >= L at
    least `log_likelihood`; for smaller beta only after `eubo_constant` is added.
    """
    return jnp.sum(jax.nn.logsumexp(beta * table, axis=0, b=jnp.asarray(_state_law(law)))) / beta


def eubo_constant(law: Unmaskings, beta: float) -> float:
    """C with log p(x) <= EUBO_beta + C for every model, beta >= 1; derived here.

        K = max over unmaskings r of P(r) / prod_i P(S_i = S_i(r)),   S_i the set that i sees
        C = (L - beta) / (beta (L - 1)) log K  for beta < L,  else 0

    Let F_i(S_i) = p(x_i | S_i)^beta.  (1) E prod F_i = sum_r P(r) prod_i F_i(S_i(r)) is at most
    K sum_r prod_i P(S_i = S_i(r)) F_i(S_i(r)), and, different r having different (S_1..S_L), at
    most K prod_i E F_i.  (2) Hoelder: E prod F_i^(1/L) <= prod_i (E F_i)^(1/L).  (3) Write 1/beta
    = (1 - h) + h/L; Hoelder between (1) and (2) gives p(x) = E prod F_i^(1/beta) <= K^(1-h)
    prod_i (E F_i)^(1/beta), with 1 - h = (L - beta) / (beta (L - 1)).

    At beta = 1 no smaller constant serves every model (predictions that are sure along one
    unmasking and impossible elsewhere). In continuous time K = L^L / L! * prod_k C(L-1, k).
    Theorem 1 of SPG (arXiv 2510.09541) proves the larger `spg_constant`, which has no limit.
    """
    length = law.state.shape[1]
    if length == 1 or beta >= length:
        return 0.0
    met = _state_law(law)[law.state, np.arange(length)[None]]
    largest = np.max(np.log(law.probability) - np.sum(np.log(met), axis=1))
    return float(largest) * (length - beta) / (beta * (length - 1))


def spg_constant(length: int, steps: int, beta: float) -> float:
    """C(T) of SPG's Theorem 1, T = steps + 1: (1/beta) log E q(z_1..T | x)^(-L) if beta < L else 0.

    With equal steps all steps^L paths z have probability q = steps^(-L), so it is
    (L^2 / beta) log(steps): the bound becomes void as T grows, and only its gradient has a limit.
    """
    return length**2 / beta * math.log(steps) if beta < length else 0.0


def _path_log_prob(table: Float[Array, "s l"], law: Unmaskings) -> Float[Array, " r"]:
    positions = np.broadcast_to(np.arange(law.state.shape[1]), law.state.shape)
    return jnp.sum(table[law.state, positions], axis=1)


def _state_law(law: Unmaskings) -> Float[np.ndarray, "s l"]:
    """P(position i is predicted while exactly the set s is masked)."""
    length = law.state.shape[1]
    marginal = np.zeros((2**length, length))
    for i in range(length):
        np.add.at(marginal[:, i], law.state[:, i], law.probability)
    return marginal


class Maskings(NamedTuple):
    """Every draw of M maskings that an estimator can make, R of them."""

    state: Int[np.ndarray, "r m"]
    """The masked set of each masking, as in `Unmaskings`."""
    weight: Float[np.ndarray, "r m l"]
    """Weight of log p(x_i) under the masking, as `likelihood.elbo` and `eubo` take it."""
    probability: Float[np.ndarray, " r"]


def uniform_time(length: int, minimum: float = 1e-3, nodes: int = 64) -> Maskings:
    """The law of `masking.mask_uniform`, one masking: t ~ U(minimum, 1), weight 1/t.

    Exact up to Gauss-Legendre quadrature over log t. As `minimum` -> 0 the bias vanishes and the
    variance grows like log(1/minimum): at a single masked position E 1/t^2 diverges.
    """
    x, w = np.polynomial.legendre.leggauss(nodes)
    half = -math.log(minimum) / 2
    t = np.exp(half * (x - 1))
    density = half * w * t / (1 - minimum)
    masks = hidden(length)
    count = np.sum(masks, axis=1)[None]
    probability = density[:, None] * t[:, None] ** count * (1 - t[:, None]) ** (length - count)
    weight = masks[None] / t[:, None, None]
    state = np.broadcast_to(np.arange(2**length), probability.shape)
    return Maskings(state.reshape(-1, 1), weight.reshape(-1, 1, length), probability.reshape(-1))


def uniform_count(length: int, samples: int) -> Maskings:
    """M independent maskings: a count k ~ U{1..L}, a random k positions, weight L / k."""
    count = np.sum(hidden(length), axis=1)
    one = [(s, 1 / (length * math.comb(length, k))) for s, k in enumerate(count) if k]
    return _counted(length, itertools.product(one, repeat=samples))


def stratified_count(length: int, samples: int) -> Maskings:
    """LLaDA's M maskings: counts spread evenly from a random one (`masking.stratified_counts`)."""
    draws: list[tuple[tuple[int, float], ...]] = []
    for first in range(length):
        shifts = ((2 * m * length + samples) // (2 * samples) for m in range(samples))
        counts = [(first + shift) % length + 1 for shift in shifts]
        sets = [_sets(range(length), count) for count in counts]
        sets[0] = [(s, p / length) for s, p in sets[0]]
        draws.extend(itertools.product(*sets))
    return _counted(length, draws)


def complementary(length: int) -> Maskings:
    """A random subset of k ~ U{1..L-1} positions and the rest, weights L / k and L / (L - k)."""
    whole = (1 << length) - 1
    draws = [
        ((s, p / (length - 1)), (whole - s, 1.0))
        for count in range(1, length)
        for s, p in _sets(range(length), count)
    ]
    return _counted(length, draws)


def all_masked(length: int) -> Maskings:
    """The one-step mean-field estimate: everything masked, weight 1; no randomness."""
    return _counted(length, [(((1 << length) - 1, 1.0),)])


def block_wise(length: int, block_length: int, samples: int, inside_only: bool) -> Maskings:
    """M maskings of `masking.block_random` without noise on a completion of full blocks.

    `inside_only` weighs the chosen block alone, L / k for its k masked positions: unbiased for
    the ELBO of `unmaskings(..., block_length)`. Otherwise every masked position counts, the later
    blocks' too, with L / (number masked), as SPG's code does.
    """
    blocks = length // block_length
    one = []
    for first in range(0, length, block_length):
        inside = range(first, first + block_length)
        later = (1 << length) - (1 << (first + block_length))
        counts = range(1, block_length + 1)
        one.append([(s | later, p / block_length) for k in counts for s, p in _sets(inside, k)])
    draws: list[tuple[tuple[int, float], ...]] = []
    for order in itertools.permutations(range(blocks)):
        chosen = [one[order[m % blocks]] for m in range(samples)]
        chosen[0] = [(s, p / math.factorial(blocks)) for s, p in chosen[0]]
        draws.extend(itertools.product(*chosen))
    law = _counted(length, draws)
    if not inside_only:
        return law
    masks = hidden(length)[law.state].reshape(*law.state.shape, blocks, block_length)
    partial = np.argmax(np.any(masks, axis=3), axis=2)  # the first block that hides something
    kept = masks & (np.arange(blocks) == partial[..., None])[..., None]
    weight = length * kept / np.sum(kept, axis=(2, 3), keepdims=True)
    return law._replace(weight=weight.reshape(law.weight.shape))


def _sets(positions: Iterable[int], count: int) -> list[tuple[int, float]]:
    """Every subset of `count` positions, with its probability."""
    sets = [sum(1 << i for i in chosen) for chosen in itertools.combinations(positions, count)]
    return [(s, 1 / len(sets)) for s in sets]


def _counted(length: int, draws: Iterable[tuple[tuple[int, float], ...]]) -> Maskings:
    """Maskings whose weight is L / (number masked) wherever something is masked."""
    rows = list(draws)
    state = np.array([[s for s, _ in draw] for draw in rows])
    masks = hidden(length)[state]
    probability = np.array([math.prod(p for _, p in draw) for draw in rows])
    return Maskings(state, length * masks / np.sum(masks, axis=2, keepdims=True), probability)


def moments(
    values: Float[Array, "r ..."], probability: Float[np.ndarray, " r"]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Mean and variance over the outcomes."""
    p = jnp.asarray(probability)
    mean = jnp.tensordot(p, values, 1, precision="highest")
    return mean, jnp.tensordot(p, jnp.square(values - mean[None]), 1, precision="highest")
