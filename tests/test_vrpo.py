"""VRPO: DPO's closed form, pairs out of groups and files, and what sharing masks saves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scoring
import tiny

from dmrl.algorithms import vrpo
from dmrl.diffusion import score

REWARD = [0.2, 0.9, 0.4, 0.0] + [0.5] * 4 + [1.0, 0.0, 0.0, 1.0] + [0.0, 0.0, 0.0, 1.0]
"""Four groups of four: all different, a tie, two bests and two worsts, one best."""
CHOSEN, REJECTED, DECIDED = [1, 4, 8, 15], [3, 4, 9, 12], [True, False, True, True]


@pytest.fixture
def moved():
    """(parameters, bind, rollout, reference) of four groups of four."""
    params, bind, rollout = scoring.case(rows=16, size=4, reward=REWARD)
    return params, bind, rollout, jax.tree.map(lambda x: 0.8 * x, params)


def test_pairs_are_the_best_and_the_worst_of_a_group_and_ties_count_nothing(moved):
    params, bind, rollout, reference = moved
    batch = scoring.prepared(vrpo, bind, params, reference, rollout, vrpo.Hyper(group_size=4))
    for side, rows in enumerate((CHOSEN, REJECTED)):
        np.testing.assert_array_equal(batch.masked.labels[:, side], rollout.tokens[jnp.array(rows)])
        np.testing.assert_array_equal(batch.masked.prompt[:, side], rollout.prompt[jnp.array(rows)])
    np.testing.assert_allclose(batch.weight, np.array(DECIDED) / 3, rtol=1e-6)


def test_the_gradient_is_dpo_s_closed_form(moved):
    params, bind, rollout, reference = moved
    hp = vrpo.Hyper(group_size=4, beta=0.4)
    batch = scoring.prepared(vrpo, bind, params, reference, rollout, hp)

    @jax.jit
    def margins(p):
        both = [scoring.sums(bind, q, batch.masked).reshape(4, 2) for q in (p, reference)]
        gap = both[0] - both[1]
        return gap[:, 0] - gap[:, 1]

    m = margins(params)
    slope = -hp.beta / (1 + jnp.exp(hp.beta * m)) * jnp.array(DECIDED) / 3
    want = jax.vjp(margins, params)[1](slope)[0]
    (value, metrics), grad = scoring.value_and_gradient(vrpo, bind, params, batch, hp)
    tiny.assert_close(grad, want)
    decided = np.asarray(m)[np.array(DECIDED)]
    want_value = np.mean(np.log1p(np.exp(-hp.beta * decided)))
    assert float(value) == pytest.approx(float(want_value), rel=1e-4)
    assert float(metrics["rewards/margins"]) == pytest.approx(hp.beta * decided.mean(), rel=1e-3)
    assert float(metrics["rewards/accuracies"]) == pytest.approx((decided > 0).mean())
    split = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    assert float(split) == pytest.approx(float(metrics["rewards/margins"]), abs=1e-4)


def test_preferences_of_a_file_go_the_same_way():
    params, bind, rollout = scoring.case(rows=8, size=2, reward=[1.0, 0.0] * 4)
    reference = jax.tree.map(lambda x: 0.8 * x, params)
    batch = scoring.prepared(vrpo, bind, params, reference, rollout, vrpo.Hyper())
    np.testing.assert_array_equal(batch.masked.labels.reshape(8, -1), rollout.tokens)
    np.testing.assert_allclose(batch.weight, 1 / 4)
    swapped = rollout._replace(reward=1 - rollout.reward)
    other = scoring.prepared(vrpo, bind, params, reference, swapped, vrpo.Hyper())
    np.testing.assert_array_equal(other.masked.labels, batch.masked.labels[:, ::-1])
    np.testing.assert_array_equal(other.masked.state, batch.masked.state[:, ::-1])


def test_at_the_reference_the_loss_is_log_two(moved):
    params, bind, rollout, _ = moved
    hp = vrpo.Hyper(group_size=4)
    batch = scoring.prepared(vrpo, bind, params, params, rollout, hp)
    (value, _), _ = scoring.value_and_gradient(vrpo, bind, params, batch, hp)
    assert float(value) == pytest.approx(np.log(2), rel=1e-5)


def test_shared_masks_take_variance_out_of_the_preference():
    params, _, bind = tiny.perceptron(scoring.LENGTH, prompt=3)
    reference = jax.tree.map(lambda x: 0.95 * x, params)
    rollout = tiny.rollout(
        jnp.tile(jnp.array([[0, 2, 1, 1]]), (512, 1)), prompt=jnp.zeros((512, 3), jnp.int32)
    )

    @functools.partial(jax.jit, static_argnames="seed")
    def masked(seed):
        return score.draw(bind(params), rollout, jax.random.key(seed), 2, "independent", "sequence")

    policy = scoring.sums(bind, params, masked(0))
    shared, apart = (policy - scoring.sums(bind, reference, masked(seed)) for seed in (0, 1))
    assert float(shared.var()) < 0.1 * float(apart.var())
    error = float(apart.std()) * 3 / 512**0.5
    assert float(shared.mean()) == pytest.approx(float(apart.mean()), abs=error)


def test_tied_groups_give_no_gradient():
    params, bind, rollout = scoring.case(rows=16, size=4, reward=[0.5] * 16)
    reference = jax.tree.map(lambda x: 0.8 * x, params)
    hp = vrpo.Hyper(group_size=4)
    batch = scoring.prepared(vrpo, bind, params, reference, rollout, hp)
    assert (tiny.flat(scoring.gradient(vrpo, bind, params, batch, hp)) == 0).all()


def test_gradients_of_strided_microbatches_add_up(moved):
    params, bind, rollout, reference = moved
    hp = vrpo.Hyper(group_size=4)
    batch = scoring.prepared(vrpo, bind, params, reference, rollout, hp)
    scoring.assert_adds_up(vrpo, bind, params, batch, hp, cuts=(2,))


def test_tokens_after_eos_and_template_positions_get_no_weight_and_no_gradient(moved):
    params, bind, rollout, reference = moved
    hp = vrpo.Hyper(group_size=4)
    scoring.assert_only_sampled_tokens_count(vrpo, bind, params, rollout, reference, hp)


def test_a_pair_of_two_prompts_ends_in_nan(moved):
    params, bind, rollout, reference = moved
    hp = vrpo.Hyper(group_size=8)
    batch = scoring.prepared(vrpo, bind, params, reference, rollout, hp)
    assert np.isnan(batch.weight).all()


def test_it_always_asks_for_a_reference():
    assert vrpo.needs(vrpo.Hyper()) == {"reference"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": 0.0}, "self.beta=0.0"),
        ({"group_size": 1}, "self.group_size=1"),
        ({"masks": 0}, "masks=0"),
        ({"mask_law": "bernoulli"}, "mask_law='bernoulli': choose one of .*'independent'"),
    ],
)
def test_impossible_hyper_parameters_say_what_is_possible(values, message):
    with pytest.raises(ValueError, match=message):
        vrpo.Hyper(**values)
