"""The oracle of likelihood estimators: bounds, biases and variances by exact enumeration.

Every expectation here is a finite sum over all orders of unmasking or all draws of masks.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from benchmarks import estimators
from dmrl.diffusion import bounds, likelihood

L = 4
ORDERS = bounds.unmaskings(L)
BETAS = (1.0, 1.5, 2.0, 3.0, 4.0, 8.0)
SEEDS = range(6)


@pytest.fixture(scope="module")
def tables():
    """log p(x_i | x without s) of one completion under several random models, [seed][S,L]."""
    _, prompt, bind = tiny.perceptron(L)
    tokens = jnp.array([0, 2, 1, 1])
    table = jax.jit(lambda params: bounds.masked_log_prob(bind(params), prompt, tokens))
    return [np.asarray(table(tiny.perceptron(L, seed=seed)[0])) for seed in SEEDS]


def of(f, table, *args):
    return float(f(jnp.asarray(table), *args))


def by_hand(table):
    """log p, ELBO and {beta: EUBO} from the definitions, orders one after the other."""
    orders = list(itertools.permutations(range(L)))
    seen = [[0] * L for _ in orders]
    for path, order in zip(seen, orders, strict=True):
        hidden = 2**L - 1
        for i in order:
            path[i] = hidden
            hidden -= 1 << i
    terms = np.array([[table[s, i] for i, s in enumerate(path)] for path in seen], np.float64)
    eubo = {b: np.sum(np.log(np.mean(np.exp(b * terms), axis=0))) / b for b in BETAS}
    return np.log(np.mean(np.exp(terms.sum(axis=1)))), np.mean(terms.sum(axis=1)), eubo


def test_the_table_holds_the_models_own_predictions():
    params, prompt, bind = tiny.perceptron(L)
    tokens = jnp.array([0, 2, 1, 1])
    table = bounds.masked_log_prob(bind(params), prompt, tokens)
    state = jnp.array([[0, tiny.MASK, 1, tiny.MASK]])
    valid = jnp.ones((1, 2), bool)
    row = likelihood.state_log_prob(bind(params), prompt[None], valid, state, tokens[None, None])
    np.testing.assert_allclose(table[0b1010], jnp.where(state[0] == 3, row[0, 0], 0), rtol=1e-5)


def test_probabilities_of_completions_sum_to_one():
    """log p is the law of a real sampler: over all completions it sums to 1."""
    params, prompt, bind = tiny.perceptron(3)
    every = jnp.array(list(itertools.product(range(tiny.MASK), repeat=3)))
    table = jax.vmap(lambda x: bounds.masked_log_prob(bind(params), prompt, x))
    tables = jax.jit(table)(every)
    for law in (
        bounds.unmaskings(3),
        bounds.unmaskings(3, steps=2),
        bounds.unmaskings(3, steps=5),
    ):
        total = jnp.sum(jnp.exp(jax.vmap(lambda t, law=law: bounds.log_likelihood(t, law))(tables)))
        assert float(total) == pytest.approx(1, abs=1e-5)


def test_the_functions_are_their_definitions(tables):
    for table in tables:
        log_p, elbo, eubo = by_hand(table)
        assert of(bounds.log_likelihood, table, ORDERS) == pytest.approx(log_p, rel=1e-5)
        assert of(bounds.elbo, table, ORDERS) == pytest.approx(elbo, rel=1e-5)
        for beta in BETAS:
            assert of(bounds.eubo, table, ORDERS, beta) == pytest.approx(eubo[beta], rel=1e-5)


def test_the_elbo_is_the_one_over_mask_subsets(tables):
    """LLaDA's eq. 6: a uniform count k, a uniform subset of that size, weight L / k."""
    hidden = bounds.hidden(L)
    count = hidden.sum(axis=1)
    weight = [1 / (L * math.comb(L, k)) * L / k if k else 0 for k in count]
    for table in tables:
        subsets = np.sum(np.array(weight) * np.sum(table * hidden, axis=1))
        assert of(bounds.elbo, table, ORDERS) == pytest.approx(subsets, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_parallel_steps_are_spgs_discretisation(tables, steps):
    """Eqs. 6 and 12: sum over t of (alpha_t - alpha_t+1) / (1 - alpha_t+1) P(z_t+1 = s)."""
    law, hidden = bounds.unmaskings(L, steps), bounds.hidden(L)
    assert law.probability.sum() == pytest.approx(1)
    alpha = 1 - np.arange(steps + 1) / steps
    weight = np.zeros((2**L, L))
    for t in range(steps):
        kept = np.where(hidden, 1 - alpha[t + 1], alpha[t + 1])
        rate = (alpha[t] - alpha[t + 1]) / (1 - alpha[t + 1])
        weight += rate * hidden * np.prod(kept, axis=1, keepdims=True)
    for table in tables[:2]:
        assert of(bounds.elbo, table, law) == pytest.approx(np.sum(weight * table), rel=1e-5)
        eubo = np.sum(np.log(np.sum(weight * np.exp(1.5 * table), axis=0))) / 1.5
        assert of(bounds.eubo, table, law, 1.5) == pytest.approx(eubo, rel=1e-5)
    if steps == 1:
        assert of(bounds.elbo, tables[0], law) == pytest.approx(tables[0][-1].sum(), rel=1e-5)


@pytest.mark.parametrize("steps", [None, 2, 8])
def test_the_bounds_sandwich_the_likelihood(tables, steps):
    law = bounds.unmaskings(L, steps)
    for table in tables:
        log_p = of(bounds.log_likelihood, table, law)
        assert of(bounds.elbo, table, law) < log_p + 1e-6
        for beta in BETAS:
            upper = of(bounds.eubo, table, law, beta)
            ours = bounds.eubo_constant(law, beta)
            assert log_p <= upper + ours + 1e-5
            if steps is not None:
                assert ours <= bounds.spg_constant(L, steps, beta)


def test_block_by_block_bounds_sandwich_the_block_samplers_likelihood(tables):
    law = bounds.unmaskings(L, block_length=2)
    assert len(law.probability) == 4
    for table in tables:
        log_p = of(bounds.log_likelihood, table, law)
        blocks = [[table[0b1111, 0], table[0b1110, 1]], [table[0b1111, 1], table[0b1101, 0]]]
        blocks += [[table[0b1100, 2], table[0b1000, 3]], [table[0b1100, 3], table[0b0100, 2]]]
        ways = np.exp(np.sum(blocks, axis=1))
        by_hand = np.log((ways[0] + ways[1]) / 2) + np.log((ways[2] + ways[3]) / 2)
        assert log_p == pytest.approx(by_hand, rel=1e-5)
        assert of(bounds.elbo, table, law) < log_p
        for beta in BETAS:
            assert (
                log_p <= of(bounds.eubo, table, law, beta) + bounds.eubo_constant(law, beta) + 1e-5
            )


def test_without_its_constant_the_eubo_of_small_beta_is_no_upper_bound(tables):
    gaps = [of(bounds.eubo, t, ORDERS, 1.0) - of(bounds.log_likelihood, t, ORDERS) for t in tables]
    assert min(gaps) < -0.05 < 0.01 < max(gaps)


def test_the_eubo_grows_with_beta_but_the_constant_shrinks(tables):
    """SPG calls beta near 1 the tighter bound: true of the varying part, not of the bound.

    The bound with the constant of Theorem 1 is the tightest at beta = L.
    """
    law = bounds.unmaskings(L, steps=8)
    for table in tables:
        varying = np.array([of(bounds.eubo, table, law, beta) for beta in BETAS])
        assert (np.diff(varying) > 0).all()
        whole = varying + [bounds.spg_constant(L, 8, beta) for beta in BETAS]
        ours = varying + [bounds.eubo_constant(law, beta) for beta in BETAS]
        assert BETAS[int(np.argmin(whole))] == BETAS[int(np.argmin(ours))] == L
        assert whole[0] - of(bounds.log_likelihood, table, law) > 30, "nats"


def test_theorem_1s_constant_diverges_and_ours_does_not():
    fine = [bounds.unmaskings(3, steps) for steps in (10, 100, 1000)]
    ours = [bounds.eubo_constant(law, 1.0) for law in fine]
    limit = bounds.eubo_constant(bounds.unmaskings(3), 1.0)
    assert ours[-1] == pytest.approx(limit, rel=1e-2)
    assert limit == pytest.approx(math.log(3**3 / 6 * 1 * 2 * 1))
    theirs = [bounds.spg_constant(3, steps, 1.0) for steps in (10, 100, 1000)]
    np.testing.assert_allclose(np.diff(theirs), 9 * math.log(10))


@pytest.mark.parametrize("steps", [None, 3])
def test_no_smaller_constant_serves_every_model_at_beta_1(steps):
    """A model sure along the rarest way and hopeless elsewhere meets the bound with equality."""
    law = bounds.unmaskings(L, steps)
    gaps = []
    for way in range(len(law.probability)):
        table = np.full((2**L, L), -40.0)
        table[law.state[way], np.arange(L)] = 0.0
        upper = of(bounds.eubo, table, law, 1.0)
        gaps.append(of(bounds.log_likelihood, table, law) - upper)
    assert max(gaps) == pytest.approx(bounds.eubo_constant(law, 1.0), rel=1e-4)


def test_theorem_1s_constant_is_the_one_of_its_proof():
    steps, n, beta = 3, 2, 1.5
    paths = list(itertools.product(range(steps), repeat=n))
    q = 1 / len(paths)
    proof = math.log(sum(q * q**-n for _ in paths)) / beta
    assert bounds.spg_constant(n, steps, beta) == pytest.approx(proof)
    assert bounds.spg_constant(n, steps, 2.0) == 0


def values(table, maskings):
    """(ELBO, EUBO) of every draw, from the estimators that training uses."""
    log_prob = jnp.asarray(table)[maskings.state]
    weight = jnp.asarray(maskings.weight)
    upper = jnp.sum(likelihood.eubo(log_prob, weight, 1.5), axis=-1)
    return likelihood.elbo(log_prob, weight), upper


def mean(values, maskings):
    return float(bounds.moments(values, maskings.probability)[0])


def variance(values, maskings):
    return float(bounds.moments(values, maskings.probability)[1])


UNBIASED = {
    "uniform count, m=1": bounds.uniform_count(L, 1),
    "uniform count, m=2": bounds.uniform_count(L, 2),
    **{f"stratified, m={m}": bounds.stratified_count(L, m) for m in (2, 3, 5)},
}


@pytest.mark.parametrize("name", UNBIASED)
def test_estimators_that_are_unbiased_for_the_elbo(tables, name):
    law = UNBIASED[name]
    assert law.probability.sum() == pytest.approx(1)
    for table in tables[:3]:
        got = mean(values(table, law)[0], law)
        assert got == pytest.approx(of(bounds.elbo, table, ORDERS), rel=1e-5)


def test_the_floor_of_uniform_time_trades_bias_for_variance(tables):
    """t ~ U(eps, 1): bias eps (ELBO - ELBO of the limit t = 0) at first order; without a floor
    the variance is infinite, growing by E 1/t^2 at one masked position per nat of 1/eps."""
    for table in tables[:3]:
        whole = of(bounds.elbo, table, ORDERS)
        clean = sum(table[1 << i, i] for i in range(L))
        laws = [bounds.uniform_time(L, floor) for floor in (1e-3, 1e-4, 1e-6)]
        elbo = [values(table, law)[0] for law in laws]
        assert mean(elbo[0], laws[0]) - whole == pytest.approx(1e-3 * (whole - clean), rel=0.02)
        var = [variance(x, law) for x, law in zip(elbo, laws, strict=True)]
        count = bounds.uniform_count(L, 1)
        assert variance(values(table, count)[0], count) < var[0]
        squares = sum(table[1 << i, i] ** 2 for i in range(L))
        assert (var[2] - var[1]) / math.log(100) == pytest.approx(squares, rel=0.01)


def test_complementary_pairs_drop_the_fully_masked_level(tables):
    law = bounds.complementary(L)
    for table in tables:
        whole = of(bounds.elbo, table, ORDERS)
        full = float(np.sum(table[-1]))
        got = mean(values(table, law)[0], law)
        assert got == pytest.approx((L * whole - full) / (L - 1), rel=1e-5)
        assert abs(got - whole) > 1e-3
        seen = (law.weight > 0).sum(axis=1)
        assert (seen == 1).all(), "each position exactly once"


def test_one_step_mean_field_is_one_level_of_the_elbo(tables):
    law = bounds.all_masked(L)
    for table in tables:
        (lower,), (upper,) = values(table, law)
        assert float(lower) == pytest.approx(float(np.sum(table[-1])), rel=1e-6)
        assert float(upper) == pytest.approx(float(lower), rel=1e-5)
    bias = [np.sum(t[-1]) - of(bounds.elbo, t, ORDERS) for t in tables]
    assert min(bias) < -0.1 < 0.1 < max(bias), "no bound in either direction"


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_block_maskings_are_unbiased_for_a_block_sampler_inside_the_block_only(tables, samples):
    blocks = bounds.unmaskings(L, block_length=2)
    inside = bounds.block_wise(L, 2, samples, inside_only=True)
    every = bounds.block_wise(L, 2, samples, inside_only=False)
    for table in tables[:3]:
        target = of(bounds.elbo, table, blocks)
        assert mean(values(table, inside)[0], inside) == pytest.approx(target, rel=1e-5)
        assert abs(mean(values(table, every)[0], every) - target) > 1e-2


def test_stratified_counts_and_pairs_have_less_variance_than_independent_ones(tables):
    free, spread = bounds.uniform_count(L, 2), bounds.stratified_count(L, 2)
    one = bounds.uniform_count(L, 1)
    for table in tables:
        alone, both = (variance(values(table, law)[0], law) for law in (one, free))
        assert both == pytest.approx(alone / 2, rel=1e-4)
        assert variance(values(table, spread)[0], spread) < both


def test_few_maskings_bias_spgs_upper_bound_in_two_directions(tables):
    """Inside the logarithm the mean is unbiased. Jensen then pulls down, and counting positions
    that no masking hid as the average of the others pushes up: log p_seen at the most."""
    laws = {m: bounds.uniform_count(L, m) for m in (1, 2, 4)}
    below, biases = [], {m: [] for m in laws}
    for table in tables[:3]:
        inside_exact = np.sum(np.exp(1.5 * table) * bounds._state_law(ORDERS), axis=0)
        slack = []
        for samples, law in laws.items():
            log_prob, weight = jnp.asarray(table)[law.state], jnp.asarray(law.weight)
            per_position = np.asarray(likelihood.eubo(log_prob, weight, 1.5))
            seen = (law.weight > 0).any(axis=1)
            inside = np.where(seen, np.exp(1.5 * per_position), 0)
            np.testing.assert_allclose(law.probability @ inside, inside_exact, rtol=1e-4)
            chance = law.probability @ seen
            np.testing.assert_allclose(chance, 1 - (1 - (L + 1) / (2 * L)) ** samples)
            given = law.probability @ (seen * per_position) / chance
            jensen = (np.log(inside_exact) - np.log(chance)) / 1.5 - given
            assert (jensen > 0).all()
            slack.append(jensen.sum())
            _, upper = likelihood.sandwich(log_prob, weight, jnp.full(len(seen), L), 1.5)
            estimate = L * mean(upper, law)
            biases[samples].append(estimate - of(bounds.eubo, table, ORDERS, 1.5))
            if samples == 2:
                below.append(estimate < of(bounds.log_likelihood, table, ORDERS))
        assert slack[0] > slack[2]
    assert max(biases[1]) > 0.1
    assert max(biases[4]) < -0.1
    assert any(below), "with the paper's m = 2 the estimate is no upper bound of log p"


def test_at_beta_1_one_masking_differs_from_the_elbo_by_the_weight_alone(tables):
    law = bounds.uniform_count(L, 1)
    log_prob, weight = jnp.asarray(tables[0])[law.state], jnp.asarray(law.weight)
    lower, upper = likelihood.sandwich(log_prob, weight, jnp.full(len(law.state), L), 1.0)
    t = (law.weight > 0).sum(axis=2)[:, 0] / L
    np.testing.assert_allclose(upper - lower, -np.log(t), atol=1e-5)


def scores(params, prompt, bind, tokens, law, beta):
    """Per draw, the gradients [R,D] of ELBO and EUBO of one masking, with exact denominators."""
    table_of = lambda p: bounds.masked_log_prob(bind(p), prompt, tokens)  # noqa: E731
    jacobian = jax.tree.leaves(jax.jit(jax.jacrev(table_of))(params))
    table = table_of(params)
    flat = jnp.concatenate([x.reshape(2**L, L, -1) for x in jacobian], axis=2)
    weight, state = jnp.asarray(law.weight)[:, 0], law.state[:, 0]
    power = jnp.exp(beta * table)
    rho = weight * power[state] / jnp.sum(power * bounds._state_law(ORDERS), axis=0)[None]
    of_weight = lambda w: jnp.einsum("rl,rld->rd", w, flat[state], precision="highest")  # noqa: E731
    return of_weight(weight), of_weight(rho), table_of


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_gradients_of_the_bounds_and_the_variance_optimal_mixture(beta):
    """SPG's eqs. 26 to 28 and Proposition 1, every draw of one masking enumerated."""
    tokens, law = jnp.array([0, 2, 1, 1]), bounds.uniform_count(L, 1)
    for seed in (0, 1):
        params, prompt, bind = tiny.perceptron(L, seed=seed)
        lower, upper, table_of = scores(params, prompt, bind, tokens, law, beta)
        for got, objective in (
            (lower, lambda p, t=table_of: bounds.elbo(t(p), ORDERS)),
            (upper, lambda p, t=table_of: bounds.eubo(t(p), ORDERS, beta)),
        ):
            expected = jnp.asarray(tiny.flat(jax.grad(objective)(params)))
            tiny.assert_close(bounds.moments(got, law.probability)[0], expected)
        p = jnp.asarray(law.probability, jnp.float32)
        omega = float(likelihood.optimal_omega(lower, upper, p))

        def total(w, lower=lower, upper=upper):
            mixed = likelihood.mixture(lower, upper, w)
            return float(jnp.sum(bounds.moments(mixed, law.probability)[1]))

        ends = (total(0.0), total(1.0))
        assert total(omega) < 0.999 * min(ends)
        for other in (omega - 0.1, omega + 0.1):
            assert total(other) > total(omega)


def test_where_the_optimal_omega_is_an_end_nothing_is_strictly_lower():
    """Proposition 1 needs omega* outside {0, 1}: here g_u = g_l + noise, and omega* = 0."""
    lower = jnp.array([[1.0], [1.0], [-1.0], [-1.0]])
    upper = lower + jnp.array([[1.0], [-1.0], [1.0], [-1.0]])
    p = jnp.full(4, 0.25)
    assert float(likelihood.optimal_omega(lower, upper, p)) == 0
    swapped = likelihood.optimal_omega(upper, lower, p)
    assert float(swapped) == 1
    outside = likelihood.optimal_omega(lower, 3 * lower, p)
    assert float(outside) == pytest.approx(-0.5), "nor need it lie between the ends"


@pytest.mark.slow
def test_the_benchmark_prints_a_table_of_all_estimators():
    lines = estimators.table(length=2, forwards=2, beta=1.5, seed=1).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert all(len(row) == 6 for row in rows)
    figures = {row[0]: [float(x) for x in row[2:]] for row in rows[2:]}
    assert len(figures) == 10
    for name in ("uniform count", "stratified count (LLaDA)", "block-wise, chosen block"):
        assert figures[name][0] == 0, name
    assert figures["one-step mean field (1 forward)"][2] == 0
    assert figures["uniform t >= 0.001, weight 1/t"][2] > figures["uniform count"][2]
    (best,) = (row for name, row in figures.items() if "least gradient variance" in name)
    assert best[3] < figures["EUBO, uniform count"][3]
    assert best[3] < figures["uniform count"][3]
