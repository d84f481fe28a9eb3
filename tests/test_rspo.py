"""RSPO: a regression of the centred log-ratio onto the advantage, and how lambda is set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scoring
import tiny

from dmrl.algorithms import rspo
from dmrl.diffusion import score


@pytest.fixture
def moved():
    """(parameters, bind, rollout, reference) of two groups of four."""
    params, bind, rollout = scoring.case(rows=8, size=4)
    return params, bind, rollout, jax.tree.map(lambda x: 0.8 * x, params)


def advantages(rollout, divide):
    reward = np.asarray(rollout.reward).reshape(2, 4)
    centred = reward - reward.mean(axis=1, keepdims=True)
    return (centred / (reward.std(axis=1, keepdims=True) + 1e-4 if divide else 1)).reshape(-1)


def gap(bind, params, reference, batch):
    """d of every completion."""
    return scoring.sums(bind, params, batch.masked) - scoring.sums(bind, reference, batch.masked)


@pytest.mark.parametrize(
    "options",
    [{"lam": 0.7}, {"lam": 0.01, "score_unit": "sequence"}, {"target_ratio": 0.3}],
    ids=["token", "sequence", "adaptive"],
)
def test_the_gradient_is_lambda_times_that_of_half_the_mean_squared_residual(moved, options):
    params, bind, rollout, reference = moved
    hp = rspo.Hyper(**options)
    batch = scoring.prepared(rspo, bind, params, reference, rollout, hp)
    lam, advantage = batch.lam[0], advantages(rollout, divide=True)
    np.testing.assert_allclose(batch.advantage, advantage, rtol=1e-5)

    @jax.jit
    def half_square(p):
        d = gap(bind, p, reference, batch)
        centred = d - jax.lax.stop_gradient(jnp.mean(d))
        return jnp.mean(jnp.square(centred - advantage / lam)) / 2

    want = jax.tree.map(lambda g: lam * g, jax.grad(half_square)(params))
    tiny.assert_close(scoring.gradient(rspo, bind, params, batch, hp), want)


def test_without_feedback_it_is_an_advantage_weighted_elbo(moved):
    params, bind, rollout, reference = moved
    hp = rspo.Hyper(lam=0.0, divide_by_std=False)
    batch = scoring.prepared(rspo, bind, params, reference, rollout, hp)
    advantage = advantages(rollout, divide=False)

    @jax.jit
    def weighted(p):
        return -jnp.mean(advantage * scoring.sums(bind, p, batch.masked))

    want = jax.grad(weighted)(params)
    tiny.assert_close(scoring.gradient(rspo, bind, params, batch, hp), want)


def test_the_weight_follows_the_policy_and_the_centre_stays(moved):
    params, bind, rollout, reference = moved
    hp = rspo.Hyper(lam=0.7)
    batch = scoring.prepared(rspo, bind, params, reference, rollout, hp)
    centre = gap(bind, params, reference, batch).mean()
    np.testing.assert_allclose(batch.centre, np.full(8, centre), rtol=1e-4)
    later = jax.tree.map(lambda x: 1.1 * x, params)
    centred = gap(bind, later, reference, batch) - centre
    weight = advantages(rollout, divide=True) - 0.7 * centred
    (value, metrics), _ = scoring.value_and_gradient(rspo, bind, later, batch, hp)
    assert float(value) == pytest.approx(float(-jnp.mean(weight * centred)), rel=1e-4)
    assert float(metrics["relative_score"]) == pytest.approx(float(centre + centred.mean()), 1e-3)


def test_an_adaptive_lambda_reaches_its_ratio_and_a_fixed_one_reports_its_own(moved):
    params, bind, rollout, reference = moved
    for hp in (rspo.Hyper(target_ratio=0.25), rspo.Hyper()):
        batch = scoring.prepared(rspo, bind, params, reference, rollout, hp)
        (_, metrics), _ = scoring.value_and_gradient(rspo, bind, params, batch, hp)
        feedback = metrics["lambda"] * gap(bind, params, reference, batch).std()
        ratio = feedback / advantages(rollout, divide=True).std()
        assert float(metrics["feedback_ratio"]) == pytest.approx(float(ratio), rel=1e-3)
        if hp.target_ratio is not None:
            assert float(ratio) == pytest.approx(0.25, rel=1e-3)
        else:
            assert float(metrics["lambda"]) == pytest.approx(0.01)
            assert float(ratio) < 0.05


def test_an_adaptive_lambda_does_not_answer_rounding_noise(moved):
    params, bind, rollout, _ = moved
    hp = rspo.Hyper(target_ratio=0.25, spread_floor=0.1)
    batch = scoring.prepared(rspo, bind, params, params, rollout, hp)
    cap = 0.25 * advantages(rollout, divide=True).std() / 0.1
    np.testing.assert_allclose(batch.lam, np.full(8, cap), rtol=1e-4)
    np.testing.assert_allclose(batch.ratio, 0, atol=1e-4)


@pytest.mark.parametrize("target_ratio", [None, 0.5])
def test_tied_groups_leave_a_policy_that_is_the_reference(target_ratio):
    params, bind, rollout = scoring.case(rows=8, size=4, reward=[1.0] * 4 + [0.0] * 4)
    hp = rspo.Hyper(target_ratio=target_ratio)
    batch = scoring.prepared(rspo, bind, params, params, rollout, hp)
    (_, metrics), grad = scoring.value_and_gradient(rspo, bind, params, batch, hp)
    np.testing.assert_allclose(tiny.flat(grad), 0, atol=1e-6)
    assert np.isfinite(list(metrics.values())).all()


def test_gradients_of_strided_microbatches_add_up(moved):
    params, bind, rollout, reference = moved
    hp = rspo.Hyper(target_ratio=0.5)
    batch = scoring.prepared(rspo, bind, params, reference, rollout, hp)
    scoring.assert_adds_up(rspo, bind, params, batch, hp, cuts=(2,))


def test_tokens_after_eos_and_template_positions_get_no_weight_and_no_gradient(moved):
    params, bind, rollout, reference = moved
    hp = rspo.Hyper()
    scoring.assert_only_sampled_tokens_count(rspo, bind, params, rollout, reference, hp)


def test_it_always_asks_for_a_reference():
    assert rspo.needs(rspo.Hyper()) == {"reference"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lam": -1.0}, "self.lam=-1.0"),
        ({"spread_floor": 0.0}, "self.spread_floor=0.0"),
        ({"target_ratio": 0.0}, "target_ratio=0.0 must be positive, or None"),
        ({"masks": 1}, "masks=1: complementary masks come in pairs"),
        ({"score_unit": "word"}, f"score_unit='word': choose one of .*{score.UNITS[0]}"),
    ],
)
def test_impossible_hyper_parameters_say_what_is_possible(values, message):
    with pytest.raises(ValueError, match=message):
        rspo.Hyper(**values)
