"""coupled-GRPO: the authors' numbers, and what the complementary masks estimate."""

import functools
import itertools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dmrl import models
from dmrl.algorithms import coupled_grpo, surrogate
from dmrl.diffusion.likelihood import state_log_prob
from dmrl.types import TEMPLATE, Models

LENGTH, EOS = 4, 2
KEY = jax.random.key(0)


def shifted(denoiser):
    """The same network read as Dream is: the output at position k - 1 predicts token k."""

    def encode(tokens, valid, *_):
        return jnp.roll(denoiser.encode(tokens, valid), 1, axis=1)

    return denoiser._replace(encode=encode)


def recorded_batch(tensors, case, reading):
    i, prompt = case["iteration"], tensors["prompt_ids"].shape[1]
    rows = tensors["prompt_ids"].shape[0]
    chosen = tensors["coupled_grpo/mask_S"][i][:, prompt:] > 0
    tokens = tensors["completion_ids"]
    r = jnp.full(rows, 1 / tensors["coupled_grpo/weights"][i, 1])
    free = jnp.ones(tokens.shape, bool)
    state, factor = coupled_grpo.couple(tokens, free, chosen, r, 510)
    for m, name in enumerate(("full", "S", "complement")):
        want = tensors[f"coupled_grpo/perturbed_{name}"][i][:, prompt:]
        np.testing.assert_array_equal(state[:, m], want)
    weights = tensors["coupled_grpo/weights"][i]
    np.testing.assert_allclose(jnp.max(factor, axis=(0, 2)), weights / 2, rtol=1e-5)
    return coupled_grpo.Batch(
        prompt=tensors["prompt_ids"],
        prompt_valid=jnp.ones((rows, prompt), bool),
        state=state,
        factor=factor,
        labels=tokens,
        advantage=tensors["advantages"][:, None],
        weight=surrogate.weight(tensors["completion_mask"][:, None] > 0, "token"),
        old=tensors[f"coupled_grpo/{reading}_old_per_token_logps"][:, i : i + 1],
        reference=tensors[f"coupled_grpo/{reading}_ref_per_token_logps"][:, i : i + 1],
    )


@pytest.mark.parametrize("reading", ["shifted", "unshifted"])
def test_golden_values_loss_and_gradient(recorded, reading):
    tensors, cases, cfg, params = recorded
    names = [name for name in cases if name.startswith(f"coupled_grpo/{reading}")]
    assert len(names) == 3
    for case in (cases[name] for name in names):
        assert case["epsilon_low"] == case["epsilon_high"] == 0.5
        assert case["beta"] == 0.01
    hp = coupled_grpo.Hyper()

    @jax.jit
    def run(params, batch):
        def objective(params):
            policy = models.bind(cfg, {"params": params}, keep_mask=True)
            policy = shifted(policy) if reading == "shifted" else policy
            value = coupled_grpo.estimate(policy, batch)
            return coupled_grpo.loss(Models(policy, None, None), batch, hp)[0], value

        return jax.value_and_grad(objective, has_aux=True)(params)

    for name in names:
        case = cases[name]
        batch = recorded_batch(tensors, case, reading)
        (loss, value), grad = run(params, batch)
        i, counted = case["iteration"], tensors["completion_mask"] > 0
        want = tensors[f"coupled_grpo/{reading}_per_token_logps"][:, i]
        np.testing.assert_allclose(value[:, 0], jnp.where(counted, want, 0), rtol=1e-4, atol=1e-4)
        assert float(loss) == pytest.approx(case["loss"], rel=1e-4), name
        goldens.assert_gradient(grad, case, tensors, name)


def case(rows=6, reward=None):
    """(parameters, params -> Denoiser, rollout): groups of three, one template position."""
    params, _, bind = tiny.perceptron(LENGTH, prompt=3, eos=EOS)
    keys = jax.random.split(jax.random.key(7), 3)
    tokens = jax.random.randint(keys[0], (rows, LENGTH), 0, tiny.MASK)
    reveal = jnp.broadcast_to(jnp.array([0, TEMPLATE, 1, 2]), tokens.shape)
    prompt = jax.random.randint(keys[1], (rows, 3), 0, tiny.MASK)
    reward = jax.random.uniform(keys[2], (rows,)) if reward is None else reward
    return params, bind, tiny.rollout(tokens, reveal, prompt, reward, jnp.arange(rows) // 3, EOS)


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def prepared(bind, params, rollout, hp, old=None, reference=None, key=KEY):
    trio = Models(bind(params), *(None if p is None else bind(p) for p in (old, reference)))
    return coupled_grpo.prepare(trio, rollout, None, key, tiny.INNER, hp)


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def evaluated(bind, params, batch, hp):
    """((loss, metrics), gradient)."""

    def objective(params):
        return coupled_grpo.loss(Models(bind(params), None, None), batch, hp)

    return jax.value_and_grad(objective, has_aux=True)(params)


def gradient(bind, params, batch, hp):
    return evaluated(bind, params, batch, hp)[1]


def scaled(params, by):
    return jax.tree.map(lambda x: by * x, params)


def test_a_set_and_its_complement_hide_every_free_token_once():
    params, bind, rollout = case(rows=600)
    hp = coupled_grpo.Hyper()
    batch = prepared(bind, params, rollout, hp)
    free = np.asarray(rollout.reveal_step >= 0)
    hidden = np.asarray(batch.state == tiny.MASK)
    np.testing.assert_array_equal(hidden[:, 0], free)
    np.testing.assert_array_equal(hidden[:, 1].astype(int) + hidden[:, 2], free)
    np.testing.assert_array_equal(np.asarray(batch.factor) > 0, hidden)
    seen = np.where(hidden, np.asarray(rollout.tokens)[:, None], batch.state)
    np.testing.assert_array_equal(seen, np.broadcast_to(rollout.tokens[:, None], seen.shape))
    # S carries 1 / (2 r) and the rest 1 / (2 (1 - r)): their inverses add up to 2.
    highest = np.asarray(batch.factor[:, 1:]).max(axis=2)
    both = (highest > 0).all(axis=1)
    np.testing.assert_allclose((1 / highest[both]).sum(axis=1), 2, rtol=1e-5)
    r = 1 / (2 * highest[highest[:, 0] > 0, 0])
    assert 0.2 < r.min() < 0.25
    assert 0.75 < r.max() < 0.8
    share = np.asarray(batch.factor[:, 1:]).sum(axis=1)[:, [0, 2, 3]].mean()
    assert share == pytest.approx(1, abs=0.05), "E [k in S] / 2r + [k not in S] / 2(1-r) = 1"


def test_over_all_sets_the_value_is_the_one_step_and_both_conditional_estimates():
    """E_S l_k = ( lp_k(all) + E[lp_k(S) | k in S] + E[lp_k(rest) | k not in S] ) / 2."""
    params, prompt, bind = tiny.perceptron(3)
    tokens, r = jnp.array([1, 0, 2]), 0.3
    sets = np.array(list(itertools.product([False, True], repeat=3)))
    chance = np.prod(np.where(sets, r, 1 - r), axis=1)
    n = len(sets)
    copies = jnp.broadcast_to(tokens, (n, 3))
    free = jnp.ones((n, 3), bool)
    context = jnp.broadcast_to(prompt, (n, 2)), jnp.ones((n, 2), bool)
    state, factor = coupled_grpo.couple(copies, free, jnp.array(sets), jnp.full(n, r), tiny.MASK)
    batch = coupled_grpo.Batch(
        *context, state, factor, copies, jnp.zeros((n, 1)), jnp.ones((n, 1, 3)), None, None
    )
    value = jax.jit(lambda p: coupled_grpo.estimate(bind(p), batch))(params)[:, 0]
    masked = jnp.where(jnp.array(sets), tiny.MASK, copies)
    score = jax.jit(lambda p: state_log_prob(bind(p), *context, masked, copies[:, None]))
    log_prob = np.asarray(score(params)[:, 0])  # of every set; meaningful inside it
    for k in range(3):
        inside = sets[:, k]
        given = (log_prob[:, k] * chance)[inside].sum() / r
        # The complement of a set without k contains k: sets read in reverse order.
        left = (log_prob[::-1, k] * chance)[~inside].sum() / (1 - r)
        expected = (log_prob[-1, k] + given + left) / 2
        assert float((np.asarray(value[:, k]) * chance).sum()) == pytest.approx(expected, rel=1e-5)


def test_the_baseline_is_the_mean_of_the_others():
    params, bind, rollout = case(reward=jnp.array([1.0, 2.0, 6.0, 0.0, 0.0, 3.0]))
    batch = prepared(bind, params, rollout, coupled_grpo.Hyper())
    np.testing.assert_allclose(batch.advantage[:, 0], [-3, -1.5, 4.5, -1.5, -1.5, 3], rtol=1e-6)


@pytest.mark.parametrize("forwarded", [False, True])
def test_at_theta_old_the_gradient_is_reinforce_of_the_coupled_value(forwarded):
    params, bind, rollout = case()
    hp = coupled_grpo.Hyper(beta=0.0)
    batch = prepared(bind, params, rollout, hp, params if forwarded else None)
    ended = jnp.cumsum(rollout.tokens == EOS, 1) - (rollout.tokens == EOS) > 0
    counted = ~ended & (rollout.reveal_step >= 0)
    hidden = batch.state == tiny.MASK

    def reinforce(params):
        value = jnp.zeros(counted.shape)
        for m in range(3):
            args = (rollout.prompt, rollout.prompt_valid, batch.state[:, m])
            scored = state_log_prob(bind(params), *args, rollout.tokens[:, None])[:, 0]
            value += jnp.where(hidden[:, m], scored * jnp.max(batch.factor[:, m], 1)[:, None], 0)
        groups = rollout.reward.reshape(-1, 3)
        others = (groups.sum(axis=1, keepdims=True) - groups) / 2
        score = jnp.where(counted, value * (groups - others).reshape(-1, 1), 0.0)
        return -jnp.sum(score) / jnp.sum(counted)

    tiny.assert_close(gradient(bind, params, batch, hp), jax.jit(jax.grad(reinforce))(params))


def test_behaviour_and_reference_see_the_policy_s_masks():
    params, bind, rollout = case()
    hp = coupled_grpo.Hyper()
    batch = prepared(bind, params, rollout, hp, params, params)
    (loss, metrics), _ = evaluated(bind, params, batch, hp)
    expected = -jnp.sum(batch.weight * batch.advantage[..., None])
    assert float(loss) == pytest.approx(float(expected), abs=1e-5), "the ratio is 1"
    assert float(metrics["kl"]) == pytest.approx(0, abs=1e-6)
    assert coupled_grpo.needs(hp) == {"reference"}
    assert coupled_grpo.needs(coupled_grpo.Hyper(beta=0.0)) == frozenset()


def test_template_and_tokens_after_eos_get_no_weight_and_no_gradient():
    params, bind, rollout = case()
    tokens = jnp.array([[EOS, 1, 0, 0], [0, EOS, 1, 1], [0, 1, 1, EOS]] * 2)
    hp = coupled_grpo.Hyper(beta=0.0)
    batch = prepared(bind, params, rollout._replace(tokens=tokens), hp)
    counted = np.asarray(batch.weight[:, 0]) > 0
    assert counted[:3].tolist() == [[True, False, False, False]] * 2 + [[True, False, True, True]]
    assert float(jnp.sum(batch.weight)) == pytest.approx(1)
    other = jnp.where(counted, batch.labels, 1 - jnp.minimum(batch.labels, 1))
    changed = gradient(bind, params, batch._replace(labels=other), hp)
    tiny.assert_close(changed, gradient(bind, params, batch, hp), rtol=1e-6)


def test_tied_groups_give_no_policy_gradient():
    params, bind, rollout = case(reward=jnp.array([0.5] * 3 + [1.0] * 3))
    hp = coupled_grpo.Hyper(beta=0.0)
    batch = prepared(bind, params, rollout, hp)
    assert (tiny.flat(gradient(bind, params, batch, hp)) == 0).all()


def test_gradients_of_strided_microbatches_add_up():
    params, bind, rollout = case()
    hp = coupled_grpo.Hyper()
    batch = prepared(bind, params, rollout, hp, scaled(params, 0.9), scaled(params, 1.1))
    parts = [jax.tree.map(lambda x, i=i: x[i::3], batch) for i in range(3)]
    total = jax.tree.map(lambda *g: sum(g), *[gradient(bind, params, p, hp) for p in parts])
    tiny.assert_close(total, gradient(bind, params, batch, hp), rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r_min": 0.0}, r"0 < r_min <= r_max < 1 .*self.r_min=0.0"),
        ({"r_min": 0.5, "r_max": 0.4}, r"self.r_max=0.4"),
        ({"beta": -1.0}, "beta=-1.0"),
    ],
)
def test_impossible_hyper_parameters_say_what_is_possible(values, message):
    with pytest.raises(ValueError, match=message):
        coupled_grpo.Hyper(**values)
