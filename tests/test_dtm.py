"""DTM: the authors' numbers, and its identities by enumeration over a tabular denoiser."""

import functools
import itertools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dmrl import models
from dmrl.algorithms import dtm
from dmrl.types import HINT, TEMPLATE, Denoiser, Models

VOCAB, MASK, LENGTH, BLOCK = 3, 2, 4, 2
CONTROLS = (0.0, 0.5, 1.0)
OUTCOMES = np.array(list(itertools.product(range(MASK), repeat=LENGTH)))


def reading(logits, mask_id=MASK):
    """A denoiser that answers with these logits [B,S,V], whatever it is asked."""

    def log_prob(hidden, labels, needed=None):
        return jnp.take_along_axis(jax.nn.log_softmax(hidden), labels, axis=-1)

    return Denoiser(lambda *_: logits, lambda hidden: hidden, log_prob, mask_id, -1)


def test_golden_loss_and_gradient(recorded_more):
    tensors, cases, cfg, params = recorded_more
    names = [name for name in cases if name.startswith("dtm/")]
    assert len(names) == 3

    @functools.partial(jax.jit, static_argnames="hp")
    def slope(params, batch, teacher_logits, hp):
        def objective(params):
            policy = models.bind(cfg, {"params": params}, keep_mask=True)
            return dtm.loss(Models(policy, reading(teacher_logits), None), batch, hp)[0]

        return jax.value_and_grad(objective)(params)

    for name in names:
        case, prefix = cases[name], name.removesuffix("/loss")
        prompt, hp = case["prompt_len"], dtm.Hyper(case["h"], case["control_variate"])
        x1, xt = tensors[f"{prefix}/x1"], tensors[f"{prefix}/xt"]
        active_only = case["use_sar_active_block_norm"]
        counted = tensors[f"{prefix}/{'active_block_mask' if active_only else 'mask_indices'}"] > 0
        batch = dtm.Batch(
            prompt=xt[:, :prompt],
            prompt_valid=jnp.ones((xt.shape[0], prompt), bool),
            state=xt[:, prompt:],
            labels=x1[:, prompt:],
            mass=jnp.exp(case["h"] * tensors[f"{prefix}/reward"]),
            weight=counted / (counted.shape[0] * jnp.sum(counted, axis=1, keepdims=True)),
        )
        padding = ((0, 0), (prompt, 0), (0, 0))
        teacher_logits = jnp.pad(tensors[f"{prefix}/teacher_logits"], padding)
        loss, grad = slope(params, batch, teacher_logits, hp)
        assert float(loss) == pytest.approx(case["loss"], rel=1e-4), name
        goldens.assert_gradient(grad, case, tensors, name)


def test_golden_masks_have_the_structure_of_the_interpolant(recorded_more):
    """Not their random choice within the active block, which is another generator's."""
    tensors, cases, _, _ = recorded_more
    interpolant = jax.jit(dtm.interpolant, static_argnums=3)
    for name in (n.removesuffix("/loss") for n in cases if n.startswith("dtm/")):
        masked = np.asarray(tensors[f"{name}/mask_indices"]) > 0
        active = np.asarray(tensors[f"{name}/active_block_mask"]) > 0
        keys = jax.random.split(jax.random.key(0), masked.shape[0])
        count = tensors[f"{name}/num_to_mask"]
        ours, part = interpolant(keys, jnp.ones(masked.shape, bool), count, 8)
        blocks = (masked.shape[0], -1, 8)
        for got, want in ((ours, masked), (part, active)):
            counts = np.asarray(got).reshape(blocks).sum(axis=2)
            np.testing.assert_array_equal(counts, want.reshape(blocks).sum(axis=2))


def tabular(table):
    """A denoiser with logits [state, L, V] of its own for each of the VOCAB^L states."""
    place = VOCAB ** jnp.arange(LENGTH)

    def encode(tokens, valid, *_):
        del valid
        state = jnp.sum(tokens[:, -LENGTH:] * place[None], axis=1)
        return jnp.pad(table[state], ((0, 0), (tokens.shape[1] - LENGTH, 0), (0, 0)))

    def logits(hidden):
        mask = jnp.expand_dims(jnp.arange(VOCAB) == MASK, range(hidden.ndim - 1))
        return jnp.where(mask, -jnp.inf, hidden)

    def log_prob(hidden, labels, needed=None):
        return jnp.take_along_axis(jax.nn.log_softmax(logits(hidden)), labels, axis=-1)

    return Denoiser(encode, logits, log_prob, MASK, -1)


@functools.cache
def world():
    """(law of the completions, their rewards): neither a product over positions."""
    keys = jax.random.split(jax.random.key(3), 2)
    law = jax.nn.softmax(1.5 * jax.random.normal(keys[0], (len(OUTCOMES),)))
    return np.asarray(law, np.float64), np.asarray(jax.random.uniform(keys[1], (len(OUTCOMES),)))


def posterior(law):
    """Logits [state, L, V]: log P(x_i = v | the visible tokens of the state) under `law`."""
    table = np.zeros((VOCAB**LENGTH, LENGTH, VOCAB))
    for state in itertools.product(range(VOCAB), repeat=LENGTH):
        visible = np.array(state) != MASK
        fits = (OUTCOMES[:, visible] == np.array(state)[visible]).all(axis=1)
        index = sum(x * VOCAB**i for i, x in enumerate(state))
        for v in range(MASK):
            table[index, :, v] = (law[:, None] * fits[:, None] * (v == OUTCOMES)).sum(axis=0)
    return jnp.asarray(np.log(np.maximum(table, 1e-12)), jnp.float32)


def masks(active_only):
    """Every (masked, W, probability) of the interpolant on LENGTH positions in blocks."""
    for count in range(1, LENGTH + 1):
        full, rest = divmod(count - 1, BLOCK)
        start = LENGTH - BLOCK * (full + 1)
        parts = list(itertools.combinations(range(start, start + BLOCK), rest + 1))
        for part in parts:
            active = np.isin(np.arange(LENGTH), part)
            masked = active | (np.arange(LENGTH) >= start + BLOCK)
            yield masked, active if active_only else masked, 1 / (LENGTH * len(parts))


def every_item(law, h, active_only):
    """The expectation over completions of `law` and masks as one batch; and its probabilities."""
    _, reward = world()
    items = []
    for (x1, p, r), (masked, w, q) in itertools.product(
        zip(OUTCOMES, law, reward, strict=True), masks(active_only)
    ):
        items.append((np.where(masked, MASK, x1), x1, np.exp(h * r), p * q * w / w.sum(), p * q))
    state, labels, mass, weight, chance = (np.array(x) for x in zip(*items, strict=True))
    batch = dtm.Batch(
        prompt=jnp.zeros((len(items), 1), jnp.int32),
        prompt_valid=jnp.ones((len(items), 1), bool),
        state=jnp.asarray(state, jnp.int32),
        labels=jnp.asarray(labels, jnp.int32),
        mass=jnp.asarray(mass, jnp.float32),
        weight=jnp.asarray(weight, jnp.float32),
    )
    return batch, chance


@functools.partial(jax.jit, static_argnames="hp")
def slope(table, teacher, batch, hp):
    trio = (tabular(teacher), None)
    return jax.grad(lambda t: dtm.loss(Models(tabular(t), *trio), batch, hp)[0])(table)


def tilted(law, h):
    tilt = law * np.exp(h * world()[1])
    return tilt / tilt.sum()


@pytest.mark.parametrize("active_only", [True, False], ids=["active", "all"])
@pytest.mark.parametrize("c", CONTROLS)
def test_the_minimiser_is_the_tilted_posterior_for_every_c(c, active_only):
    """Convex in the logits, so a zero gradient is the minimum."""
    law, _ = world()
    batch, _ = every_item(law, 2.0, active_only)
    hp = dtm.Hyper(2.0, c, BLOCK, active_only)
    teacher = posterior(law)
    at_teacher = np.abs(slope(teacher, teacher, batch, hp)).max()
    at_goal = np.abs(slope(posterior(tilted(law, 2.0)), teacher, batch, hp)).max()
    assert at_teacher > 0.01
    assert at_goal < 1e-4 * at_teacher


def test_the_mean_gradient_is_the_same_for_every_c_and_the_variance_falls_with_it():
    law, _ = world()
    batch, chance = every_item(law, 2.0, True)
    teacher = posterior(law)
    theta = teacher + 0.5 * jax.random.normal(jax.random.key(1), teacher.shape)
    unit = batch._replace(weight=batch.weight / jnp.asarray(chance, jnp.float32)[:, None])
    single = jax.tree.map(lambda x: x[:, None], unit)
    total, spread = [], []
    for c in CONTROLS:
        hp = dtm.Hyper(2.0, c, BLOCK)
        total.append(slope(theta, teacher, batch, hp))
        each = jax.jit(
            lambda items, hp=hp: jax.lax.map(lambda one: slope(theta, teacher, one, hp), items)
        )(single)
        square = np.sum(np.square(np.asarray(each)), axis=(1, 2, 3))
        spread.append(chance @ square - np.sum(np.square(total[-1])))
    tiny.assert_close(total[1], total[0], rtol=2e-5)
    tiny.assert_close(total[2], total[0], rtol=2e-5)
    assert spread[0] > 1.05 * spread[1] > 1.05**2 * spread[2] > 0


@pytest.mark.parametrize("c", CONTROLS)
def test_two_phases_are_one_of_twice_the_tilt(c):
    law, _ = world()
    after_one = tilted(law, 1.5)
    goal = posterior(tilted(law, 3.0))
    second, _ = every_item(after_one, 1.5, True)
    once, _ = every_item(law, 3.0, True)
    teacher = posterior(after_one)
    hp = dtm.Hyper(1.5, c, BLOCK)
    moved = np.abs(slope(teacher, teacher, second, hp)).max()
    assert np.abs(slope(goal, teacher, second, hp)).max() < 1e-4 * moved
    hp = dtm.Hyper(3.0, c, BLOCK)
    assert np.abs(slope(goal, posterior(law), once, hp)).max() < 1e-4 * moved


ROWS = 600
HP = dtm.Hyper(h=1.0, block_length=BLOCK)


def case(rows=ROWS, seed=0, prompt=3):
    """(parameters, params -> Denoiser, rollout): position 1 is the template's."""
    params, _, bind = tiny.perceptron(LENGTH, prompt=prompt, seed=seed)
    keys = jax.random.split(jax.random.key(seed + 7), 3)
    tokens = jax.random.randint(keys[0], (rows, LENGTH), 0, tiny.MASK)
    reveal = jnp.broadcast_to(jnp.array([0, TEMPLATE, 1, 2]), tokens.shape)
    context = jax.random.randint(keys[1], (rows, prompt), 0, tiny.MASK)
    reward = jax.random.uniform(keys[2], (rows,))
    return params, bind, tiny.rollout(tokens, reveal, context, reward)


@functools.partial(jax.jit, static_argnames=("hp", "eos"))
def prepared(rollout, hp=HP, key=0, eos=tiny.NO_EOS):
    blank = reading(jnp.zeros(()), tiny.MASK)._replace(eos_id=eos)
    trio = Models(blank, None, None)
    return dtm.prepare(trio, rollout, None, jax.random.key(key), tiny.INNER, hp)


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def gradient(bind, params, batch, hp=HP, teacher=None):
    trio = (None if teacher is None else bind(teacher), None)
    return jax.grad(lambda p: dtm.loss(Models(bind(p), *trio), batch, hp)[0])(params)


def test_without_phases_the_gradient_is_reinforce_with_the_tilt_as_advantage():
    """The teacher is then the policy held constant, whose own score has mean zero."""
    params, bind, rollout = case()
    batch = prepared(rollout)

    @jax.jit
    @jax.grad
    def reinforce(params, c):
        policy = bind(params)
        tokens = jnp.concatenate([batch.prompt, batch.state], axis=1)
        hidden = policy.encode(tokens, jnp.ones(tokens.shape, bool))[:, batch.prompt.shape[1] :]
        log_prob = policy.log_prob(hidden, rollout.tokens[..., None])[..., 0]
        advantage = jnp.exp(rollout.reward) - c
        return -jnp.sum(batch.weight * advantage[:, None] * log_prob)

    for c in (0.0, 0.5):
        hp = dtm.Hyper(1.0, c, BLOCK)
        want = reinforce(params, c)
        tiny.assert_close(gradient(bind, params, batch, hp), want)
        tiny.assert_close(gradient(bind, params, batch, hp, params), want)


def test_the_loss_is_the_cross_entropy_with_the_written_target():
    params, bind, rollout = case()
    batch = prepared(rollout)
    old = bind(jax.tree.map(lambda x: 0.9 * x, params))

    @functools.partial(jax.jit, static_argnums=0)
    def loss(c):
        return dtm.loss(Models(bind(params), old, None), batch, dtm.Hyper(1.0, c, BLOCK))[0]

    @jax.jit
    def probabilities():
        tokens = jnp.concatenate([batch.prompt, batch.state], axis=1)
        hidden = (
            d.encode(tokens, jnp.ones(tokens.shape, bool))[:, 3:] for d in (bind(params), old)
        )
        return [
            jax.nn.softmax(d.logits(h)) for d, h in zip((bind(params), old), hidden, strict=True)
        ]

    pi, pi_a = (np.asarray(p)[..., : tiny.MASK] for p in probabilities())
    label = np.arange(tiny.MASK) == np.asarray(rollout.tokens)[..., None]
    for c in (0.0, 0.5):
        tilt = np.exp(np.asarray(rollout.reward))[:, None, None]
        target = c * pi_a + label * (tilt - c)
        np.testing.assert_allclose(target.sum(axis=-1) / tilt[..., 0], 1, rtol=1e-5)
        each = -np.sum(target * np.log(pi), axis=-1)
        assert float(loss(c)) == pytest.approx(float(np.sum(batch.weight * each)), rel=1e-5)


def test_the_number_of_masks_is_uniform_and_they_come_from_the_back():
    _, _, rollout = case()
    batch = prepared(rollout, dtm.Hyper(1.0, 1.0, BLOCK, False))
    masked = np.asarray(batch.state == tiny.MASK)
    assert not masked[:, 1].any(), "the template stays"
    # Positions 0 | 2, 3 are free. One mask: either of the last block; two: that block; three: all.
    law = {(0, 0, 1): 1 / 6, (0, 1, 0): 1 / 6, (0, 1, 1): 1 / 3, (1, 1, 1): 1 / 3}
    seen = [tuple(row) for row in masked[:, [0, 2, 3]].astype(int).tolist()]
    assert tiny.chi_square(seen, law) > 1e-3
    np.testing.assert_array_equal(np.asarray(batch.weight) > 0, masked)
    np.testing.assert_allclose(np.sum(batch.weight, axis=1), 1 / ROWS, rtol=1e-5)
    active = prepared(rollout)
    np.testing.assert_array_equal(active.state, batch.state)
    three = masked.sum(axis=1) == 3
    counted = np.asarray(active.weight) > 0
    np.testing.assert_array_equal(counted[~three], masked[~three])
    assert (counted[three] == [True, False, False, False]).all()


def test_hints_stay_visible_and_a_row_without_samples_gives_a_finite_zero():
    params, bind, rollout = case()
    reveal = rollout.reveal_step.at[:, 2].set(HINT).at[0].set(TEMPLATE)
    batch = prepared(rollout._replace(reveal_step=reveal))
    np.testing.assert_array_equal(batch.state[:, 2], rollout.tokens[:, 2])
    assert float(jnp.sum(batch.weight[0])) == 0
    assert float(jnp.sum(batch.weight)) == pytest.approx(1)
    alone = batch._replace(weight=batch.weight.at[1:].set(0))
    assert (tiny.flat(gradient(bind, params, alone, HP, params)) == 0).all()


def test_tokens_after_eos_count_and_uncounted_positions_give_no_gradient():
    params, bind, rollout = case()
    batch = prepared(rollout, eos=0)
    np.testing.assert_array_equal(batch.weight, prepared(rollout).weight)
    hidden = batch.weight > 0
    other = jnp.where(hidden, batch.labels, 1 - jnp.minimum(batch.labels, 1))
    assert (other != batch.labels).any()
    teacher = jax.tree.map(lambda x: 0.9 * x, params)
    changed = gradient(bind, params, batch._replace(labels=other), HP, teacher)
    tiny.assert_close(changed, gradient(bind, params, batch, HP, teacher), rtol=1e-6)


def test_the_mass_of_a_target_is_the_exponential_of_the_clamped_reward():
    params, bind, rollout = case()
    rollout = rollout._replace(reward=rollout.reward.at[:4].set(jnp.array([0.0, -1, 0.5, 2])))
    batch = prepared(rollout)
    np.testing.assert_allclose(batch.mass[:4], np.exp([0, 0, 0.5, 2]), rtol=1e-6)
    metrics = jax.jit(lambda: dtm.loss(Models(bind(params), None, None), batch, HP)[1])()
    assert float(metrics["target_mass"]) == pytest.approx(float(np.mean(batch.mass)), rel=1e-5)


def test_noise_is_fresh_for_every_key_and_keyed_by_row():
    _, _, rollout = case()
    one, two = (prepared(rollout, key=key) for key in (0, 1))
    assert (one.state != two.state).any()
    part = jax.tree.map(lambda x: x[jnp.array([7, 3])], rollout)
    np.testing.assert_array_equal(prepared(part).state, one.state[jnp.array([7, 3])])


def test_gradients_of_strided_microbatches_add_up():
    params, bind, rollout = case()
    teacher = jax.tree.map(lambda x: 0.9 * x, params)
    batch = prepared(rollout)
    whole = gradient(bind, params, batch, HP, teacher)
    parts = [jax.tree.map(lambda x, i=i: x[i::3], batch) for i in range(3)]
    each = [gradient(bind, params, part, HP, teacher) for part in parts]
    tiny.assert_close(jax.tree.map(lambda *g: sum(g), *each), whole, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"h": 0.0}, "h=0.0 must be positive"),
        ({"control_variate": 1.5}, r"control_variate=1.5: choose c in \[0, 1\]"),
        ({"block_length": 0}, "block_length=0 must be at least 1"),
    ],
)
def test_impossible_hyper_parameters_say_what_is_possible(values, message):
    with pytest.raises(ValueError, match=message):
        dtm.Hyper(**values)


def test_blocks_that_do_not_divide_the_completion_are_refused():
    _, _, rollout = case()
    with pytest.raises(ValueError, match="block_length=3 does not divide the completion's 4"):
        prepared(rollout, dtm.Hyper(block_length=3))
