"""The forward process: prompt masks, uniform masks, and where a completion ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import stats

from dmrl.diffusion import bounds
from dmrl.diffusion.masking import (
    block_random,
    complementary,
    mask_prompt,
    mask_prompts,
    mask_uniform,
    random_subset,
    random_subsets,
    stratified_counts,
    uniform_count,
    upto_eos,
)
from dmrl.diffusion.noise import fold_in, row_keys

PROMPT = jnp.ones((400, 50), jnp.int32)
ROWS = jnp.arange(400)


def binomial_p_value(hits, trials, p):
    return stats.binomtest(int(hits), int(trials), p).pvalue


def test_prompt_tokens_are_masked_with_the_given_probability():
    masked = mask_prompt(jax.random.key(0), ROWS, PROMPT, 0.15, tiny.MASK)
    hit = np.asarray(masked) == tiny.MASK
    assert binomial_p_value(hit.sum(), hit.size, 0.15) > 1e-3
    assert binomial_p_value(hit.sum(), hit.size, 0.17) < 1e-3
    assert (np.asarray(masked)[~hit] == 1).all()


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 1), (1.0, tiny.MASK)])
def test_the_extremes_mask_nothing_and_everything(probability, expected):
    masked = mask_prompt(jax.random.key(0), ROWS, PROMPT, probability, tiny.MASK)
    np.testing.assert_array_equal(masked, expected)


def test_prompt_masks_depend_on_key_and_row_alone():
    key, other = jax.random.key(0), jax.random.key(1)
    whole = mask_prompt(key, ROWS, PROMPT, 0.15, tiny.MASK)
    index = jnp.array([7, 300, 2])
    np.testing.assert_array_equal(
        mask_prompt(key, ROWS[index], PROMPT[index], 0.15, tiny.MASK), whole[index]
    )
    assert (whole[0] != whole[1]).any()
    assert (mask_prompt(other, ROWS, PROMPT, 0.15, tiny.MASK) != whole).any()


def test_uniform_masks_follow_their_own_t():
    rows = 20_000
    tokens, allowed = jnp.ones((rows, 8), jnp.int32), jnp.arange(8)[None] != 3
    allowed = jnp.broadcast_to(allowed, tokens.shape)
    noised, masked, t = mask_uniform(
        jax.random.key(0), jnp.arange(rows), tokens, allowed, tiny.MASK, minimum=0.2
    )
    noised, masked, t = np.asarray(noised), np.asarray(masked), np.asarray(t)
    assert stats.kstest(t, stats.uniform(0.2, 0.8).cdf).pvalue > 1e-3
    assert not masked[:, 3].any()
    np.testing.assert_array_equal(noised == tiny.MASK, masked)
    assert (noised[~masked] == 1).all()
    free = masked[:, np.arange(8) != 3]
    for low in (0.2, 0.5, 0.9):
        here = (t >= low) & (t < low + 0.1)
        expected, error = t[here].mean(), np.sqrt(0.25 / free[here].size)
        assert abs(free[here].mean() - expected) < 4 * error


def test_uniform_masks_depend_on_key_and_row_alone():
    rows, key = jnp.arange(6), jax.random.key(0)
    tokens = jnp.ones((6, 8), jnp.int32)
    allowed = tokens > 0
    whole = mask_uniform(key, rows, tokens, allowed, tiny.MASK)
    index = jnp.array([4, 1])
    part = mask_uniform(key, rows[index], tokens[index], allowed[index], tiny.MASK)
    for got, want in zip(part, whole, strict=True):
        np.testing.assert_allclose(got, want[index], rtol=1e-6)


def test_upto_eos_includes_the_first_eos_only():
    tokens = jnp.array([[1, 9, 2, 9], [9, 9, 9, 9], [1, 2, 3, 4], [1, 2, 3, 9]])
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert upto_eos(tokens, 9).astype(int).tolist() == expected
    assert upto_eos(tokens[None], 9).astype(int).tolist() == [expected]


DRAWS, L = 20_000, 4
KEYS = row_keys(jax.random.key(5), jnp.arange(DRAWS))
FREE = jnp.ones((DRAWS, L), bool)


def number(masks):
    """Sets of positions as in `exact`: bit i is position i."""
    return np.asarray(masks) @ 2 ** np.arange(masks.shape[-1])


def outcomes(masks):
    return [tuple(row) for row in number(masks).tolist()]


def law_of(maskings):
    """{(set of masking 1, set of masking 2, ..): probability} of an enumerated law."""
    law = {}
    for sets, p in zip(maskings.state.tolist(), maskings.probability, strict=True):
        law[tuple(sets)] = law.get(tuple(sets), 0) + p
    return law


def test_prompt_masks_of_several_maskings_are_independent_and_begin_with_the_shared_one():
    masks = mask_prompts(jax.random.key(0), ROWS, PROMPT, 0.15, tiny.MASK, 3)
    shared = mask_prompt(jax.random.key(0), ROWS, PROMPT, 0.15, tiny.MASK)
    np.testing.assert_array_equal(masks[:, 0], shared)
    hit = np.asarray(masks) == tiny.MASK
    for m in range(3):
        assert binomial_p_value(hit[:, m].sum(), hit[:, m].size, 0.15) > 1e-3
    both = hit[:, 1] & hit[:, 2]
    assert binomial_p_value(both.sum(), both.size, 0.15**2) > 1e-3


def test_random_subsets_have_the_enumerated_law():
    masks = random_subsets(KEYS, FREE, 2)
    assert tiny.chi_square(outcomes(masks), law_of(bounds.uniform_count(L, 2))) > 1e-3
    assert tiny.chi_square(outcomes(masks), law_of(bounds.stratified_count(L, 2))) == 0


def test_complementary_pairs_have_the_enumerated_law():
    masks = jnp.stack(complementary(KEYS, FREE), axis=1)
    assert tiny.chi_square(outcomes(masks), law_of(bounds.complementary(L))) > 1e-3


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_stratified_counts_have_the_enumerated_law(samples):
    counts = stratified_counts(KEYS, jnp.full(DRAWS, L), samples)
    masks = jnp.stack(
        [random_subset(fold_in(KEYS, 9 + m), FREE, counts[:, m]) for m in range(samples)], axis=1
    )
    assert tiny.chi_square(outcomes(masks), law_of(bounds.stratified_count(L, samples))) > 1e-3


@pytest.mark.parametrize(("total", "samples"), [(5, 2), (5, 6), (7, 2), (9, 6), (30, 4), (1, 3)])
def test_every_stratified_count_alone_is_exactly_uniform(total, samples):
    """Rounding halves to even, as the released LLaDA code does, fails this at (5, 2)."""
    counts = np.asarray(stratified_counts(KEYS[:4000], jnp.full(4000, total), samples))
    each = {tuple(row) for row in counts.tolist()}
    assert len(each) == total, "one row of counts for each first count"
    for column in zip(*each, strict=True):
        assert sorted(column) == list(range(1, total + 1))
    offsets = np.sort((counts - counts[:, :1]) % total, axis=1)
    assert np.diff(offsets, axis=1).max(initial=0) <= -(-total // samples)
    even = {int(np.round(first + total / samples) - 1) % total + 1 for first in range(1, total + 1)}
    assert ((total, samples) == (5, 2)) <= (len(even) < total)


def test_a_row_without_positions_has_no_counts():
    none = jnp.zeros(DRAWS, jnp.int32)
    assert not np.asarray(stratified_counts(KEYS, none, 2)).any()
    assert not np.asarray(uniform_count(KEYS, none)).any()


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_block_maskings_have_the_enumerated_law_and_weight(samples):
    hidden, weight = block_random(KEYS, FREE, 2, samples)
    law = bounds.block_wise(L, 2, samples, inside_only=True)
    assert tiny.chi_square(outcomes(hidden), law_of(law)) > 1e-3
    of_sets = {tuple(s): w for s, w in zip(law.state.tolist(), law.weight, strict=True)}
    for sets, got in zip(outcomes(hidden[:200]), weight[:200], strict=True):
        np.testing.assert_allclose(got, of_sets[sets], rtol=1e-6)


def test_only_blocks_with_counted_positions_are_chosen_and_all_of_them_alike():
    counted = jnp.array([1, 1, 0, 0, 0, 1, 1, 0, 0, 0], bool)
    counted = jnp.broadcast_to(counted, (DRAWS, 10))
    hidden, weight = block_random(KEYS, counted, 2, 4)
    hidden, weight = np.asarray(hidden), np.asarray(weight)
    assert not (hidden & ~np.asarray(counted)[:, None]).any()
    first = (weight > 0).argmax(axis=2) // 2
    assert set(first.reshape(-1).tolist()) == {0, 2, 3}
    for m in range(4):
        assert tiny.chi_square(first[:, m].tolist(), {0: 1 / 3, 2: 1 / 3, 3: 1 / 3}) > 1e-3
    assert (np.sort(first[:, :3], axis=1) == [0, 2, 3]).all(), "no block twice before all"
    np.testing.assert_array_equal(first[:, 3], first[:, 0])
    whole, partly = weight[first == 2], weight[first == 0]
    np.testing.assert_allclose(whole[:, 5], 3, rtol=1e-6)
    np.testing.assert_allclose(partly.sum(axis=1), 6, rtol=1e-6)


def test_noise_hides_tokens_of_earlier_blocks_at_its_rate():
    clean, weight = block_random(KEYS, FREE, 2, 1)
    noisy, same = block_random(KEYS, FREE, 2, 1, noise=0.15)
    np.testing.assert_array_equal(weight, same)
    second = np.asarray(weight)[:, 0, 2:].any(axis=1)
    hits = np.asarray(noisy & ~clean)[:, 0]
    assert not hits[~second].any()
    assert not hits[:, 2:].any()
    assert binomial_p_value(hits[second][:, :2].sum(), 2 * second.sum(), 0.15) > 1e-3


def test_block_maskings_depend_on_their_rows_key_alone():
    index = jnp.array([7, 300])
    whole = block_random(KEYS, FREE, 2, 2, noise=0.5)
    part = block_random(KEYS[index], FREE[index], 2, 2, noise=0.5)
    for got, want in zip(part, whole, strict=True):
        np.testing.assert_array_equal(got, want[index])
