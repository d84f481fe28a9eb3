"""Bias and standard deviation of likelihood estimators at equal forwards, by enumeration.

    python benchmarks/estimators.py [--length=4] [--forwards=2] [--beta=1.5] [--seed=0]

Prints a markdown table for one completion of a random enumerable model: every draw of masks is
visited, so each figure is exact for that model, not an estimate. Nats per completion; the last
column is the square root of the total variance of the gradient over all parameters.
"""

import math
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from absl import app, flags  # noqa: E402

from dmrl.diffusion import bounds, exact, likelihood  # noqa: E402

LENGTH = flags.DEFINE_integer("length", 4, "Tokens of the completion, an even number")
FORWARDS = flags.DEFINE_integer("forwards", 2, "Maskings that each estimator may look at")
BETA = flags.DEFINE_float("beta", 1.5, "Exponent of the upper bound")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the model")

VOCAB, MASK = 4, 3


class Row(NamedTuple):
    """One estimator's figures."""

    name: str
    target: str
    bias: float
    gap: float
    deviation: float
    gradient: float


def model(length: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """log p of one completion under all maskings [S,L], and its Jacobian [S*L,D]."""
    params = exact.init(jax.random.key(seed), VOCAB, 2 + length)
    prompt, tokens = jnp.array([0, 1]), jnp.arange(length) % MASK

    def table(params: exact.Params) -> jax.Array:
        return bounds.masked_log_prob(exact.bind(params, MASK, -1), prompt, tokens)

    jacobian = jax.tree.leaves(jax.jit(jax.jacrev(table))(params))
    flat = jnp.concatenate([x.reshape(2**length * length, -1) for x in jacobian], axis=1)
    return table(params), flat


def rows(length: int, forwards: int, beta: float, seed: int) -> list[Row]:
    """Every estimator's figures with `forwards` maskings each; the one-step estimate has one."""
    table, jacobian = model(length, seed)
    orders = bounds.unmaskings(length)
    blocks = bounds.unmaskings(length, block_length=length // 2)
    count = bounds.uniform_count(length, forwards)
    lower = {
        "uniform t >= 0.001, weight 1/t": (bounds.uniform_time(length), forwards),
        "uniform count": (count, 1),
        "stratified count (LLaDA)": (bounds.stratified_count(length, forwards), 1),
        "one-step mean field (1 forward)": (bounds.all_masked(length), 1),
    }
    if forwards == 2:
        lower["complementary pair"] = (bounds.complementary(length), 1)
    by_block = {
        "block-wise, chosen block": bounds.block_wise(length, length // 2, forwards, True),
        "block-wise, all hidden (SPG's code)": bounds.block_wise(
            length, length // 2, forwards, False
        ),
    }
    whole = (
        float(bounds.elbo(table, orders)),
        float(bounds.log_likelihood(table, orders)),
    )
    half = (
        float(bounds.elbo(table, blocks)),
        float(bounds.log_likelihood(table, blocks)),
    )
    upper = bounds.eubo(table, orders, beta)
    ends = [_draws(omega, beta, count, table, jacobian)[1] for omega in (0.0, 1.0)]
    best = float(likelihood.optimal_omega(*ends, jnp.asarray(count.probability, jnp.float32)))
    figures = [
        _row(name, "ELBO", 0.0, beta, law, repeat, table, jacobian, whole)
        for name, (law, repeat) in lower.items()
    ]
    figures += [
        _row(name, "block ELBO", 0.0, beta, law, 1, table, jacobian, half)
        for name, law in by_block.items()
    ]
    mixtures = {
        "EUBO": 1.0,
        "mixture, omega=0.5": 0.5,
        f"mixture, omega={best:.2f} of least gradient variance": best,
    }
    for name, omega in mixtures.items():
        truth = (float(likelihood.mixture(jnp.asarray(whole[0]), upper, omega)), whole[1])
        target = name.split(",")[0]
        args = (beta, count, 1, table, jacobian, truth)
        figures.append(_row(f"{name}, uniform count", target, omega, *args))
    return figures


def _draws(
    omega: float, beta: float, law: bounds.Maskings, table: jax.Array, jacobian: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Value [R] and gradient [R,D] of (1 - omega) ELBO + omega EUBO, for every draw of `law`."""
    length = table.shape[1]

    def estimate(table: jax.Array, state: jax.Array, weight: jax.Array) -> jax.Array:
        bounds = likelihood.sandwich(table[state], weight, jnp.asarray(length), beta)
        return length * likelihood.mixture(*bounds, omega)

    each = jax.vmap(jax.value_and_grad(estimate), in_axes=(None, 0, 0))
    value, slope = jax.jit(each)(table, law.state, jnp.asarray(law.weight, jnp.float32))
    return value, jnp.matmul(slope.reshape(len(value), -1), jacobian, precision="highest")


def _row(
    name: str,
    target: str,
    omega: float,
    beta: float,
    law: bounds.Maskings,
    repeat: int,
    table: jax.Array,
    jacobian: jax.Array,
    truth: tuple[float, float],
) -> Row:
    """Figures of the mean of `repeat` draws; `truth` is (what it estimates, log p)."""
    value, gradient = _draws(omega, beta, law, table, jacobian)
    mean, variance = bounds.moments(value, law.probability)
    spread = jnp.sum(bounds.moments(gradient, law.probability)[1])
    deviation, noise = (math.sqrt(float(x) / repeat) for x in (variance, spread))
    return Row(name, target, float(mean) - truth[0], float(mean) - truth[1], deviation, noise)


def table(length: int, forwards: int, beta: float, seed: int) -> str:
    """The markdown table."""
    lines = [
        f"measured (exact enumeration): L={length}, {forwards} forwards, beta={beta}, seed={seed}",
        "",
        "| estimator | estimates | bias | mean - log p | std | gradient std |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows(length, forwards, beta, seed):
        figures = " | ".join(f"{round(x, 3) + 0.0:+.3f}" for x in (row.bias, row.gap))
        lines.append(
            f"| {row.name} | {row.target} | {figures} | {row.deviation:.3f} | {row.gradient:.3f} |"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Prints the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if LENGTH.value % 2 or LENGTH.value < 2 or FORWARDS.value < 1:
        raise app.UsageError("--length must be even and positive, --forwards at least 1")
    print(table(LENGTH.value, FORWARDS.value, BETA.value, SEED.value))


if __name__ == "__main__":
    app.run(main)
