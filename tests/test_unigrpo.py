"""UniGRPO: its sweep of mask ratios, its masks, and the gradient they give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import stats

from dmrl.algorithms import unigrpo
from dmrl.diffusion.likelihood import state_log_prob
from dmrl.types import TEMPLATE, Inner, Models

LENGTH, EOS, MU = 4, 2, 5
KEY = jax.random.key(0)


def inner(index, count=MU):
    return Inner(jnp.array(index), count, jax.random.key(4))


def case(rows=6, reward=None):
    """(parameters, params -> Denoiser, rollout): groups of two, one template position."""
    params, _, bind = tiny.perceptron(LENGTH, prompt=3, eos=EOS)
    keys = jax.random.split(jax.random.key(7), 3)
    tokens = jax.random.randint(keys[0], (rows, LENGTH), 0, tiny.MASK)
    reveal = jnp.broadcast_to(jnp.array([0, TEMPLATE, 1, 2]), tokens.shape)
    prompt = jax.random.randint(keys[1], (rows, 3), 0, tiny.MASK)
    reward = jax.random.uniform(keys[2], (rows,)) if reward is None else reward
    return params, bind, tiny.rollout(tokens, reveal, prompt, reward, jnp.arange(rows) // 2, EOS)


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def prepared(bind, params, rollout, hp, old=None, reference=None, index=2, key=KEY):
    trio = Models(bind(params), *(None if p is None else bind(p) for p in (old, reference)))
    return unigrpo.prepare(trio, rollout, None, key, inner(index), hp)


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def evaluated(bind, params, batch, hp):
    """((loss, metrics), gradient)."""

    def objective(params):
        return unigrpo.loss(Models(bind(params), None, None), batch, hp)

    return jax.value_and_grad(objective, has_aux=True)(params)


def gradient(bind, params, batch, hp):
    return evaluated(bind, params, batch, hp)[1]


def scaled(params, by):
    return jax.tree.map(lambda x: by * x, params)


def ratios(sweep, rows=4000, count=MU):
    hp = unigrpo.Hyper(sweep=sweep)
    row = jnp.arange(rows)
    return np.array([unigrpo.mask_ratio(row, inner(n, count), hp) for n in range(count)])


def test_the_rising_sweep_goes_evenly_from_the_row_s_own_start_to_everything_masked():
    t = ratios("rising")
    assert stats.kstest(t[0, t[0] > 0.02], stats.uniform(0.02, 0.98).cdf).pvalue > 1e-3
    assert len(np.unique(t[0])) > 3500
    free = t[0] > 0.02  # the lowest are lifted to t_min
    np.testing.assert_allclose(
        np.diff(t, axis=0)[:, free],
        np.broadcast_to((1 - t[0, free]) / 4, (4, free.sum())),
        atol=1e-6,
    )
    np.testing.assert_allclose(t[-1], 1.0)


def test_every_level_of_the_cyclic_sweep_is_uniform_and_they_are_mu_apart():
    t = ratios("cyclic")
    for level in t:
        assert stats.kstest(level[level > 0.02], stats.uniform(0.02, 0.98).cdf).pvalue > 1e-3
    sorted_t = np.sort(t, axis=0)
    np.testing.assert_allclose(np.diff(sorted_t, axis=0)[1:], 1 / MU, atol=1e-5)


@pytest.mark.parametrize("sweep", unigrpo.SWEEPS)
def test_a_single_inner_update_draws_its_ratio_from_the_clamped_uniform(sweep):
    t = ratios(sweep, count=1)[0]
    assert stats.kstest(t[t > 0.02], stats.uniform(0.02, 0.98).cdf).pvalue > 1e-3
    assert t.min() == np.float32(0.02)


def test_each_token_of_the_completion_is_masked_at_the_ratio_and_the_prompt_never():
    params, bind, rollout = case(rows=600)
    hp = unigrpo.Hyper()
    batch = prepared(bind, params, rollout, hp)
    hidden = np.asarray(batch.state == tiny.MASK)
    np.testing.assert_array_equal(batch.prompt, rollout.prompt)
    assert not hidden[:, 1].any(), "the template stays"
    np.testing.assert_array_equal(np.where(hidden, rollout.tokens, batch.state), rollout.tokens)
    t = np.asarray(unigrpo.mask_ratio(rollout.row, inner(2), hp))
    hits = hidden[:, [0, 2, 3]].sum(axis=1)
    deviation = (hits - 3 * t).sum() / np.sqrt((3 * t * (1 - t)).sum())
    assert abs(deviation) < 4
    assert hits[t > 0.9].mean() > 2.6
    assert hits[t < 0.65].mean() < 2.1


def test_the_masks_are_fresh_for_every_update_but_the_start_is_the_rollout_s():
    params, bind, rollout = case()
    hp = unigrpo.Hyper()
    one, two = (prepared(bind, params, rollout, hp, key=jax.random.key(k)) for k in (0, 1))
    assert (one.state != two.state).any()


def test_only_masked_tokens_up_to_eos_count_and_completions_weigh_the_same():
    params, bind, rollout = case(rows=600)
    batch = prepared(bind, params, rollout, unigrpo.Hyper())
    ended = jnp.cumsum(rollout.tokens == EOS, 1) - (rollout.tokens == EOS) > 0
    counted = np.asarray((batch.state == tiny.MASK) & ~ended)
    np.testing.assert_array_equal(batch.weight[:, 0] > 0, counted)
    some = counted.any(axis=1)
    assert 0 < some.sum() < 600
    np.testing.assert_allclose(batch.weight[:, 0].sum(axis=1), some / some.sum(), rtol=1e-5)


@pytest.mark.parametrize(("forwarded", "divide_by_std"), [(False, True), (True, False)])
def test_at_theta_old_the_gradient_is_reinforce(forwarded, divide_by_std):
    params, bind, rollout = case()
    hp = unigrpo.Hyper(beta=0.0, divide_by_std=divide_by_std)
    batch = prepared(bind, params, rollout, hp, params if forwarded else None)
    reward = rollout.reward.reshape(-1, 2)
    gap = reward - reward.mean(axis=1, keepdims=True)
    if divide_by_std:
        gap = gap / (jnp.abs(gap[:, :1]) + 1e-4)  # the population std of two
    counted = np.asarray(batch.weight[:, 0]) > 0

    def reinforce(params):
        log_prob = state_log_prob(bind(params), *batch[:4])[:, 0]
        total = jnp.zeros(())
        for j in np.flatnonzero(counted.any(axis=1)):
            total += jnp.mean(log_prob[j, counted[j]]) * gap.ravel()[j]
        return -total / counted.any(axis=1).sum()

    tiny.assert_close(gradient(bind, params, batch, hp), jax.jit(jax.grad(reinforce))(params))


def test_behaviour_and_reference_see_the_policy_s_masks():
    params, bind, rollout = case()
    hp = unigrpo.Hyper()
    batch = prepared(bind, params, rollout, hp, params, params)
    (loss, metrics), _ = evaluated(bind, params, batch, hp)
    expected = -jnp.sum(batch.weight * batch.advantage[..., None])
    assert float(loss) == pytest.approx(float(expected), abs=1e-5), "the ratio is 1"
    assert float(metrics["kl"]) == pytest.approx(0, abs=1e-6)
    assert unigrpo.needs(hp) == {"reference"}
    assert unigrpo.needs(unigrpo.Hyper(beta=0.0)) == frozenset()


def test_tied_groups_give_no_policy_gradient():
    params, bind, rollout = case(reward=jnp.array([0.5, 0.5, 1.0, 1.0, 0.0, 0.0]))
    hp = unigrpo.Hyper(beta=0.0)
    batch = prepared(bind, params, rollout, hp)
    assert (np.asarray(batch.weight) > 0).any()
    assert (tiny.flat(gradient(bind, params, batch, hp)) == 0).all()


def test_gradients_of_strided_microbatches_add_up():
    params, bind, rollout = case()
    hp = unigrpo.Hyper()
    batch = prepared(bind, params, rollout, hp, scaled(params, 0.9), scaled(params, 1.1))
    parts = [jax.tree.map(lambda x, i=i: x[i::3], batch) for i in range(3)]
    total = jax.tree.map(lambda *g: sum(g), *[gradient(bind, params, p, hp) for p in parts])
    tiny.assert_close(total, gradient(bind, params, batch, hp), rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"t_min": 0.0}, r"t_min=0.0 .*\(0, 1\]"),
        ({"sweep": "falling"}, "sweep='falling': choose one of .*'rising', 'cyclic'"),
        ({"epsilon": -1.0}, "epsilon=-1.0 must be positive"),
        ({"beta": -1.0}, "beta=-1.0"),
    ],
)
def test_impossible_hyper_parameters_say_what_is_possible(values, message):
    with pytest.raises(ValueError, match=message):
        unigrpo.Hyper(**values)
