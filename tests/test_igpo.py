"""IGPO: which hints get gradient, and that the rest is GRPO with a clean prompt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dmrl.algorithms import igpo
from dmrl.diffusion.likelihood import state_log_prob
from dmrl.types import HINT, TEMPLATE, Models

LENGTH, EOS, ROWS = 6, 2, 8
HP = igpo.Hyper()


@functools.cache
def case(seed=0):
    """(parameters, params -> Denoiser, rollout): groups of two; position 1 is the template's."""
    params, _, bind = tiny.perceptron(LENGTH, prompt=3, seed=seed, eos=EOS)
    keys = jax.random.split(jax.random.key(seed + 7), 4)
    tokens = jax.random.randint(keys[0], (ROWS, LENGTH), 0, EOS)  # no EOS
    reveal = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    reveal = jnp.where(jax.random.bernoulli(keys[1], 0.6, tokens.shape), HINT, reveal)
    reveal = reveal.at[:, 1].set(TEMPLATE).at[0, 2:].set(HINT).at[-1].set(LENGTH - 1)
    prompt = jax.random.randint(keys[2], (ROWS, 3), 0, tiny.MASK)
    reward = jax.random.uniform(keys[3], (ROWS,))
    return params, bind, tiny.rollout(tokens, reveal, prompt, reward, jnp.arange(ROWS) // 2, EOS)


@functools.partial(jax.jit, static_argnames=("bind", "hp", "frozen"))
def prepared(bind, params, rollout, hp=HP, frozen=False, key=0):
    policy = bind(params)
    old, reference = (bind(jax.tree.map(lambda x, s=s: s * x, params)) for s in (0.9, 1.1))
    trio = Models(policy, old, reference) if frozen else Models(policy, None, None)
    return igpo.prepare(trio, rollout, None, jax.random.key(key), tiny.INNER, hp)


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def gradient(bind, params, batch, hp):
    return jax.grad(lambda p: igpo.loss(Models(bind(p), None, None), batch, hp)[0])(params)


def entropies(bind, params, rollout):
    """Of the prediction of every token from the template alone, by a softmax of our own."""
    state = jnp.where(rollout.reveal_step == TEMPLATE, rollout.tokens, tiny.MASK)
    tokens = jnp.concatenate([rollout.prompt, state], axis=1)
    hidden = bind(params).encode(tokens, jnp.ones(tokens.shape, bool))[:, 3:]
    p = np.asarray(jax.nn.softmax(bind(params).logits(hidden)))
    return -np.sum(p * np.log(np.maximum(p, 1e-30)), axis=-1)


def test_the_state_hides_the_hints_and_the_prompt_is_clean():
    params, bind, rollout = case()
    batch = prepared(bind, params, rollout)
    assert (rollout.reveal_step == HINT).any()
    template = jnp.where(rollout.reveal_step == TEMPLATE, rollout.tokens, tiny.MASK)
    np.testing.assert_array_equal(batch.state, template)
    np.testing.assert_array_equal(batch.prompt, rollout.prompt)
    again = prepared(bind, params, rollout, key=1)
    np.testing.assert_array_equal(again.weight, batch.weight)


@pytest.mark.parametrize("tau", [0.0, 0.2, 0.5, 1.0])
def test_the_filter_keeps_the_most_uncertain_hints_and_all_else(tau):
    params, bind, rollout = case()
    kept = np.asarray(prepared(bind, params, rollout, igpo.Hyper(tau=tau)).weight[:, 0]) > 0
    step, entropy = np.asarray(rollout.reveal_step), entropies(bind, params, rollout)
    assert kept[step >= 0].all()
    assert not kept[step == TEMPLATE].any()
    for row in range(ROWS):
        hints = np.flatnonzero(step[row] == HINT)
        count = -(-int(tau * 10) * len(hints) // 10)  # the ceiling, in integers
        best = hints[np.argsort(-entropy[row, hints])[:count]]
        assert sorted(best) == hints[kept[row, hints]].tolist()


def test_the_number_kept_is_exact_where_floats_are_not():
    assert 0.28 * 25 > 7
    hint = jnp.tril(jnp.ones((60, 60), bool))
    for percent in (0, 20, 28, 70, 100):
        kept = igpo.uncertain(jnp.zeros(hint.shape), hint, percent / 100)
        want = [-(-percent * n // 100) for n in range(1, 61)]
        np.testing.assert_array_equal(jnp.sum(kept, axis=1), want)


def test_without_hints_every_token_is_trained():
    params, bind, rollout = case()
    step = jnp.where(rollout.reveal_step == HINT, 0, rollout.reveal_step)
    weight = prepared(bind, params, rollout._replace(reveal_step=step)).weight[:, 0]
    want = (step >= 0) / (ROWS * jnp.sum(step >= 0, axis=1, keepdims=True))
    np.testing.assert_allclose(weight, want, rtol=1e-6)


def test_a_filtered_hint_gets_no_gradient_and_its_completion_weighs_as_the_others():
    params, bind, rollout = case()
    hp = igpo.Hyper(beta=0.0)
    batch = prepared(bind, params, rollout, hp)
    np.testing.assert_allclose(jnp.sum(batch.weight, axis=(1, 2)), 1 / ROWS, rtol=1e-6)
    kept = batch.weight > 0
    other = batch._replace(labels=jnp.where(kept, batch.labels, 1 - batch.labels))
    assert (other.labels != batch.labels).any()
    before = gradient(bind, params, batch, hp)
    tiny.assert_close(gradient(bind, params, other, hp), before, rtol=1e-6)


@pytest.mark.parametrize("ratio_level", ["sequence", "token"])
def test_at_theta_old_the_gradient_is_reinforce(ratio_level):
    params, bind, rollout = case()
    hp = igpo.Hyper(beta=0.0, ratio_level=ratio_level)
    batch = prepared(bind, params, rollout, hp)
    trained = (rollout.reveal_step >= 0) | (batch.weight[:, 0] > 0)
    tokens = jnp.sum(trained, axis=1) if ratio_level == "token" else jnp.ones(ROWS)

    def reinforce(params):
        log_prob = state_log_prob(bind(params), *batch[:4])[:, 0]
        mean = jnp.repeat(rollout.reward.reshape(-1, 2).mean(axis=1), 2)
        score = jnp.sum(jnp.where(trained, log_prob, 0.0), axis=1) / tokens
        return -jnp.mean(score * (rollout.reward - mean))

    want = jax.jit(jax.grad(reinforce))(params)
    tiny.assert_close(gradient(bind, params, batch, hp), want)


def test_tokens_after_eos_do_not_count_and_no_hints_among_them():
    params, bind, rollout = case()
    rollout = rollout._replace(tokens=rollout.tokens.at[0, 3].set(EOS))
    batch = prepared(bind, params, rollout)
    weight = np.asarray(batch.weight[0, 0])
    # Positions 0, 2, 3 count; 2, 3 are hints, of which ceil(0.2 * 2) = 1 is trained.
    assert (weight[[1, 4, 5]] == 0).all()
    assert (weight[2:4] > 0).sum() == 1
    assert weight[0] == weight[2:4].max() == pytest.approx(1 / (2 * ROWS))


def test_old_and_reference_see_the_same_state():
    params, bind, rollout = case()
    batch = prepared(bind, params, rollout, frozen=True)
    counted = batch.weight > 0
    for scale, got in ((0.9, batch.old), (1.1, batch.reference)):
        denoiser = bind(jax.tree.map(lambda x, s=scale: s * x, params))
        want = jnp.where(counted, state_log_prob(denoiser, *batch[:4]), 0)
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_gradients_of_strided_microbatches_add_up():
    params, bind, rollout = case()
    hp = igpo.Hyper()
    batch = prepared(bind, params, rollout, hp, frozen=True)
    parts = [jax.tree.map(lambda x, i=i: x[i::4], batch) for i in range(4)]
    total = jax.tree.map(lambda *g: sum(g), *[gradient(bind, params, p, hp) for p in parts])
    tiny.assert_close(total, gradient(bind, params, batch, hp), rtol=1e-5)


def test_tied_groups_give_no_gradient():
    params, bind, rollout = case()
    hp = igpo.Hyper(beta=0.0)
    batch = prepared(bind, params, rollout._replace(reward=jnp.zeros(ROWS)), hp)
    assert (tiny.flat(gradient(bind, params, batch, hp)) == 0).all()


def test_it_asks_for_a_reference_only_to_penalise_the_distance_from_it():
    assert igpo.needs(igpo.Hyper()) == {"reference"}
    assert igpo.needs(igpo.Hyper(beta=0.0)) == frozenset()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tau": 1.2}, r"tau=1.2 is a share of the hints: choose one in \[0, 1\]"),
        ({"epsilon": -1.0}, "epsilon=-1.0 must be positive"),
        ({"ratio_level": "word"}, "ratio_level='word'"),
    ],
)
def test_impossible_hyper_parameters_say_what_is_possible(values, message):
    with pytest.raises(ValueError, match=message):
        igpo.Hyper(**values)
