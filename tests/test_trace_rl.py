"""TraceRL: rows of a trace, its two normalisers, and the exact gradient of an unmerged trace."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dmrl.algorithms import trace_rl
from dmrl.diffusion import exact
from dmrl.diffusion.likelihood import state_log_prob
from dmrl.diffusion.sampler import Sampling
from dmrl.types import TEMPLATE, Models

LENGTH, EOS = 5, 2
KEY = jax.random.key(0)
PAIRS = trace_rl.Hyper(shrink=2, states=2)
"""Five positions, one of them template, four steps: two rows a completion."""


def case(rows=6, reward=None):
    """(parameters, params -> Denoiser, rollout): groups of three, one template position."""
    params, _, bind = tiny.perceptron(LENGTH, prompt=3, eos=EOS)
    keys = jax.random.split(jax.random.key(7), 4)
    tokens = jax.random.randint(keys[0], (rows, LENGTH), 0, tiny.MASK)
    orders = jax.vmap(lambda k: jax.random.permutation(k, 4))(jax.random.split(keys[3], rows))
    reveal = jnp.insert(orders, 1, TEMPLATE, axis=1)
    prompt = jax.random.randint(keys[1], (rows, 3), 0, tiny.MASK)
    reward = jax.random.uniform(keys[2], (rows,)) if reward is None else reward
    return params, bind, tiny.rollout(tokens, reveal, prompt, reward, jnp.arange(rows) // 3, EOS)


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def prepared(bind, params, rollout, hp, old=None, key=KEY):
    trio = Models(bind(params), None if old is None else bind(old), None)
    return trace_rl.prepare(trio, rollout, None, key, tiny.INNER, hp)


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def evaluated(bind, params, batch, hp):
    """((loss, metrics), gradient)."""

    def objective(params):
        return trace_rl.loss(Models(bind(params), None, None), batch, hp)

    return jax.value_and_grad(objective, has_aux=True)(params)


def gradient(bind, params, batch, hp):
    return evaluated(bind, params, batch, hp)[1]


def scaled(params, by):
    return jax.tree.map(lambda x: by * x, params)


def rows_of(rollout, shrink):
    """Every (completion, state, positions of its tokens up to EOS) of the trace, one by one."""
    tokens, reveal = np.asarray(rollout.tokens), np.asarray(rollout.reveal_step)
    for j, first in itertools.product(range(len(tokens)), range(0, 4, shrink)):
        ends = [k for k in range(LENGTH) if tokens[j, k] == EOS]
        stop = ends[0] if ends else LENGTH
        targets = [
            k for k in range(stop + 1) if k < LENGTH and first <= reveal[j, k] < first + shrink
        ]
        if targets:
            yield j, np.where(reveal[j] < first, tokens[j], tiny.MASK), targets


def test_an_item_is_the_state_before_its_merged_steps_with_the_tokens_they_revealed():
    params, bind, rollout = case()
    batch = prepared(bind, params, rollout, PAIRS)
    want = list(rows_of(rollout, 2))
    weight = np.asarray(batch.weight[:, 0])
    some = np.flatnonzero(weight.any(axis=1))
    assert 0 < len(some) == len(want) < 12, "rows whose tokens all follow EOS leave the mean"
    for item, (j, state, targets) in zip(some, want, strict=True):
        assert item // 2 == j
        np.testing.assert_array_equal(batch.state[item], state)
        assert np.flatnonzero(weight[item]).tolist() == targets
        np.testing.assert_allclose(weight[item, targets], 1 / (len(targets) * len(want)), rtol=1e-5)
    np.testing.assert_array_equal(batch.prompt, jnp.repeat(rollout.prompt, 2, axis=0))


@pytest.mark.parametrize(("forwarded", "shrink"), [(False, 1), (True, 2)])
def test_at_theta_old_the_gradient_is_reinforce_with_standardised_rewards(shrink, forwarded):
    """The penalty to theta_old has no value and no gradient there."""
    params, bind, rollout = case()
    hp = trace_rl.Hyper(shrink=shrink)
    batch = prepared(bind, params, rollout, hp, params if forwarded else None)
    groups = np.asarray(rollout.reward).reshape(-1, 3)
    centred = groups - groups.mean(axis=1, keepdims=True)
    z = (centred / (groups.std(axis=1, keepdims=True) + 1e-4)).ravel()
    rows = list(rows_of(rollout, shrink))
    j = np.array([row[0] for row in rows])
    states = jnp.array([row[1] for row in rows])
    share = np.zeros(states.shape, np.float32)
    for i, (_, _, targets) in enumerate(rows):
        share[i, targets] = 1 / len(targets)

    def reinforce(params):
        args = (rollout.prompt[j], rollout.prompt_valid[j], states, rollout.tokens[j][:, None])
        log_prob = state_log_prob(bind(params), *args)[:, 0]
        return -jnp.sum(log_prob * share * z[j][:, None].astype(np.float32)) / len(rows)

    (loss, metrics), grad = evaluated(bind, params, batch, hp)
    tiny.assert_close(grad, jax.jit(jax.grad(reinforce))(params))
    assert ("kl" in metrics) == forwarded
    if forwarded:
        assert float(metrics["kl"]) == pytest.approx(0, abs=1e-6)
        value = -(share.sum(axis=1) * z[j]).mean()
        assert float(loss) == pytest.approx(value, abs=1e-5)


def test_the_penalty_is_the_kl_to_theta_old_summed_over_the_tokens_of_a_row():
    params, bind, rollout = case(reward=jnp.ones(6))  # no advantage: the penalty alone
    hp = trace_rl.Hyper(shrink=2, states=2, beta=0.5)
    old = scaled(params, 0.8)
    batch = prepared(bind, params, rollout, hp, old)
    (loss, metrics), _ = evaluated(bind, params, batch, hp)
    rows = list(rows_of(rollout, 2))
    j, states = np.array([row[0] for row in rows]), jnp.array([row[1] for row in rows])

    @jax.jit
    def score(params):
        args = (rollout.prompt[j], rollout.prompt_valid[j], states, rollout.tokens[j][:, None])
        return state_log_prob(bind(params), *args)[:, 0]

    gap = np.asarray(score(old) - score(params))
    k3 = np.exp(gap) - gap - 1
    summed = sum(k3[i, targets].sum() for i, (_, _, targets) in enumerate(rows)) / len(rows)
    mean = sum(k3[i, targets].mean() for i, (_, _, targets) in enumerate(rows)) / len(rows)
    assert float(loss) == pytest.approx(0.5 * summed, rel=1e-4)
    assert float(metrics["kl"]) == pytest.approx(mean, rel=1e-4)
    assert summed > 1.2 * mean


def test_the_expected_gradient_of_the_unmerged_trace_is_that_of_the_expected_reward():
    """Random order, one token a step, rewards as advantages: E[-grad L] = grad E[r] / steps."""
    length, vocab, mask = 3, 3, 2
    params, prompt, bind = tiny.perceptron(length, vocab=vocab, mask=mask)
    config = Sampling(length, length, length, temperature=1.0, order="random")
    law = exact.sampler_law(bind(params), prompt, jnp.full((length,), mask), vocab, config)
    n = len(law)
    assert n == 2**3 * 6
    tokens, reveal = (jnp.array([outcome[i] for outcome in law]) for i in (0, 1))
    reward = jax.random.uniform(jax.random.key(11), (2, 2, 2))
    rollout = tiny.rollout(tokens, reveal, jnp.broadcast_to(prompt, (n, 2)), jnp.zeros(n))
    hp = trace_rl.Hyper(shrink=1, states=length, beta=0.0)
    batch = prepared(bind, params, rollout, hp)
    likely = jnp.array(list(law.values())) * reward[tuple(tokens.T)] * n
    advantage = jnp.repeat(likely, length)[:, None]
    got = gradient(bind, params, batch._replace(advantage=advantage), hp)

    def expected_reward(params):
        """Sum over orders and tokens of r prod_t p(x_t | z_t), from a table of all states."""
        states = jnp.array(list(itertools.product(range(vocab), repeat=length)))
        inputs = jnp.concatenate([jnp.broadcast_to(prompt, (len(states), 2)), states], axis=1)
        denoiser = bind(params)
        hidden = denoiser.encode(inputs, jnp.ones(inputs.shape, bool))[:, 2:]
        table = jax.nn.softmax(denoiser.logits(hidden)).reshape(-1, length, vocab)
        orders = np.array(list(itertools.permutations(range(length))))
        done = np.array(list(itertools.product(range(mask), repeat=length)))
        order, done = np.repeat(orders, len(done), 0), np.tile(done, (len(orders), 1))
        row, state, chance = np.arange(len(done)), np.full_like(done, mask), 1.0
        for k in order.T:
            chance *= table[state @ np.array([9, 3, 1]), k, done[row, k]]
            state[row, k] = done[row, k]
        return jnp.sum(chance * reward[tuple(done.T)]) / len(orders)

    value, want = jax.jit(jax.value_and_grad(expected_reward))(params)
    assert float(value) == pytest.approx(float(jnp.mean(likely)), rel=1e-5), "the sampler's law"
    tiny.assert_close(jax.tree.map(lambda g: -length * g, got), want)


def test_fewer_rows_give_the_whole_gradient_on_average():
    params, bind, rollout = case()
    whole, hp = trace_rl.Hyper(shrink=1), trace_rl.Hyper(shrink=1, states=1)
    want = gradient(bind, params, prepared(bind, params, rollout, whole), whole)
    draws = 3000
    batches = jax.vmap(lambda key: prepared(bind, params, rollout, hp, key=key))(
        jax.random.split(KEY, draws)
    )
    together = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
    assert together.state.shape[0] == draws * 6
    got = gradient(bind, params, together._replace(weight=together.weight / draws), hp)
    tiny.assert_close(got, want, rtol=0.08)


def test_tied_groups_give_no_policy_gradient():
    params, bind, rollout = case(reward=jnp.array([0.5] * 3 + [1.0] * 3))
    batch = prepared(bind, params, rollout, PAIRS)
    assert (tiny.flat(gradient(bind, params, batch, PAIRS)) == 0).all()


def test_gradients_of_strided_microbatches_add_up():
    params, bind, rollout = case()
    batch = prepared(bind, params, rollout, PAIRS, scaled(params, 0.9))
    parts = [jax.tree.map(lambda x, i=i: x[i::3], batch) for i in range(3)]
    total = jax.tree.map(lambda *g: sum(g), *[gradient(bind, params, p, PAIRS) for p in parts])
    tiny.assert_close(total, gradient(bind, params, batch, PAIRS), rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shrink": 0}, "shrink >= 1 .*self.shrink=0"),
        ({"states": 0}, "states >= 1.*self.states=0"),
        ({"epsilon": 0.0}, "epsilon=0.0 must be positive"),
        ({"beta": -1.0}, "beta=-1.0"),
    ],
)
def test_impossible_hyper_parameters_say_what_is_possible(values, message):
    with pytest.raises(ValueError, match=message):
        trace_rl.Hyper(**values)
