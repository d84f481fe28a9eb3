"""CJ-GRPO: the authors' numbers, and the exact policy gradient of a trajectory."""

import functools
import itertools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dmrl import models
from dmrl.algorithms import cj_grpo, surrogate
from dmrl.diffusion import exact
from dmrl.diffusion.likelihood import state_log_prob
from dmrl.diffusion.sampler import Sampling
from dmrl.types import TEMPLATE, Models

LENGTH, STEPS, EOS = 4, 3, 2
KEY = jax.random.key(0)


def test_golden_loss_gradient_and_metrics(recorded):
    tensors, cases, cfg, params = recorded
    names = [name for name in cases if name.startswith("cj_grpo/")]
    assert len(names) == 2
    trajectory, unmasked = tensors["cj_grpo/trajectory"], tensors["cj_grpo/unmask_positions"]
    prompt, steps = tensors["prompt_ids"].shape[1], len(unmasked)
    rollout = tiny.rollout(
        trajectory[-1][:, prompt:],
        jnp.argmax(unmasked, axis=0),
        tensors["prompt_ids"],
        tensors["rewards"],
        eos=cfg.eos_token_id,
    )
    trio = Models(models.bind(cfg, {"params": params}, keep_mask=True), None, None)
    hp = cj_grpo.Hyper(states=steps, count_after_eos=True)
    made = jax.jit(lambda r: cj_grpo.prepare(trio, r, None, KEY, tiny.INNER, hp))(rollout)
    # Items are row by row: a completion's states in the order of its steps.
    states = jnp.moveaxis(trajectory[:-1, :, prompt:], 0, 1).reshape(made.state.shape)
    np.testing.assert_array_equal(made.state, states)

    def items(name):
        return jnp.moveaxis(tensors[f"cj_grpo/{name}"], 0, 1).reshape(made.weight.shape)

    for name in names:
        case = cases[name]
        hp = cj_grpo.Hyper(beta=case["beta"])
        assert hp.epsilon == case["epsilon"]
        reference = items("ref_per_token_logps") if case["beta"] else None
        batch = made._replace(old=items("old_per_token_logps"), reference=reference)

        def objective(params, batch, hp=hp):
            policy = models.bind(cfg, {"params": params}, keep_mask=True)
            return cj_grpo.loss(Models(policy, None, None), batch, hp)

        (loss, metrics), grad = jax.jit(jax.value_and_grad(objective, has_aux=True))(params, batch)
        assert float(loss) == pytest.approx(case["loss"], rel=1e-4), name
        if case["beta"]:
            assert float(metrics["kl"]) == pytest.approx(case["kl"][0], rel=1e-4), name
        # The authors count tokens outside the range where the clip is not active.
        ratio = jnp.exp(items("per_token_logps") - batch.old)
        outside = jnp.sum(batch.weight * (jnp.abs(ratio - 1) > hp.epsilon))
        both = float(metrics["clip_ratio/region_mean"]) + case["clip_ratio"][0]
        assert both == pytest.approx(float(outside), abs=1e-6), name
        goldens.assert_gradient(grad, case, tensors, name)


def test_the_expected_gradient_is_that_of_the_expected_reward():
    """Random order, one token a step, groups of two with their mean as baseline:
    E[-grad L] = (1/2) grad E[r] / steps, where 1/2 is (G-1)/G."""
    length, mask = 2, tiny.MASK
    params, prompt, bind = tiny.perceptron(length)
    config = Sampling(length, length, length, temperature=1.0, order="random")
    law = exact.sampler_law(bind(params), prompt, jnp.full((length,), mask), tiny.VOCAB, config)
    n = len(law)
    assert n == 3**2 * 2
    tokens, reveal = (jnp.array([outcome[i] for outcome in law]) for i in (0, 1))
    reward, p = tiny.reward_of(tokens), jnp.array(list(law.values()))
    x, y = (i.ravel() for i in jnp.meshgrid(jnp.arange(n), jnp.arange(n), indexing="ij"))
    pairs = jnp.stack([x, y], axis=1).ravel()
    rollout = tiny.rollout(
        tokens[pairs],
        reveal[pairs],
        jnp.broadcast_to(prompt, (2 * n * n, 2)),
        reward[pairs],
        jnp.repeat(jnp.arange(n * n), 2),
    )
    hp = cj_grpo.Hyper(states=length, beta=0.0)
    batch = prepared(bind, params, rollout, hp)
    # The mean over pairs becomes an expectation; |U| is the number of rows at every step.
    likely = jnp.repeat(jnp.repeat(p[x] * p[y], 2) * n * n, length)[:, None]
    got = gradient(bind, params, batch._replace(advantage=batch.advantage * likely), hp)

    def expected_reward(params):
        """Sum over both orders and all tokens of r p(first | all masked) p(second | first)."""
        states = jnp.array(list(itertools.product(range(tiny.VOCAB), repeat=2)))
        inputs = jnp.concatenate([jnp.broadcast_to(prompt, (16, 2)), states], axis=1)
        denoiser = bind(params)
        hidden = denoiser.encode(inputs, jnp.ones(inputs.shape, bool))[:, 2:]
        table = jax.nn.softmax(denoiser.logits(hidden)).reshape(4, 4, 2, 4)
        blank = table[mask, mask]
        left_first = blank[0, :3, None] * table[:3, mask, 1, :3]
        right_first = blank[1, None, :3] * table[mask, :3, 0, :3].T
        scores = tiny.reward_of(jnp.stack(jnp.meshgrid(*[jnp.arange(3)] * 2, indexing="ij"), -1))
        return jnp.sum(scores * (left_first + right_first)) / 2

    value, want = jax.jit(jax.value_and_grad(expected_reward))(params)
    assert float(value) == pytest.approx(float(p @ reward), rel=1e-5), "the law is the sampler's"
    tiny.assert_close(jax.tree.map(lambda g: -2 * length * g, got), want)


def case(rows=6, reward=None, seed=7):
    """(parameters, params -> Denoiser, rollout): groups of two, one template position."""
    params, _, bind = tiny.perceptron(LENGTH, prompt=3, eos=EOS)
    keys = jax.random.split(jax.random.key(seed), 4)
    tokens = jax.random.randint(keys[0], (rows, LENGTH), 0, tiny.MASK)
    orders = jax.vmap(lambda k: jax.random.permutation(k, STEPS))(jax.random.split(keys[3], rows))
    reveal = jnp.insert(orders, 1, TEMPLATE, axis=1)
    prompt = jax.random.randint(keys[1], (rows, 3), 0, tiny.MASK)
    reward = jax.random.uniform(keys[2], (rows,)) if reward is None else reward
    return params, bind, tiny.rollout(tokens, reveal, prompt, reward, jnp.arange(rows) // 2, EOS)


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def prepared(bind, params, rollout, hp, old=None, reference=None, key=KEY):
    trio = Models(bind(params), *(None if p is None else bind(p) for p in (old, reference)))
    return cj_grpo.prepare(trio, rollout, None, key, tiny.INNER, hp)


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def evaluated(bind, params, batch, hp):
    """((loss, metrics), gradient)."""

    def objective(params):
        return cj_grpo.loss(Models(bind(params), None, None), batch, hp)

    return jax.value_and_grad(objective, has_aux=True)(params)


def gradient(bind, params, batch, hp):
    return evaluated(bind, params, batch, hp)[1]


def scaled(params, by):
    return jax.tree.map(lambda x: by * x, params)


@pytest.mark.parametrize(("forwarded", "count_after_eos"), [(False, True), (True, False)])
def test_at_theta_old_the_gradient_is_reinforce_on_the_trajectory(count_after_eos, forwarded):
    params, bind, rollout = case()
    hp = cj_grpo.Hyper(beta=0.0, count_after_eos=count_after_eos)
    batch = prepared(bind, params, rollout, hp, params if forwarded else None)
    revealed_at = np.asarray(rollout.reveal_step)
    counted = revealed_at >= 0
    if not count_after_eos:
        ended = jnp.cumsum(rollout.tokens == EOS, 1) - (rollout.tokens == EOS) > 0
        assert (np.asarray(ended) & counted).any()
        counted = counted & ~np.asarray(ended)
    advantage = rollout.reward - jnp.repeat(rollout.reward.reshape(-1, 2).mean(axis=1), 2)

    def reinforce(params):
        total = jnp.zeros(())
        for step in range(STEPS):
            seen = rollout.reveal_step < step
            args = (rollout.prompt, rollout.prompt_valid)
            state = jnp.where(seen, rollout.tokens, tiny.MASK)
            scored = state_log_prob(bind(params), *args, state, rollout.tokens[:, None])[:, 0]
            now = counted & (revealed_at == step)
            total += jnp.sum(jnp.where(now, scored * advantage[:, None], 0.0)) / now.sum()
        return -total / STEPS

    tiny.assert_close(gradient(bind, params, batch, hp), jax.jit(jax.grad(reinforce))(params))
    assert float(jnp.sum(batch.weight)) == pytest.approx(1)


def test_fewer_states_are_distinct_steps_and_give_the_whole_gradient_on_average():
    params, bind, rollout = case()
    whole = cj_grpo.Hyper(beta=0.0)
    want = gradient(bind, params, prepared(bind, params, rollout, whole), whole)
    hp = cj_grpo.Hyper(beta=0.0, states=2)
    batches = jax.vmap(lambda key: prepared(bind, params, rollout, hp, key=key))(
        jax.random.split(KEY, 2000)
    )
    step = jnp.sum(batches.state == tiny.MASK, axis=-1).reshape(2000, 6, 2)
    assert (step[..., 0] > step[..., 1]).all(), "two different steps, in order"
    together = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
    got = gradient(bind, params, together._replace(weight=together.weight / 2000), hp)
    tiny.assert_close(got, want, rtol=0.05)


def test_more_states_than_steps_change_nothing():
    params, bind, rollout = case()
    exact_count, spare = (cj_grpo.Hyper(beta=0.0, states=n) for n in (STEPS, 99))
    few, many = (prepared(bind, params, rollout, hp) for hp in (exact_count, spare))
    assert (few.state.shape[0], many.state.shape[0]) == (6 * STEPS, 6 * LENGTH)
    tiny.assert_close(
        gradient(bind, params, many, spare), gradient(bind, params, few, exact_count), rtol=1e-6
    )


def test_behaviour_and_reference_score_every_state_of_the_batch():
    params, bind, rollout = case()
    hp = cj_grpo.Hyper(states=STEPS)
    other = scaled(params, 0.9)
    batch = prepared(bind, params, rollout, hp, params, other)
    (loss, metrics), _ = evaluated(bind, params, batch, hp)
    counted = batch.weight > 0
    scored = jax.jit(lambda p: state_log_prob(bind(p), *batch[:4]))(other)
    want = jnp.where(counted, scored, 0)
    np.testing.assert_allclose(batch.reference, want, rtol=1e-5, atol=1e-6)
    expected = jnp.sum(batch.weight * (0.04 * surrogate.k3(batch.old, want)))
    expected -= jnp.sum(batch.weight * batch.advantage[..., None])
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    assert float(metrics["kl"]) > 0.01
    assert cj_grpo.needs(hp) == {"reference"}
    assert cj_grpo.needs(cj_grpo.Hyper(beta=0.0)) == frozenset()


def test_the_prompt_and_the_template_stay_and_every_token_counts_once():
    params, bind, rollout = case()
    batch = prepared(bind, params, rollout, cj_grpo.Hyper(states=STEPS, count_after_eos=True))
    np.testing.assert_array_equal(batch.prompt, jnp.repeat(rollout.prompt, STEPS, axis=0))
    np.testing.assert_array_equal(batch.state[:, 1], jnp.repeat(rollout.tokens[:, 1], STEPS))
    counted = np.asarray(batch.weight[:, 0] > 0).reshape(6, STEPS, LENGTH)
    np.testing.assert_array_equal(counted.sum(axis=1), rollout.reveal_step >= 0)
    assert (np.asarray(batch.state == tiny.MASK) | ~counted.reshape(-1, LENGTH)).all()


def test_tied_groups_give_no_policy_gradient():
    params, bind, rollout = case(reward=jnp.array([0.5, 0.5, 1.0, 1.0, 0.0, 0.0]))
    hp = cj_grpo.Hyper(beta=0.0)
    batch = prepared(bind, params, rollout, hp)
    assert (tiny.flat(gradient(bind, params, batch, hp)) == 0).all()


def test_completions_that_were_all_template_give_a_finite_zero():
    params, bind, rollout = case()
    rollout = rollout._replace(reveal_step=jnp.full_like(rollout.reveal_step, TEMPLATE))
    hp = cj_grpo.Hyper()
    batch = prepared(bind, params, rollout, hp, params, params)
    assert (tiny.flat(gradient(bind, params, batch, hp)) == 0).all()


def test_gradients_of_strided_microbatches_add_up():
    params, bind, rollout = case()
    hp = cj_grpo.Hyper(states=STEPS)
    batch = prepared(bind, params, rollout, hp, scaled(params, 0.9), scaled(params, 1.1))
    parts = [jax.tree.map(lambda x, i=i: x[i::3], batch) for i in range(3)]
    total = jax.tree.map(lambda *g: sum(g), *[gradient(bind, params, p, hp) for p in parts])
    tiny.assert_close(total, gradient(bind, params, batch, hp), rtol=1e-5)


def test_a_sampler_that_changes_revealed_tokens_is_refused():
    params, bind, rollout = case()
    states = jnp.broadcast_to(rollout.tokens[:, None], (6, STEPS + 1, LENGTH))
    with pytest.raises(ValueError, match=r"rollout.states is set: take a sampler that keeps"):
        prepared(bind, params, rollout._replace(states=states), cj_grpo.Hyper())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"states": 0}, "states=0 must be >= 1"),
        ({"epsilon": 0.0}, "epsilon=0.0 must be positive"),
        ({"beta": -1.0}, "beta=-1.0"),
    ],
)
def test_impossible_hyper_parameters_say_what_is_possible(values, message):
    with pytest.raises(ValueError, match=message):
        cj_grpo.Hyper(**values)
