"""Chunked log-probabilities against float64 numpy and against direct autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmrl.models import logprob, tiles

WIDTH = 16
DROPPED = 37


def problem(vocab, z=1, dtype="float32", lead=(3, 5)):
    keys = jax.random.split(jax.random.key(vocab + z), 3)
    # Logits of standard deviation 4, as a model's are: 1e-5 is a few float32 steps of log p.
    hidden = jax.random.normal(keys[0], (*lead, WIDTH)).astype(dtype)
    kernel = jax.random.normal(keys[1], (WIDTH, vocab)).astype(dtype)
    labels = jax.random.randint(keys[2], (*lead, z), 0, vocab)
    return hidden, kernel, jnp.where(labels == DROPPED, 0, labels)


def log_prob(hidden, kernel, labels, dropped):
    return jax.jit(lambda *args: logprob.log_prob(*args, dropped))(hidden, kernel, labels)


def exact(hidden, kernel, labels, dropped):
    rows = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    if dropped is not None:
        rows[..., dropped] = -np.inf
    high = rows.max(-1, keepdims=True)
    log_z = high + np.log(np.exp(rows - high).sum(-1, keepdims=True))
    return np.take_along_axis(rows, np.asarray(labels), -1) - log_z


@pytest.fixture(params=[40, 64, 4096], ids="chunk{}".format)
def chunk(request, monkeypatch):
    monkeypatch.setattr(logprob, "CHUNK", request.param)
    return request.param


@pytest.mark.parametrize("dropped", [None, DROPPED])
@pytest.mark.parametrize(("vocab", "z"), [(384, 1), (500, 3), (509, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_matches_float64(chunk, vocab, z, dropped, dtype):
    hidden, kernel, labels = problem(vocab, z, dtype)
    got = log_prob(hidden, kernel, labels, dropped)
    assert got.dtype == jnp.float32
    assert got.shape == labels.shape
    np.testing.assert_allclose(got, exact(hidden, kernel, labels, dropped), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dropped", [None, DROPPED])
@pytest.mark.parametrize(("vocab", "z"), [(384, 1), (500, 3)])
def test_gradients_match_autodiff(monkeypatch, vocab, z, dropped):
    hidden, kernel, labels = problem(vocab, z)
    weight = jax.random.normal(jax.random.key(1), labels.shape)

    def value(chunk, hidden, kernel):
        monkeypatch.setattr(logprob, "CHUNK", chunk)
        return jnp.sum(weight * logprob.log_prob(hidden, kernel, labels, dropped))

    gradient = jax.jit(jax.grad(value, (1, 2)), static_argnums=0)
    want, got = gradient(vocab, hidden, kernel), gradient(64, hidden, kernel)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=2e-6 * float(jnp.abs(w).max()))
        assert float(jnp.abs(w).max()) > 0.1


def test_bfloat16_gradients_are_close(monkeypatch):
    monkeypatch.setattr(logprob, "CHUNK", 64)
    hidden, kernel, labels = problem(384, 2, "bfloat16")

    def value(hidden, kernel):
        return jnp.sum(logprob.log_prob(hidden, kernel, labels, DROPPED))

    gradient = jax.jit(jax.grad(value, (0, 1)))
    got = gradient(hidden, kernel)
    wide = gradient(hidden.astype(jnp.float32), kernel.astype(jnp.float32))
    for g, w in zip(got, wide, strict=True):
        assert g.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            g.astype(jnp.float32), w, rtol=0, atol=0.02 * float(jnp.abs(w).max())
        )


@pytest.mark.parametrize("chunk", [64, 4096])
def test_a_row_with_the_dropped_label_gives_no_gradient_through_where(monkeypatch, chunk):
    monkeypatch.setattr(logprob, "CHUNK", chunk)
    hidden, kernel, labels = problem(384)
    labels = labels.at[0].set(DROPPED)

    def value(hidden):
        log_p = logprob.log_prob(hidden, kernel, labels, DROPPED)
        return jnp.sum(jnp.where(labels == DROPPED, 0.0, log_p))

    total, gradient = jax.jit(jax.value_and_grad(value))(hidden)
    assert np.isfinite(total)
    assert np.all(gradient[0] == 0)
    assert np.all(np.abs(gradient[1:]).max(-1) > 0)


def test_dropped_token_has_probability_zero_and_the_rest_sums_to_one(chunk):
    hidden, kernel, _ = problem(384)
    labels = jnp.broadcast_to(jnp.arange(384), (3, 5, 384))
    log_p = log_prob(hidden, kernel, labels, DROPPED)
    assert np.all(log_p[..., DROPPED] == -np.inf)
    np.testing.assert_allclose(jnp.exp(log_p).sum(-1), 1.0, rtol=0, atol=1e-5)


def test_extreme_logits_stay_finite(monkeypatch):
    monkeypatch.setattr(logprob, "CHUNK", 64)
    hidden, kernel, labels = problem(384)
    got = log_prob(400 * hidden, kernel, labels, None)
    want = exact(400 * hidden, kernel, labels, None)
    assert want.min() < -1000
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize(("vocab", "size"), [(126_464, 3328), (4096, 4096), (8192, 4096), (6, 6)])
def test_chunk_size_divides_the_vocabulary(vocab, size):
    assert logprob.chunk_size(vocab) == size
    assert vocab % size == 0


def test_no_array_spans_the_vocabulary():
    vocab = 126_464
    shapes = jax.ShapeDtypeStruct((2, 3, 8), "float32"), jax.ShapeDtypeStruct((8, vocab), "float32")
    labels = jnp.zeros((2, 3, 1), jnp.int32)

    def value(hidden, kernel):
        return logprob.log_prob(hidden, kernel, labels, 5).sum()

    text = str(jax.make_jaxpr(jax.grad(value))(*shapes))
    assert f"[8,{vocab}]" in text  # the head itself
    assert f"[2,3,{vocab}]" not in text
    assert "[2,3,3328]" in text


SHARES = {"none": 0.0, "one": 0.02, "half": 0.5, "all": 1.0}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("chunk", [64, 4096])
def test_rows_that_are_not_needed_change_nothing(monkeypatch, chunk, share, dtype):
    monkeypatch.setattr(logprob, "CHUNK", chunk)
    monkeypatch.setattr(tiles, "TILE", 8)
    hidden, kernel, labels = problem(384, 2, dtype, lead=(7, 9))
    needed = jax.random.uniform(jax.random.key(5), labels.shape[:-1]) < SHARES[share]
    weight = jax.random.normal(jax.random.key(1), labels.shape)

    def value(hidden, kernel, needed):
        log_p = logprob.log_prob(hidden, kernel, labels, DROPPED, needed)
        used = jnp.where(chosen[..., None], log_p, 0.0)
        return jnp.sum(weight * used), used

    chosen = needed
    gradient = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))
    (_, want), want_grads = gradient(hidden, kernel, None)
    (_, got), got_grads = gradient(hidden, kernel, needed)
    tolerance = 2e-6 if dtype == "float32" else 0.02
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    for g, w in zip(got_grads, want_grads, strict=True):
        g, w = g.astype(jnp.float32), w.astype(jnp.float32)
        np.testing.assert_allclose(g, w, rtol=0, atol=tolerance * float(jnp.abs(w).max()))
        assert share == "none" or float(jnp.abs(g).max()) > 0.1


def test_rows_that_are_not_needed_cost_nothing(monkeypatch):
    """The loops over tiles end where the needed rows do."""
    monkeypatch.setattr(tiles, "TILE", 8)
    labels = problem(384, 1, lead=(64,))[2]
    tiled = tiles.Tiles(jnp.arange(64) % 16 == 3)
    visited = jnp.zeros(64)
    seen, total = tiled.visit(lambda own, x: (own + 1, jnp.sum(x)), visited, (jnp.ones(64),), 0.0)
    assert int(tiled.count) == 1
    assert float(total) == float(seen.sum()) == 8
    np.testing.assert_array_equal(tiled.unpack(tiled.pack(labels))[3::16], labels[3::16])
