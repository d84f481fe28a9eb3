"""Probes: one-shot fillings of rebuilt states, and the map over whole vocabulary rows."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.special import softmax

from dmrl.diffusion.likelihood import POSITIONS, over_positions, state_log_prob
from dmrl.diffusion.probe import fill, state_at
from dmrl.types import HINT, TEMPLATE, ProbePlan

REVEAL = [[0, TEMPLATE, 1, 2], [2, TEMPLATE, 0, 1], [1, TEMPLATE, 2, 0]]
TOKENS = [[0, 1, 2, 0], [2, 2, 1, 0], [1, 0, 0, 1]]


def plan(steps, fillings=2, temperature=1.0):
    return ProbePlan(jnp.asarray(steps, jnp.int32), fillings, temperature)


def repeated(rows, prompt, reveal=(0, TEMPLATE, 1, 2), tokens=(0, 1, 2, 0)):
    """The same trajectory in every row; the rows differ in their noise alone."""
    every = jnp.broadcast_to(prompt, (rows, *prompt.shape))
    return tiny.rollout([tokens] * rows, [reveal] * rows, every)


def test_a_state_shows_what_was_revealed_before_its_step():
    rollout = tiny.rollout(TOKENS, REVEAL)
    states = state_at(rollout, jnp.array([[0, 1, 2, 3]] * 3), tiny.MASK)
    M = tiny.MASK
    assert states[0].tolist() == [[M, 1, M, M], [0, 1, M, M], [0, 1, 2, M], [0, 1, 2, 0]]
    assert states[1, 2].tolist() == [M, 2, 1, 0]


def test_hints_are_visible_and_unrevealed_positions_masked_in_every_state():
    rollout = tiny.rollout([[0, 1, 2, tiny.MASK]], [[HINT, 0, 1, 2]])
    states = state_at(rollout, jnp.array([[0, 2]]), tiny.MASK)
    assert states[0].tolist() == [[0, 3, 3, 3], [0, 1, 2, 3]]


def test_stored_states_win_over_rebuilt_ones():
    stored = jnp.arange(3 * 4 * 4, dtype=jnp.int32).reshape(3, 4, 4)
    rollout = tiny.rollout(TOKENS, REVEAL)._replace(states=stored)
    got = state_at(rollout, jnp.array([[2], [0], [3]]), tiny.MASK)[:, 0]
    assert got.tolist() == [stored[0, 2].tolist(), stored[1, 0].tolist(), stored[2, 3].tolist()]


def test_fillings_equal_the_state_off_the_mask_and_are_never_mask():
    params, _, bind = tiny.perceptron(4)
    rollout = tiny.rollout(TOKENS, REVEAL)
    steps = jnp.array([[0, 2], [1, 1], [3, 0]])
    probe = fill(bind(params), rollout, plan(steps, 5), jax.random.key(0))
    assert probe.fills.shape == (3, 2, 5, 4)
    np.testing.assert_array_equal(probe.step, steps)
    np.testing.assert_array_equal(probe.state, state_at(rollout, steps, tiny.MASK))
    state = np.broadcast_to(np.asarray(probe.state)[:, :, None], probe.fills.shape)
    fills, visible = np.asarray(probe.fills), state != tiny.MASK
    np.testing.assert_array_equal(fills[visible], state[visible])
    assert not (fills == tiny.MASK).any()


def exact_fills(denoiser, rollout, step, temperature):
    """{filling: probability}: the product over masked positions of softmax(logits / T)."""
    state = state_at(rollout, jnp.full((rollout.row.shape[0], 1), step), tiny.MASK)[:1, 0]
    tokens = jnp.concatenate([rollout.prompt[:1], state], axis=1)
    hidden = denoiser.encode(tokens, jnp.ones(tokens.shape, bool))[:, rollout.prompt.shape[1] :]
    p = softmax(np.asarray(denoiser.logits(hidden), np.float64)[0] / temperature, axis=-1)
    masked = [i for i, token in enumerate(state[0].tolist()) if token == tiny.MASK]
    law = {}
    for values in itertools.product(range(tiny.MASK), repeat=len(masked)):
        whole = state[0].tolist()
        for i, value in zip(masked, values, strict=True):
            whole[i] = value
        law[tuple(whole)] = math.prod(p[i, v] for i, v in zip(masked, values, strict=True))
    return law


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fillings_follow_the_product_of_softmaxes(temperature):
    params, prompt, bind = tiny.perceptron(4)
    denoiser, rollout = bind(params), repeated(7_000, prompt)
    probe = fill(denoiser, rollout, plan([[0, 1]] * 7_000, 3, temperature), jax.random.key(0))
    for k, step in enumerate((0, 1)):
        law = exact_fills(denoiser, rollout, step, temperature)
        assert sum(law.values()) == pytest.approx(1)
        drawn = [tuple(f) for f in probe.fills[:, k].reshape(-1, 4).tolist()]
        assert len(drawn) == 21_000
        assert tiny.chi_square(drawn, law) > 1e-3
        assert tiny.chi_square(drawn, exact_fills(denoiser, rollout, step, 0.85)) < 1e-3
    # Siblings are independent: their pairs follow the product law.
    pairs = [(tuple(a), tuple(b)) for a, b in probe.fills[:, 1, :2].tolist()]
    law = {(a, b): p * q for a, p in law.items() for b, q in law.items()}
    assert tiny.chi_square(pairs, law) > 1e-3


def test_two_states_of_a_row_draw_independent_noise():
    params, prompt, bind = tiny.perceptron(4)
    rollout = repeated(200, prompt)
    probe = fill(bind(params), rollout, plan([[0, 0]] * 200, 1), jax.random.key(0))
    assert 0.1 < np.mean((probe.fills[:, 0] == probe.fills[:, 1]).all(axis=-1)) < 0.9


def test_noise_is_keyed_by_row_alone():
    params, _, bind = tiny.perceptron(4)
    rollout, steps = tiny.rollout(TOKENS, REVEAL), jnp.array([[0, 1], [1, 0], [2, 1]])
    whole = fill(bind(params), rollout, plan(steps, 3), jax.random.key(0))
    index = jnp.array([2, 0])
    part = rollout._replace(
        **{name: value[index] for name, value in rollout._asdict().items() if value is not None}
    )
    again = fill(bind(params), part, plan(steps[index], 3), jax.random.key(0))
    np.testing.assert_array_equal(again.fills, whole.fills[index])


def test_temperature_zero_fills_greedily():
    params, _, bind = tiny.perceptron(4)
    denoiser, rollout = bind(params), tiny.rollout(TOKENS, REVEAL)
    probe = fill(denoiser, rollout, plan([[0], [1], [2]], 2, 0.0), jax.random.key(0))
    tokens = jnp.concatenate([rollout.prompt, probe.state[:, 0]], axis=1)
    hidden = denoiser.encode(tokens, jnp.ones(tokens.shape, bool))[:, 2:]
    greedy = jnp.argmax(denoiser.logits(hidden), axis=-1)
    expected = jnp.where(probe.state[:, 0] == tiny.MASK, greedy, probe.state[:, 0])
    np.testing.assert_array_equal(probe.fills[:, 0, 0], expected)
    np.testing.assert_array_equal(probe.fills[:, 0, 1], expected)


def test_one_forward_a_state_serves_all_fillings():
    params, _, bind = tiny.perceptron(4)
    rollout, traced, run = tiny.rollout(TOKENS, REVEAL), [], []
    denoiser = bind(params)

    def encode(tokens, valid, *_):
        traced.append(tokens.shape)
        jax.debug.callback(lambda: run.append(1))
        return denoiser.encode(tokens, valid)

    counted = denoiser._replace(encode=encode)
    states, fillings = 5, 4
    steps = jnp.zeros((3, states), jnp.int32)
    probe = jax.jit(lambda r, s, key: fill(counted, r, ProbePlan(s, fillings, 1.0), key))(
        rollout, steps, jax.random.key(0)
    )
    jax.block_until_ready(probe)
    jax.effects_barrier()
    assert traced == [(3, 6)], "the program holds one forward, of the B rows"
    assert len(run) == states
    assert probe.fills.shape == (3, states, fillings, 4)


def test_the_sampler_s_own_drafts_are_returned_without_a_forward():
    params, _, bind = tiny.perceptron(4)

    def encode(tokens, valid, *_):
        raise AssertionError("a draft needs no forward")

    drafts = jax.random.randint(jax.random.key(0), (3, 3, 4), 0, tiny.MASK)
    rollout = tiny.rollout(TOKENS, REVEAL)._replace(drafts=drafts)
    steps = jnp.array([[2, 0], [1, 1], [0, 2]])
    own = ProbePlan(steps, 1, 0.0, own=True)
    probe = fill(bind(params)._replace(encode=encode), rollout, own, jax.random.key(0))
    assert probe.fills.shape == (3, 2, 1, 4)
    np.testing.assert_array_equal(probe.step, steps)
    np.testing.assert_array_equal(probe.state, state_at(rollout, steps, tiny.MASK))
    for row in range(3):
        for k in range(2):
            np.testing.assert_array_equal(probe.fills[row, k, 0], drafts[row, steps[row, k]])


@pytest.mark.parametrize("length", [1, 7, POSITIONS, 3 * POSITIONS, POSITIONS + 8, 2 * 37])
def test_over_positions_equals_the_direct_computation(length):
    hidden = jax.random.normal(jax.random.key(length), (2, length, 3))
    head = jax.random.normal(jax.random.key(0), (3, 5))
    widths = []

    def entropies(chunk, part):
        widths.append(part.shape[1])
        logits = part @ head
        two = jnp.stack([jnp.max(logits, -1), jax.nn.logsumexp(logits, -1)], axis=1)
        return two + 0 * chunk

    got = over_positions(entropies, hidden)
    logits = hidden @ head
    want = jnp.stack([jnp.max(logits, -1), jax.nn.logsumexp(logits, -1)], axis=1)
    assert got.shape == (2, 2, length)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert max(widths) <= POSITIONS


def test_over_positions_numbers_its_chunks():
    hidden = jnp.zeros((1, 2 * POSITIONS, 1))
    number = over_positions(lambda c, h: jnp.full(h.shape[:2], c, jnp.int32), hidden)
    assert number[0].tolist() == [0] * POSITIONS + [1] * POSITIONS


def test_log_prob_of_many_labels_equals_one_forward_a_label():
    params, _, bind = tiny.perceptron(4)
    denoiser = bind(params)
    state = jnp.array([[tiny.MASK, 1, tiny.MASK, 0], [tiny.MASK] * 4])
    labels = jax.random.randint(jax.random.key(1), (2, 3, 4), 0, tiny.MASK)
    prompt, valid = jnp.zeros((2, 2), jnp.int32), jnp.ones((2, 2), bool)
    together = state_log_prob(denoiser, prompt, valid, state, labels)
    tokens = jnp.concatenate([prompt, state], axis=1)
    hidden = denoiser.encode(tokens, jnp.ones(tokens.shape, bool))[:, 2:]
    log_p = jax.nn.log_softmax(denoiser.logits(hidden))
    for z in range(3):
        alone = jnp.take_along_axis(log_p, labels[:, z, :, None], axis=-1)[..., 0]
        np.testing.assert_allclose(together[:, z], alone, rtol=1e-6)
