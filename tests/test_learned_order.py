"""A learned order in the sampler, in a run and beside another denoiser."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_upo as toy
import tiny

from dmrl.diffusion import sampler
from dmrl.diffusion.order import Learned, Look
from dmrl.types import TEMPLATE


@functools.lru_cache
def sampled(order, rows=1024, group_size=4, temperature=1.0, steps=3):
    config = sampler.Sampling(toy.LENGTH, steps, toy.LENGTH, temperature, order=order)

    @jax.jit
    def draw(params):
        def tiled(x):
            return jnp.tile(jnp.asarray(x), (rows, 1))

        number = jnp.arange(rows)
        context = (tiled(toy.PROMPT), tiled(jnp.ones(2, bool)), tiled(toy.BLANK), number, number)
        key = jax.random.key(3)
        return sampler.sample(toy.bound(params), *context, key, config, group_size=group_size)

    return draw(toy.variables()["order"])


@pytest.mark.parametrize(("order", "k"), [("learned:1", 0), ("learned:1,2", 2)])
def test_the_sampler_follows_the_enumerated_law(order, k):
    """Tokens and reveal steps together; the Top-K order never leaves its set."""
    got = sampled(order)
    completions, when, _, _ = toy.trajectories(k)
    law = {
        (*tokens, *steps): p
        for tokens, steps, p in zip(
            completions.tolist(), when.tolist(), toy.chances(k).tolist(), strict=True
        )
    }
    outcomes = np.concatenate([got.tokens, got.reveal_step], axis=1).tolist()
    outcomes = [tuple(outcome) for outcome in outcomes]
    assert tiny.chi_square(outcomes, law) > 1e-3
    other = {**law}
    first, second = sorted(law, key=law.get)[-2:]
    other[first], other[second] = law[second] / 4, law[first] + 3 * law[second] / 4
    assert tiny.chi_square(outcomes, other) < 1e-3, "it can tell laws apart"


def test_the_log_law_is_recorded_at_every_reveal():
    got = sampled("learned:1")
    law = np.asarray(jax.jit(toy.laws)(toy.variables()["order"]))
    number = toy.states()[1]
    for row in range(8):
        tokens, when = (np.asarray(x[row]) for x in (got.tokens, got.reveal_step))
        for i in np.flatnonzero(when != TEMPLATE):
            state = tuple(np.where(when < when[i], tokens, tiny.MASK).tolist())
            want = law[number[state], i]
            assert float(got.order_log_prob[row, i]) == pytest.approx(want, abs=1e-5)
    np.testing.assert_array_equal(got.order_log_prob[:, 1], 0)


def test_without_noise_the_favourite_is_next():
    got = sampled("learned", rows=4)
    law = np.asarray(jax.jit(toy.laws)(toy.variables()["order"]))
    at_blank = law[toy.states()[1][tuple(toy.BLANK.tolist())]]
    favourite = max(toy.HOLES, key=lambda i: at_blank[i])
    assert (got.reveal_step[:, favourite] == 0).all()


def test_more_than_k_at_a_step_go_by_confidence():
    rule = Learned(0.0, 1)
    confidence = jnp.array([[0.2, 0.9, 0.5, 0.4]])
    masked = jnp.array([[True, True, True, False]])
    law = rule.law(lambda f: jnp.zeros(f.shape[:2]), confidence[..., None], masked)
    np.testing.assert_array_equal(law, [[-np.inf, 0, -np.inf, -np.inf]])
    keys = jax.random.split(jax.random.key(0), 1)
    look = Look(confidence[..., None], None, masked, jnp.float32(0), keys, 0, law)
    np.testing.assert_array_equal(np.argsort(-rule.score(look)[0, :3]), [1, 2, 0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"order": "learned:-1"}, "temperature=-1.0"),
        ({"order": "learned", "cfg_scale": 1.0}, "reads no guidance"),
        ({"order": "learned", "cache": "dual"}, "does not go with order='learned'"),
    ],
)
def test_what_excludes_a_learned_order_is_said(values, message):
    with pytest.raises(ValueError, match=message):
        sampler.Sampling(4, 4, 2, **values)


def test_a_model_without_an_order_cannot_follow_one():
    params, prompt, bind = tiny.perceptron(4)
    config = sampler.Sampling(4, 4, 4, order="learned")
    row = jnp.zeros(1, jnp.int32)
    args = (prompt[None], jnp.ones((1, 2), bool), jnp.full((1, 4), tiny.MASK), row, row)
    with pytest.raises(ValueError, match="this model came without one"):
        sampler.sample(bind(params), *args, jax.random.key(0), config)


def test_greedy_keeps_the_candidates():
    config = sampler.Sampling(4, 4, 4, 0.7, order="learned:0.8,2").greedy
    assert (config.temperature, config.order) == (0.0, "learned:0,2")
    assert sampler.Sampling(4, 4, 4, 0.7, order="learned:0.8").greedy.order == "learned"
    assert sampler.Sampling(4, 4, 4, 0.7, order="margin").greedy.order == "margin"
