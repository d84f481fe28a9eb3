"""wd1: the authors' numbers, what its weights are, and which objective they follow."""

import functools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.special import softmax

from dmrl import models
from dmrl.algorithms import wd1
from dmrl.diffusion import exact
from dmrl.diffusion.likelihood import state_log_prob
from dmrl.types import TEMPLATE, Models

LENGTH, EOS = 4, 2
HYPER = wd1.Hyper()


def test_golden_loss_and_gradient(recorded):
    tensors, cases, cfg, params = recorded
    names = [name for name in cases if name.startswith("wd1")]
    assert len(names) == 4

    @jax.jit
    def run(params, batch):
        def objective(params):
            policy = models.bind(cfg, {"params": params}, keep_mask=True)
            return wd1.loss(Models(policy, None, None), batch, wd1.Hyper())[0]

        return jax.value_and_grad(objective)(params)

    for name in names:
        case = cases[name]
        states = tensors["diffu_grpo/perturbed_ids"][case["iteration"]]
        rows, prompt = tensors["prompt_ids"].shape
        group = jnp.zeros(rows, jnp.int32)
        positive_only = name.startswith("wd1_positive_only")
        batch = wd1.Batch(
            prompt=states[:, :prompt],
            prompt_valid=jnp.ones((rows, prompt), bool),
            state=states[:, prompt:],
            labels=tensors["completion_ids"][:, None],
            counted=tensors["completion_mask"][:, None] > 0,
            weight=wd1.group_weight(tensors["advantages"], group, positive_only),
        )
        loss, grad = run(params, batch)
        assert float(loss) == pytest.approx(case["loss"], rel=1e-4), name
        goldens.assert_gradient(grad, case, tensors, name)


def case(rows=6, reward=None, group=None):
    """(parameters, params -> Denoiser, rollout): groups of two, one template position."""
    params, _, bind = tiny.perceptron(LENGTH, prompt=3, eos=EOS)
    keys = jax.random.split(jax.random.key(7), 3)
    tokens = jax.random.randint(keys[0], (rows, LENGTH), 0, tiny.MASK)
    reveal = jnp.broadcast_to(jnp.array([0, TEMPLATE, 1, 2]), tokens.shape)
    prompt = jax.random.randint(keys[1], (rows, 3), 0, tiny.MASK)
    reward = 2 * jax.random.uniform(keys[2], (rows,)) if reward is None else reward
    group = jnp.arange(rows) // 2 if group is None else group
    return params, bind, tiny.rollout(tokens, reveal, prompt, reward, group, EOS)


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def prepared(bind, params, rollout, hp=HYPER):
    trio = Models(bind(params), None, None)
    return wd1.prepare(trio, rollout, None, jax.random.key(0), tiny.INNER, hp)


@functools.partial(jax.jit, static_argnames="bind")
def gradient(bind, params, batch):
    return jax.grad(lambda p: wd1.loss(Models(bind(p), None, None), batch, wd1.Hyper())[0])(params)


@pytest.mark.parametrize("positive_only", [False, True])
def test_the_loss_is_the_mean_over_groups_of_the_published_sum(positive_only):
    params, bind, rollout = case(group=jnp.array([0, 1, 0, 1, 1, 1]))
    batch = prepared(bind, params, rollout, wd1.Hyper(positive_only=positive_only))
    ended = jnp.cumsum(rollout.tokens == EOS, 1) - (rollout.tokens == EOS) > 0
    counted = ~ended & (rollout.reveal_step >= 0)

    rewards = np.asarray(rollout.reward)

    def published(params):
        log_prob = state_log_prob(bind(params), *batch[:4])[:, 0]
        s = jnp.sum(jnp.where(counted, log_prob, 0.0), axis=1)
        total = 0.0
        for members in ([0, 2], [1, 3, 4, 5]):
            a = rewards[members] - rewards[members].mean()
            w = softmax(a) - (0 if positive_only else softmax(-a))
            total -= jnp.sum(w * s[np.array(members)])
        return total / 2

    loss = jax.jit(lambda p: wd1.loss(Models(bind(p), None, None), batch, wd1.Hyper())[0])(params)
    assert float(loss) == pytest.approx(float(jax.jit(published)(params)), rel=1e-5)
    tiny.assert_close(gradient(bind, params, batch), jax.jit(jax.grad(published))(params))


def test_the_weights_of_a_group_ignore_the_baseline_and_do_not_overflow():
    reward, group = jnp.array([0.3, 1.0, 2.0, 500.0, -500.0]), jnp.array([0, 0, 0, 1, 1])
    weight = wd1.group_weight(reward, group, False)
    np.testing.assert_allclose(
        weight, wd1.group_weight(reward + 7 * group - 3, group, False), atol=1e-6
    )
    np.testing.assert_allclose(weight[3:], [1, -1])
    assert float(jnp.sum(weight[:3])) == pytest.approx(0, abs=1e-6)
    positive = wd1.group_weight(reward, group, True)
    assert float(jnp.sum(positive)) == pytest.approx(2)


@pytest.mark.parametrize("value", [0.5, 0.1])
def test_tied_rewards_weigh_exactly_nothing(value):
    params, bind, rollout = case(reward=jnp.full(6, value), group=jnp.array([0, 0, 0, 1, 1, 1]))
    batch = prepared(bind, params, rollout)
    assert (np.asarray(batch.weight) == 0).all()
    assert (tiny.flat(gradient(bind, params, batch)) == 0).all()


def test_a_pair_climbs_the_expected_tanh_of_half_the_reward_gap():
    """E[-grad] = grad_theta 2 E_x[ E_y tanh((r(x) - r(y))/2) ], y held at theta_old."""
    params, prompt, bind = tiny.perceptron(2)
    blank = jnp.full((2,), tiny.MASK)
    fills = exact.fillings(blank, tiny.VOCAB, tiny.MASK)
    reward = 3 * tiny.reward_of(fills)

    @jax.jit
    def law(params):
        return jnp.exp(exact.filling_log_prob(bind(params), prompt, blank, fills))

    p = law(params)
    n = len(fills)
    x, y = (i.ravel() for i in jnp.meshgrid(jnp.arange(n), jnp.arange(n), indexing="ij"))
    pairs = jnp.stack([x, y], axis=1).ravel()
    rollout = tiny.rollout(
        fills[pairs],
        prompt=jnp.broadcast_to(prompt, (2 * n * n, 2)),
        reward=reward[pairs],
        group=jnp.repeat(jnp.arange(n * n), 2),
    )
    batch = prepared(bind, params, rollout, wd1.Hyper(p_mask_prompt=0.0))
    likely = jnp.repeat(p[x] * p[y], 2) * n * n  # the mean over groups becomes an expectation
    got = gradient(bind, params, batch._replace(weight=batch.weight * likely))

    def climbed(params):
        return 2 * jnp.sum(law(params) * (jnp.tanh((reward[:, None] - reward[None]) / 2) @ p))

    tiny.assert_close(jax.tree.map(jnp.negative, got), jax.jit(jax.grad(climbed))(params))


def test_gradients_of_strided_microbatches_add_up():
    params, bind, rollout = case()
    batch = prepared(bind, params, rollout)
    assert (batch.prompt != rollout.prompt).any()
    parts = [jax.tree.map(lambda x, i=i: x[i::3], batch) for i in range(3)]
    total = jax.tree.map(lambda *g: sum(g), *[gradient(bind, params, part) for part in parts])
    tiny.assert_close(total, gradient(bind, params, batch), rtol=1e-5)


def test_template_positions_and_tokens_after_eos_do_not_count():
    params, bind, rollout = case()
    tokens = jnp.array([[EOS, 1, 0, 0], [0, EOS, 1, 1], [0, 1, 1, EOS]] * 2)
    batch = prepared(bind, params, rollout._replace(tokens=tokens))
    want = [[True, False, False, False]] * 2 + [[True, False, True, True]]
    assert batch.counted[:3, 0].tolist() == want


def test_an_impossible_prompt_mask_is_refused():
    with pytest.raises(ValueError, match=r"p_mask_prompt=-0.1 .*\[0, 1\]"):
        wd1.Hyper(p_mask_prompt=-0.1)
