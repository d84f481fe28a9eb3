"""DiSPO: states, masks, weights and ratios of its step term. Its theorems: test_dispo_theorems."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dmrl.algorithms import diffu_grpo, dispo
from dmrl.diffusion.likelihood import state_log_prob
from dmrl.diffusion.masking import mask_prompt
from dmrl.diffusion.probe import fill
from dmrl.types import TEMPLATE, Models, Probe

M = tiny.MASK
THEORY = {"ratio_level": "sequence", "epsilon": None, "beta": 0.0, "p_mask_prompt": 0.0}
KEY = jax.random.key(5)


def objective(bind, batch, hp):
    return lambda params: dispo.loss(Models(bind(params), None, None), batch, hp)[0]


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def gradient(bind, params, batch, hp):
    return jax.grad(objective(bind, batch, hp))(params)


def trajectory(rows=6, eos=tiny.NO_EOS):
    """(parameters, params -> Denoiser, rollout) of length 5; groups of three."""
    params, _, bind = tiny.perceptron(5, prompt=3, eos=eos)
    keys = jax.random.split(jax.random.key(3), 2)
    tokens = jax.random.randint(keys[0], (rows, 5), 0, M)
    reveal = jnp.broadcast_to(jnp.array([2, 0, TEMPLATE, 1, 3]), tokens.shape)
    prompt = jax.random.randint(keys[1], (rows, 3), 0, M)
    return params, bind, tiny.rollout(tokens, reveal, prompt, group=jnp.arange(rows) // 3, eos=eos)


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def probed(bind, params, rollout, hp):
    key = jax.random.key(0)
    plan = dispo.probes(rollout, key, hp)
    probe = fill(bind(params), rollout, plan, jax.random.fold_in(key, 1))
    return probe._replace(reward=tiny.reward_of(probe.fills))


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def batch_of(bind, params, rollout, probe, hp, old=None, reference=None):
    trio = Models(bind(params), *(None if p is None else bind(p) for p in (old, reference)))
    return dispo.prepare(trio, rollout, probe, KEY, tiny.INNER, hp)


def scaled(params, by):
    return jax.tree.map(lambda x: by * x, params)


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_tied_rewards_give_no_gradient(ratio_level):
    params, bind, rollout = trajectory()
    hp = dispo.Hyper(beta=0.0, ratio_level=ratio_level)
    probe = probed(bind, params, rollout, hp)
    probe = probe._replace(reward=jnp.full(probe.reward.shape, 0.5))
    batch = batch_of(bind, params, rollout, probe, hp, scaled(params, 0.9))
    assert (tiny.flat(gradient(bind, params, batch, hp)) == 0).all()


def test_no_gradient_reaches_logits_off_the_mask():
    params, bind, rollout = trajectory()
    hp = dispo.Hyper(states=2, p_mask_prompt=0.0)
    other = scaled(params, 0.9)
    probe = probed(bind, params, rollout, hp)
    batch = batch_of(bind, params, rollout, probe, hp, other, other)
    denoiser = bind(params)

    def nudged(by):
        policy = denoiser._replace(encode=lambda *read: denoiser.encode(*read[:2]) + by)
        return dispo.loss(Models(policy, None, None), batch, hp)[0]

    slope = jax.grad(nudged)(jnp.zeros((12, 8, 8)))
    touched = np.abs(np.asarray(slope)).sum(axis=-1) > 0
    np.testing.assert_array_equal(touched[:, 3:], batch.state == M)
    assert not touched[:, :3].any()


def test_the_ratio_is_one_at_theta_old():
    params, bind, rollout = trajectory()
    probe = probed(bind, params, rollout, dispo.Hyper(states=2))
    for level in ("token", "sequence"):
        hp = dispo.Hyper(states=2, ratio_level=level)
        # Not compiled: then the same operations run, and equality is exact.
        trio = Models(bind(params), bind(params), bind(params))
        batch = dispo.prepare(trio, rollout, probe, KEY, tiny.INNER, hp)
        log_prob = state_log_prob(bind(params), *batch[:4])
        read = (batch.weight > 0) & (batch.advantage != 0)[..., None]  # of ties it is left out
        np.testing.assert_array_equal(batch.old, jnp.where(read, log_prob, 0))
        assert (batch.prompt != jnp.repeat(rollout.prompt, 2, axis=0)).any()
        loss, metrics = dispo.loss(Models(bind(params), None, None), batch, hp)
        expected = -float(jnp.sum(batch.weight * batch.advantage[..., None]))
        assert float(loss) == pytest.approx(expected, abs=1e-6)
        assert float(metrics["kl"]) == pytest.approx(0, abs=1e-7)


def test_terms_that_share_a_key_share_the_prompt_mask():
    params, bind, rollout = trajectory()
    hp = dispo.Hyper(states=2)
    rollout = rollout._replace(reward=jnp.arange(6.0))
    step = batch_of(bind, params, rollout, probed(bind, params, rollout, hp), hp)
    terminal = diffu_grpo.prepare(
        Models(bind(params), None, None), rollout, None, KEY, tiny.INNER, diffu_grpo.Hyper()
    )
    np.testing.assert_array_equal(step.prompt, jnp.repeat(terminal.prompt, 2, axis=0))
    expected = mask_prompt(KEY, rollout.row, rollout.prompt, 0.15, M)
    np.testing.assert_array_equal(terminal.prompt, expected)


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        ("late", [1, 2**4, 3**4, 4**4]),
        ("early", [4**4, 3**4, 2**4, 1]),
        ("uniform", [1, 1, 1, 1]),
    ],
)
def test_the_laws_of_the_state_step(law, expected):
    weights = jnp.exp(dispo.state_log_weights(jnp.array([4, 2]), 6, law, 4.0))
    weights = np.asarray(weights / weights.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(weights[0], np.array([*expected, 0, 0]) / sum(expected), rtol=1e-5)
    assert (weights[1, :2] > 0).all()
    assert (weights[1, 2:] == 0).all()


def test_the_late_law_draws_most_states_near_the_end():
    log_weights = dispo.state_log_weights(jnp.array([128]), 128, "late", 4.0)
    late = jnp.arange(128) / 128 >= 0.7
    assert float(jnp.sum(jax.nn.softmax(log_weights[0]) * late)) == pytest.approx(0.83, abs=0.01)


def test_a_row_that_revealed_nothing_has_one_state():
    log_weights = dispo.state_log_weights(jnp.array([0]), 3, "late", 4.0)
    assert log_weights[0].tolist() == [0, -jnp.inf, -jnp.inf]


def test_drawn_steps_follow_the_law_and_a_group_shares_them():
    _, _, rollout = trajectory(rows=9_000)
    hp = dispo.Hyper(states=2, exponent=2.0)
    step = np.asarray(dispo.probes(rollout, jax.random.key(0), hp).step)
    groups = step.reshape(-1, 3, 2)
    assert (groups == groups[:, :1]).all()
    law = {t: (t + 1) ** 2 / 30 for t in range(4)}
    for state in range(2):
        assert tiny.chi_square(groups[:, 0, state].tolist(), law) > 1e-3
    pairs = [tuple(pair) for pair in groups[:, 0].tolist()]
    product = {(a, b): law[a] * law[b] for a in law for b in law}
    assert tiny.chi_square(pairs, product) > 1e-3


def test_every_drawn_state_has_a_mask():
    params, bind, rollout = trajectory()
    hp = dispo.Hyper(states=20, state_law="uniform", p_mask_prompt=0.0)
    probe = probed(bind, params, rollout, hp)
    assert (probe.state == M).any(axis=-1).all()
    assert len(np.unique(np.asarray(probe.step))) == 4


def test_a_plan_carries_fillings_and_branch_temperature():
    params, bind, rollout = trajectory()
    plan = dispo.probes(rollout, KEY, dispo.Hyper(fillings=3, branch_temperature=0.3))
    assert (plan.fillings, plan.temperature) == (3, 0.3)
    greedy = dispo.Hyper(fillings=3, branch_temperature=0.0)
    fills = probed(bind, params, rollout, greedy).fills
    np.testing.assert_array_equal(fills, jnp.broadcast_to(fills[:, :, :1], fills.shape))


def test_several_states_are_averaged():
    params, bind, rollout = trajectory()
    hp = dispo.Hyper(states=2, **THEORY)
    probe = probed(bind, params, rollout, hp)

    def value(probe):
        batch = batch_of(bind, params, rollout, probe, hp, scaled(params, 0.9))
        return batch, float(objective(bind, batch, hp)(params))

    batch, together = value(probe)
    assert batch.state.shape == (12, 5)
    np.testing.assert_array_equal(batch.state.reshape(6, 2, 5), probe.state)
    apart = [value(Probe(*(x[:, k : k + 1] for x in probe)))[1] for k in range(2)]
    assert together == pytest.approx(np.mean(apart), rel=1e-5)
    assert abs(together) > 1e-4


def test_weights_stop_at_the_filling_s_own_eos():
    params, bind, rollout = trajectory(rows=1, eos=2)
    state = jnp.array([[[M, 1, 0, M, M]]])
    fills = jnp.array([[[[0, 1, 0, 2, 1], [2, 1, 0, 0, 0], [0, 1, 0, 1, 2]]]])
    probe = Probe(jnp.array([[1]]), state, fills, jnp.array([[[1.0, 0.0, 0.5]]]))
    hp = dispo.Hyper(beta=0.0)
    batch = batch_of(bind, params, rollout, probe, hp)
    expected = [[1, 0, 0, 1, 0], [1, 0, 0, 0, 0], [1, 0, 0, 1, 1]]
    np.testing.assert_allclose(batch.weight[0], np.array(expected) / 6, rtol=1e-6)
    ended = probe._replace(state=jnp.array([[[0, 2, 0, M, M]]]), fills=fills.at[..., 1].set(2))
    empty = batch_of(bind, params, rollout, ended, hp)
    assert (np.asarray(empty.weight) == 0).all()
    assert (tiny.flat(gradient(bind, params, empty, hp)) == 0).all()


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_gradients_of_strided_microbatches_add_up(ratio_level):
    params, bind, rollout = trajectory()
    hp = dispo.Hyper(states=2, ratio_level=ratio_level)
    probe = probed(bind, params, rollout, hp)
    batch = batch_of(bind, params, rollout, probe, hp, scaled(params, 0.9), scaled(params, 1.1))
    whole = gradient(bind, params, batch, hp)
    for cuts in (2, 3, 12):
        parts = [jax.tree.map(lambda x, i=i, n=cuts: x[i::n], batch) for i in range(cuts)]
        total = jax.tree.map(lambda *g: sum(g), *[gradient(bind, params, p, hp) for p in parts])
        tiny.assert_close(total, whole, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fillings": 1}, "need fillings >= 2"),
        ({"states": 0}, "states >= 1"),
        ({"state_law": "middle"}, "state_law='middle': choose one of .*'late', 'uniform', 'early'"),
        ({"gradient": "none"}, "gradient='none': choose one of .*'action', 'all'"),
        ({"baseline": "median"}, "baseline='median': choose one of .*'mean', 'leave_one_out'"),
        ({"epsilon": -1.0}, "epsilon=-1.0"),
        ({"p_mask_prompt": -0.1}, "p_mask_prompt=-0.1"),
        ({"ratio_level": "word"}, "ratio_level='word'"),
    ],
)
def test_impossible_hyper_parameters_say_what_is_possible(values, message):
    with pytest.raises(ValueError, match=message):
        dispo.Hyper(**values)
