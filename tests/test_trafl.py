"""TraFL: its optimum is the tilted reference, and which squares are unbiased."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scoring
import tiny

from dmrl.algorithms import trafl
from dmrl.diffusion import score
from dmrl.types import TEMPLATE, Models

BETA, SHORT = 1.5, 2
FORMS = ("learned", "vargrad")


@functools.cache
def tilting():
    """(all completions [F,2], their rewards, table of p_ref, table of the tilted p).

    The reward adds up over positions and the models are products, so the target is one too.
    """
    keys = jax.random.split(jax.random.key(1), 2)
    reference = jax.random.normal(keys[0], (SHORT, tiny.VOCAB))
    parts = jax.random.uniform(keys[1], (SHORT, tiny.VOCAB))
    tokens = jnp.array(list(itertools.product(range(tiny.MASK), repeat=SHORT)))
    reward = parts[0, tokens[:, 0]] + parts[1, tokens[:, 1]]
    return tokens, reward, reference, reference + BETA * parts


def law(table):
    """log p of every completion under a product model."""
    tokens = tilting()[0]
    rows = jax.nn.log_softmax(table[:, : tiny.MASK])
    return rows[0, tokens[:, 0]] + rows[1, tokens[:, 1]]


def bind_product(params):
    return scoring.with_log_z(scoring.product)(params)


def tilting_batch(hp):
    tokens, reward, reference, _ = tilting()
    params = {"policy": reference, "z": jnp.zeros(())}
    rollout = tiny.rollout(tokens, reward=reward)
    return scoring.prepared(trafl, bind_product, params, params, rollout, hp)


def hyper(form, unit):
    beta = BETA / SHORT if unit == "token" else BETA
    return trafl.Hyper(group_size=9, beta=beta, score_unit=unit, log_z=form)


@pytest.mark.parametrize("unit", score.UNITS)
@pytest.mark.parametrize("form", FORMS)
def test_the_tilted_reference_is_where_the_gradient_vanishes(form, unit):
    _, reward, reference, tilted = tilting()
    log_z = jax.nn.logsumexp(law(reference) + BETA * (reward - reward.mean()))
    if unit == "token":
        log_z = log_z / SHORT
    hp = hyper(form, unit)
    batch = tilting_batch(hp)
    args = (trafl, bind_product)
    (value, _), grad = scoring.value_and_gradient(*args, {"policy": tilted, "z": log_z}, batch, hp)
    assert float(value) == pytest.approx(0, abs=1e-11)
    np.testing.assert_allclose(tiny.flat(grad), 0, atol=1e-6)
    away = scoring.gradient(*args, {"policy": reference, "z": log_z}, batch, hp)
    assert np.abs(tiny.flat(away["policy"])).max() > 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_descent_from_the_reference_reaches_the_tilted_law(form):
    _, reward, reference, _ = tilting()
    hp = hyper(form, "sequence")
    batch, optimizer = tilting_batch(hp), optax.adam(0.05)

    @jax.jit
    def descend(params):
        def step(carry, _):
            params, state = carry
            grad = jax.grad(lambda p: trafl.loss(Models(bind_product(p), None, None), batch, hp)[0])
            updates, state = optimizer.update(grad(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=400)[0][0]

    params = descend({"policy": reference, "z": jnp.zeros(())})
    target = jax.nn.log_softmax(law(reference) + BETA * reward)
    reached = law(params["policy"])

    def kl(log_p):
        return float(jnp.sum(jnp.exp(log_p) * (log_p - target)))

    assert kl(law(reference)) > 0.02
    assert kl(reached) == pytest.approx(0, abs=1e-6)


def subsets(length):
    """(masks [S,L], probabilities [S]) of l ~ U{1..L} and a uniform subset of that size."""
    masks = np.array([m for m in itertools.product([False, True], repeat=length) if any(m)])
    sizes = masks.sum(axis=1)
    ways = np.array([np.sum(sizes == size) for size in sizes])
    return jnp.array(masks), jnp.array(1 / (length * ways), jnp.float32)


def every_pair_of_masks(tokens, bind, reference, target):
    """A batch whose loss is the exact expectation over two independent maskings.

    One item for every completion and pair of masks, weighted by its probability.
    """
    length = tokens.shape[1]
    masks, chance = subsets(length)
    pairs = np.array(list(itertools.product(range(len(masks)), repeat=2)))
    hidden = jnp.tile(masks[pairs], (len(tokens), 1, 1))
    labels = jnp.repeat(tokens, len(pairs), axis=0)
    prompt = jnp.zeros((len(labels), 2), jnp.int32)
    counted = jnp.ones(labels.shape, bool)
    masked = score.Masked(
        prompt=prompt,
        prompt_valid=jnp.ones(prompt.shape, bool),
        state=jnp.where(hidden, tiny.MASK, labels[:, None]),
        labels=labels,
        weight=score.weights(hidden, counted, "sequence"),
    )
    weight = jnp.tile(chance[pairs[:, 0]] * chance[pairs[:, 1]], len(tokens))
    return trafl.Batch(
        masked=jax.tree.map(lambda x: x[:, None], masked),
        reference=scoring.scores(bind, reference, masked)[:, None],
        target=jnp.repeat(target, len(pairs))[:, None],
        template=jnp.full(labels.shape, tiny.MASK),
        weight=weight / len(tokens),
    ), chance


def pairwise(square):
    return trafl.Hyper(masks=2, mask_law="independent", square=square, score_unit="sequence")


def test_the_pairwise_square_is_unbiased_and_the_plain_one_adds_the_variance():
    params, _, bind = tiny.perceptron(3)
    other, _, _ = tiny.perceptron(3, seed=5)
    tokens, z = jnp.array([[0, 2, 1]]), jnp.float32(0.3)
    batch, chance = every_pair_of_masks(tokens, bind, other, jnp.array([0.7]))
    one = jax.tree.map(lambda x: x[:, 0], batch.masked)
    gap = scoring.scores(bind, params, one) - batch.reference[:, 0]
    delta = gap[:: len(chance), 0] - 0.7 + z  # the first mask of a pair takes every value once
    mean = jnp.sum(chance * delta)
    variance = jnp.sum(chance * jnp.square(delta - mean))
    assert float(variance) > 0.01
    for square, expected in (("pairwise", mean**2), ("mean", mean**2 + variance / 2)):
        bound = scoring.with_log_z(bind)
        (value, _), _ = scoring.value_and_gradient(
            trafl, bound, {"policy": params, "z": z}, batch, pairwise(square)
        )
        assert float(value) == pytest.approx(float(expected), rel=1e-4), square


def test_only_the_pairwise_square_rests_at_the_tilted_reference_under_random_masks():
    tokens, reward, reference, tilted = tilting()
    centred = reward - reward.mean()
    log_z = jax.nn.logsumexp(law(reference) + BETA * centred)
    batch, _ = every_pair_of_masks(tokens, scoring.product, reference, BETA * centred)
    params = {"policy": tilted, "z": log_z}
    still, moved = (
        tiny.flat(scoring.gradient(trafl, bind_product, params, batch, pairwise(square)))
        for square in ("pairwise", "mean")
    )
    np.testing.assert_allclose(still, 0, atol=1e-5)
    assert np.abs(moved).max() > 1e-2, "the mask variance pulls it back"


@pytest.fixture
def moved():
    """(parameters with a head, bind, rollout, reference) of two groups of four."""
    params, bind, rollout = scoring.case(rows=8, size=4)
    params = {"policy": params, "z": jnp.float32(0.2)}
    return params, scoring.with_log_z(bind), rollout, jax.tree.map(lambda x: 0.8 * x, params)


@pytest.mark.parametrize("unit", score.UNITS)
def test_the_loss_is_the_mean_squared_residual(moved, unit):
    params, bind, rollout, reference = moved
    hp = trafl.Hyper(group_size=4, score_unit=unit)
    batch = scoring.prepared(trafl, bind, params, reference, rollout, hp)
    tilt = hp.beta * (rollout.reward - jnp.repeat(rollout.reward.reshape(2, 4).mean(1), 4))

    @jax.jit
    def residual_square(p):
        gap = scoring.sums(bind, p, batch.masked) - scoring.sums(bind, reference, batch.masked)
        return jnp.mean(jnp.square(gap - tilt + p["z"]))

    want, want_grad = jax.value_and_grad(residual_square)(params)
    (value, metrics), grad = scoring.value_and_gradient(trafl, bind, params, batch, hp)
    assert float(value) == pytest.approx(float(want), rel=1e-5)
    tiny.assert_close(grad, want_grad)
    gap = scoring.sums(bind, params, batch.masked) - scoring.sums(bind, reference, batch.masked)
    assert float(metrics["relative_score"]) == pytest.approx(float(gap.mean()), rel=1e-4)
    assert float(metrics["log_z"]) == pytest.approx(0.2, rel=1e-5)


def test_vargrad_is_the_variance_within_the_group_and_reads_no_head(moved):
    params, bind, rollout, reference = moved
    hp = trafl.Hyper(group_size=4, log_z="vargrad")
    batch = scoring.prepared(trafl, bind, params, reference, rollout, hp)

    @jax.jit
    def variance(p):
        gap = scoring.sums(bind, p, batch.masked) - scoring.sums(bind, reference, batch.masked)
        return jnp.mean(jnp.var((gap - hp.beta * rollout.reward).reshape(2, 4), axis=1))

    want, want_grad = jax.value_and_grad(variance)(params)
    (value, _), grad = scoring.value_and_gradient(trafl, bind, params, batch, hp)
    assert float(value) == pytest.approx(float(want), rel=1e-4)
    tiny.assert_close(grad["policy"], want_grad["policy"])
    assert float(grad["z"]) == 0


def test_vargrad_centres_masking_by_masking_so_that_pairs_stay_independent(moved):
    params, bind, rollout, reference = moved
    hp = trafl.Hyper(
        group_size=4, log_z="vargrad", square="pairwise", mask_law="independent", masks=3
    )
    batch = scoring.prepared(trafl, bind, params, reference, rollout, hp)
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch.masked)
    gap = scoring.scores(bind, params, rows).reshape(2, 4, 3) - batch.reference
    rest = np.asarray(gap - hp.beta * rollout.reward.reshape(2, 4, 1))
    delta = rest - rest.mean(axis=1, keepdims=True)
    pairs = [delta[..., i] * delta[..., j] for i in range(3) for j in range(3) if i != j]
    (value, _), _ = scoring.value_and_gradient(trafl, bind, params, batch, hp)
    assert float(value) == pytest.approx(np.mean(pairs), rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_strided_microbatches_add_up(form):
    params, bind, rollout = scoring.case(rows=8)
    bind, params = scoring.with_log_z(bind), {"policy": params, "z": jnp.float32(0.2)}
    reference = jax.tree.map(lambda x: 0.8 * x, params)
    hp = trafl.Hyper(group_size=2, log_z=form)
    batch = scoring.prepared(trafl, bind, params, reference, rollout, hp)
    scoring.assert_adds_up(trafl, bind, params, batch, hp, cuts=(2,))


def test_tokens_after_eos_and_template_positions_get_no_weight_and_no_gradient(moved):
    params, bind, rollout, reference = moved
    hp = trafl.Hyper(group_size=4)
    scoring.assert_only_sampled_tokens_count(trafl, bind, params, rollout, reference, hp)


def test_the_head_sees_the_prompt_and_the_template_before_sampling(moved):
    params, bind, rollout, reference = moved
    batch = scoring.prepared(trafl, bind, params, reference, rollout, trafl.Hyper(group_size=4))
    template = jnp.where(rollout.reveal_step == TEMPLATE, rollout.tokens, tiny.MASK)
    np.testing.assert_array_equal(batch.template, template[::4])
    seen = []

    def log_z(*args):
        seen.extend(args)
        return jnp.zeros(2)

    policy = bind(params)._replace(heads={"log_z": log_z})
    trafl.loss(Models(policy, None, None), batch, trafl.Hyper(group_size=4))
    np.testing.assert_array_equal(seen[0], rollout.prompt[::4])
    np.testing.assert_array_equal(seen[1], rollout.prompt_valid[::4])
    np.testing.assert_array_equal(seen[2], template[::4])


def test_tied_groups_leave_a_policy_that_is_the_reference():
    params, bind, rollout = scoring.case(rows=8, size=4, reward=[1.0] * 4 + [0.0] * 4)
    hp = trafl.Hyper(group_size=4, log_z="vargrad")
    batch = scoring.prepared(trafl, bind, params, params, rollout, hp)
    grad = scoring.gradient(trafl, bind, params, batch, hp)
    np.testing.assert_allclose(tiny.flat(grad), 0, atol=1e-6)


def test_a_group_of_two_prompts_ends_in_nan(moved):
    params, bind, rollout, reference = moved
    hp = trafl.Hyper(group_size=8, log_z="vargrad")
    batch = scoring.prepared(trafl, bind, params, reference, rollout, hp)
    (value, _), _ = scoring.value_and_gradient(trafl, bind, params, batch, hp)
    assert np.isnan(value)


def test_it_asks_for_a_reference_and_for_the_head_it_learns():
    assert trafl.needs(trafl.Hyper()) == {"reference", "log_z"}
    assert trafl.needs(trafl.Hyper(log_z="vargrad")) == {"reference"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"square": "pairwise"}, "independent masks only: mask_law='complementary'"),
        ({"square": "pairwise", "mask_law": "independent", "masks": 1}, "two or more .*masks=1"),
        ({"square": "huber"}, "square='huber': choose one of .*'mean', 'pairwise'"),
        ({"log_z": "none"}, "log_z='none': choose one of .*'learned', 'vargrad'"),
        ({"beta": 0.0}, "self.beta=0.0"),
        ({"group_size": 1}, "self.group_size=1"),
        ({"masks": 3}, "masks=3: complementary masks come in pairs"),
    ],
)
def test_impossible_hyper_parameters_say_what_is_possible(values, message):
    with pytest.raises(ValueError, match=message):
        trafl.Hyper(**values)
