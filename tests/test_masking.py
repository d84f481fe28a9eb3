"""The forward process: prompt masks, uniform masks, and where a completion ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import stats

from dmrl.diffusion.masking import mask_prompt, mask_uniform, upto_eos

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
