"""Supervised training: an unbiased estimate of the masked-diffusion bound."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dmrl.algorithms import sft
from dmrl.diffusion.likelihood import state_log_prob
from dmrl.types import TEMPLATE, Models

LENGTH = 3


def examples(rows, template=False):
    """(parameters, params -> Denoiser, `rows` copies of one example)."""
    params, prompt, bind = tiny.perceptron(LENGTH)
    tokens = jnp.broadcast_to(jnp.array([2, 0, 1]), (rows, LENGTH))
    reveal = jnp.where(jnp.arange(LENGTH)[None] == 1, TEMPLATE, 0) if template else None
    reveal = None if reveal is None else jnp.broadcast_to(reveal, tokens.shape)
    return params, bind, tiny.rollout(tokens, reveal, jnp.broadcast_to(prompt, (rows, 2)))


@functools.partial(jax.jit, static_argnames=("bind", "complementary"))
def prepared(bind, params, rollout, key=0, complementary=False):
    trio = Models(bind(params), None, None)
    hp = sft.Hyper(complementary)
    return sft.prepare(trio, rollout, None, jax.random.key(key), tiny.INNER, hp)


def value(bind, params, batch):
    return sft.loss(Models(bind(params), None, None), batch, sft.Hyper())[0]


def exact_bound(bind, params, rollout, free):
    """E over t ~ U(0,1) of the loss of one example: a sum over mask patterns.

    A pattern of k of the n free tokens has weight (integral of t^(k-1) (1-t)^(n-k)) / n.
    """
    total, n = 0.0, len(free)
    for k in range(1, n + 1):
        weight = math.gamma(k) * math.gamma(n - k + 1) / math.gamma(n + 1) / n
        for hidden in itertools.combinations(free, k):
            here = jnp.zeros(LENGTH, bool).at[jnp.array(hidden)].set(True)[None]
            tokens = rollout.tokens[:1]
            state = jnp.where(here, tiny.MASK, tokens)
            args = (rollout.prompt[:1], rollout.prompt_valid[:1], state, tokens[:, None])
            log_prob = state_log_prob(bind(params), *args)[0, 0]
            total -= weight * float(jnp.sum(jnp.where(here[0], log_prob, 0)))
    return total


@pytest.mark.parametrize("complementary", [False, True], ids=["once", "complementary"])
@pytest.mark.parametrize("template", [False, True])
def test_the_loss_is_an_unbiased_estimate_of_the_exact_bound(template, complementary):
    rows = 100_000
    params, bind, rollout = examples(rows, template)
    batch = prepared(bind, params, rollout, complementary=complementary)
    log_prob = state_log_prob(bind(params), *batch[:4])
    each = -rows * jnp.sum(batch.weight * jnp.where(batch.weight > 0, log_prob, 0), axis=(1, 2))
    each = jnp.sum(each.reshape(rows, -1), axis=1)  # of an example
    loss = float(value(bind, params, batch))
    assert loss == pytest.approx(float(jnp.mean(each)), rel=1e-4)
    expected = exact_bound(bind, params, rollout, [0, 2] if template else [0, 1, 2])
    error = float(jnp.std(each)) / math.sqrt(rows)
    assert error < 0.02 * expected, "too few samples to tell"
    assert abs(loss - expected) < 4 * error


def test_only_free_response_tokens_are_noised():
    params, bind, rollout = examples(500, template=True)
    batch = prepared(bind, params, rollout)
    np.testing.assert_array_equal(batch.prompt, rollout.prompt)
    np.testing.assert_array_equal(batch.labels[:, 0], rollout.tokens)
    hidden = np.asarray(batch.state) == tiny.MASK
    assert not hidden[:, 1].any()
    assert hidden[:, [0, 2]].any(axis=0).all()
    np.testing.assert_array_equal(np.asarray(batch.weight[:, 0]) > 0, hidden)
    np.testing.assert_array_equal(
        np.where(hidden, 0, batch.state), np.where(hidden, 0, [[2, 0, 1]])
    )


def test_a_weight_is_one_over_t_length_and_rows():
    params, bind, rollout = examples(400)
    weight = np.asarray(prepared(bind, params, rollout).weight[:, 0])
    rows = weight[(weight > 0).any(axis=1)]
    for row in rows:
        assert len(np.unique(row[row > 0])) == 1
    t = 1 / (rows.max(axis=1) * LENGTH * 400)
    assert ((t > 1e-3) & (t < 1)).all()


@pytest.mark.parametrize("template", [False, True])
def test_complementary_masks_predict_every_free_token_exactly_once(template):
    params, bind, rollout = examples(400, template)
    batch = prepared(bind, params, rollout, complementary=True)
    hidden = (np.asarray(batch.state) == tiny.MASK).reshape(400, 2, LENGTH)
    np.testing.assert_array_equal(hidden.sum(axis=1), rollout.reveal_step >= 0)
    assert (hidden[:, 0] != hidden[:1, 0]).any()
    weight = np.asarray(batch.weight).reshape(400, 2, LENGTH)
    np.testing.assert_array_equal(weight > 0, hidden)
    # 1 / t and 1 / (1 - t), over 2 copies, rows and free tokens: their inverses add up.
    free = 2 if template else 3
    share = 1 / (weight.max(axis=2) * 2 * 400 * free)[hidden.any(axis=2).all(axis=1)]
    np.testing.assert_allclose(share.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(batch.labels[::2], batch.labels[1::2])
    np.testing.assert_array_equal(
        np.where(batch.weight > 0, 0, batch.state[:, None]),
        np.where(batch.weight > 0, 0, batch.labels),
    )


def test_the_gradient_does_not_see_unmasked_tokens():
    params, bind, rollout = examples(64)
    batch = prepared(bind, params, rollout)
    visible = batch.weight == 0
    other = batch._replace(
        labels=jnp.where(visible, 1 - jnp.minimum(batch.labels, 1), batch.labels)
    )
    assert (other.labels != batch.labels).any()
    slope = jax.jit(jax.grad(lambda p, b: value(bind, p, b)))
    tiny.assert_close(slope(params, other), slope(params, batch), rtol=1e-6)


@pytest.mark.parametrize("complementary", [False, True], ids=["once", "complementary"])
def test_gradients_of_strided_microbatches_add_up(complementary):
    params, bind, rollout = examples(12)
    batch = prepared(bind, params, rollout, complementary=complementary)
    slope = jax.jit(jax.grad(lambda p, b: value(bind, p, b)))
    for cuts in (2, 3):
        parts = [jax.tree.map(lambda x, i=i, n=cuts: x[i::n], batch) for i in range(cuts)]
        total = jax.tree.map(lambda *g: sum(g), *[slope(params, part) for part in parts])
        tiny.assert_close(total, slope(params, batch), rtol=1e-5)


def test_noise_is_fresh_for_every_key_and_keyed_by_row():
    params, bind, rollout = examples(50)
    one, two = (prepared(bind, params, rollout, key) for key in (0, 1))
    assert (one.state != two.state).any()
    assert (one.state[:1] != one.state).any()
    index = jnp.array([7, 3])
    part = rollout._replace(
        prompt=rollout.prompt[index],
        prompt_valid=rollout.prompt_valid[index],
        tokens=rollout.tokens[index],
        reveal_step=rollout.reveal_step[index],
        row=rollout.row[index],
    )
    np.testing.assert_array_equal(prepared(bind, params, part).state, one.state[index])
