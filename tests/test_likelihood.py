"""Estimates of log pi from several maskings: shapes, empty maskings, small probabilities."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dmrl.diffusion import likelihood
from dmrl.diffusion.noise import row_keys


def test_many_maskings_are_one_forward_each():
    params, _, bind = tiny.perceptron(4, prompt=2)
    denoiser = bind(params)
    keys = jax.random.split(jax.random.key(0), 3)
    prompt = jax.random.randint(keys[0], (3, 5, 2), 0, tiny.MASK + 1)
    state = jax.random.randint(keys[1], (3, 5, 4), 0, tiny.MASK + 1)
    labels = jax.random.randint(keys[2], (3, 4), 0, tiny.MASK)
    valid = jnp.array([[True, True], [False, True], [True, True]])
    got = likelihood.masks_log_prob(denoiser, prompt, valid, state, labels)
    assert got.shape == (3, 5, 4)
    for m in range(5):
        want = likelihood.state_log_prob(
            denoiser, prompt[:, m], valid, state[:, m], labels[:, None]
        )
        np.testing.assert_allclose(got[:, m], want[:, 0], rtol=1e-5)


def bounds(log_prob, weight, beta):
    log_prob, weight = jnp.asarray(log_prob), jnp.asarray(weight)
    length = jnp.full(log_prob.shape[:-2], log_prob.shape[-1])
    return likelihood.sandwich(log_prob, weight, length, beta)


def test_both_bounds_of_a_small_case_by_hand():
    log_prob = np.log([[0.5, 0.2, 0.9], [0.1, 0.4, 0.3]]).astype(np.float32)
    weight = np.array([[3.0, 0.0, 0.0], [1.5, 1.5, 0.0]], np.float32)
    lower, upper = bounds(log_prob, weight, 2.0)
    elbo = (3 * np.log(0.5) + 1.5 * np.log(0.1) + 1.5 * np.log(0.4)) / 2 / 3
    eubo = (np.log((3 * 0.25 + 1.5 * 0.01) / 2) + np.log(1.5 * 0.16 / 2)) / 2 / 2
    assert float(lower) == pytest.approx(elbo, rel=1e-5)
    assert float(upper) == pytest.approx(eubo, rel=1e-5), "over the two positions ever hidden"
    mixed = likelihood.mixture(lower, upper, 0.25)
    assert float(mixed) == pytest.approx(0.75 * elbo + 0.25 * eubo, rel=1e-5)


def test_the_upper_bound_stays_in_log_space():
    """exp(2 * -200) is 0 in float32: taking the power first would lose these tokens."""
    log_prob = np.full((2, 3), -200, np.float32)
    lower, upper = bounds(log_prob, np.ones((2, 3), np.float32), 2.0)
    assert float(lower) == float(upper) == pytest.approx(-200)


@pytest.mark.parametrize("beta", [1.0, 2.5])
def test_what_no_masking_hides_has_no_value_and_no_gradient(beta):
    """Even where its log-probability is -inf, and for a row of which nothing is hidden."""
    log_prob = jnp.array([[[-1.0, -jnp.inf], [-2.0, -jnp.inf]], [[-jnp.inf, -1.0]] * 2])
    weight = jnp.array([[[1.0, 0.0], [2.0, 0.0]], [[0.0, 0.0]] * 2])
    lower, upper = bounds(log_prob, weight, beta)
    assert float(lower[1]) == float(upper[1]) == 0
    slope = jax.grad(lambda x: jnp.sum(bounds(x, weight, beta)[0] + bounds(x, weight, beta)[1]))
    with jax.debug_nans(True):
        slope = np.asarray(slope(log_prob))
    assert np.isfinite(slope).all()
    np.testing.assert_array_equal(slope != 0, weight > 0)


def test_the_best_omega_minimises_the_summed_variance():
    keys = jax.random.split(jax.random.key(0), 3)
    lower, noise = (jax.random.normal(k, (50, 3)) for k in keys[:2])
    upper = 0.3 * lower + noise
    p = jax.nn.softmax(jax.random.normal(keys[2], (50,)))

    def variance(omega):
        mixed = likelihood.mixture(lower, upper, omega)
        centred = mixed - jnp.sum(p[:, None] * mixed, axis=0, keepdims=True)
        return float(jnp.sum(p[:, None] * centred**2))

    best = float(likelihood.optimal_omega(lower, upper, p))
    grid = np.linspace(-1, 2, 301)
    assert best == pytest.approx(grid[np.argmin([variance(w) for w in grid])], abs=0.01)


def subsets(length):
    """Every non-empty set of positions with its probability under a uniform count, then subset."""
    for count in range(1, length + 1):
        chosen = list(itertools.combinations(range(length), count))
        yield from ((c, 1 / (length * len(chosen))) for c in chosen)


def test_llada_s_estimate_is_unbiased_for_the_scored_tokens_given_the_others():
    """Against every masking of them by hand; a position before them is seen and never scored."""
    params, prompt, bind = tiny.perceptron(4)
    denoiser = bind(params)
    labels = jnp.array([1, 0, 2, 1])
    tokens = jnp.concatenate([prompt, labels])
    valid = jnp.ones((1, 6), bool)
    every = list(subsets(3))
    hidden = np.zeros((len(every), 6), bool)
    for i, (places, _) in enumerate(every):
        hidden[i, np.array(places) + 3] = True
    states = jnp.where(hidden, tiny.MASK, tokens[None])
    many = (jnp.broadcast_to(x, (len(every), *x.shape[-1:])) for x in (valid, tokens))
    seen, truth = many
    log_p = denoiser.log_prob(denoiser.encode(states, seen), truth[..., None])[..., 0]
    weight = np.array([probability * 3 / len(places) for places, probability in every])
    want = float(jnp.sum(jnp.where(hidden, log_p, 0.0) * weight[:, None]))
    alone = float(log_p[[places for places, _ in every].index((2,)), 5])
    rows = 2000
    scored = jnp.broadcast_to(jnp.array([False, True, True, True]), (rows, 4))
    copies = jnp.broadcast_to(tokens, (rows, 6)), jnp.broadcast_to(valid, (rows, 6))
    keys = row_keys(jax.random.key(4), jnp.arange(rows))
    estimate = jax.jit(lambda at: likelihood.stratified_elbo(denoiser, *copies, at, keys, 2))
    found = estimate(scored)
    error = float(jnp.std(found)) / np.sqrt(rows)
    assert abs(float(jnp.mean(found)) - want) < 4 * error
    last = jnp.broadcast_to(jnp.array([False, False, False, True]), (rows, 4))
    np.testing.assert_allclose(estimate(last), alone, rtol=1e-5)
    # A batch with longer texts has more columns before the scored ones.
    np.testing.assert_allclose(estimate(scored[:, 1:]), found, rtol=1e-5)
