"""Draws at the vocabulary: the favourite on every platform, and the law of a draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmrl.diffusion import noise
from dmrl.models.layers import rotation


def rows() -> jax.Array:
    """Ties, rows of -inf but one or all, and noise."""
    tied = jnp.round(jax.random.normal(jax.random.key(0), (4, 5, 33)))
    alone = jnp.full((4, 5, 33), -jnp.inf).at[:, :4, 7].set(-3.0)
    drawn = jax.random.normal(jax.random.key(1), (4, 5, 33))
    return jnp.concatenate([tied, alone, drawn, drawn.at[..., 20].set(-jnp.inf)])


@pytest.mark.parametrize("way", [noise.favourite, noise._by_value, noise._argmax])
def test_favourite_is_the_first_of_the_largest(way):
    found = jax.jit(way)(rows())
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, np.argmax(np.asarray(rows()), axis=-1))


def test_a_draw_is_the_argmax_of_gumbel_noise():
    keys, logits = jax.random.split(jax.random.key(3), 4), rows()[8:12]
    gumbel = np.stack([jax.random.gumbel(key, (5, 33), jnp.float32) for key in keys])
    found = jax.jit(noise.categorical, static_argnums=2)(keys, logits, 0.7)
    np.testing.assert_array_equal(found, np.argmax(np.asarray(logits) + 0.7 * gumbel, axis=-1))


def test_a_draw_inside_a_program_is_that_outside():
    """The largest value is looked for twice, so it must not be computed twice."""
    keys = jax.random.split(jax.random.key(5), 4)
    hidden, head = jax.random.normal(keys[0], (4, 6, 24)), jax.random.normal(keys[1], (24, 999))

    def draw(hidden, head):
        return noise.categorical(keys, hidden @ head, 0.9)

    noisy = (hidden @ head) + 0.9 * jax.vmap(lambda k: jax.random.gumbel(k, (6, 999)))(keys)
    found = np.asarray(jax.jit(draw)(hidden, head))
    np.testing.assert_array_equal(found, np.argmax(np.asarray(noisy), axis=-1))


def test_draws_have_the_tempered_law():
    logits, draws = jnp.array([1.0, 0.0, -1.0, -jnp.inf]), 20_000
    keys = jax.random.split(jax.random.key(4), draws)
    tokens = noise.categorical(keys, jnp.broadcast_to(logits, (draws, 1, 4)), 2.0)
    share = np.bincount(np.asarray(tokens).reshape(-1), minlength=4) / draws
    law = np.asarray(jax.nn.softmax(logits / 2))
    assert np.all(np.abs(share - law) <= 4 * np.sqrt(law * (1 - law) / draws) + 1e-9)


def test_rotations_are_those_of_float64():
    positions = jnp.stack([jnp.arange(64), jnp.maximum(jnp.arange(64) - 9, 0)])
    found = rotation(positions.astype(jnp.int32), 16, 500_000.0)
    angle = np.asarray(positions, np.float64)[:, :, None, None] * 500_000.0 ** (-np.arange(8) / 8)
    np.testing.assert_allclose(found[0], np.cos(angle), atol=1e-5)
    np.testing.assert_allclose(found[1], np.sin(angle), atol=1e-5)
