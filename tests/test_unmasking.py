"""The unmasking policy: what it reads, what it may not move, and how large it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dmrl import cost, models
from dmrl.models import llada, unmasking
from dmrl.models.config import Config
from dmrl.types import FLAGS, TOP

CFG = models.Config(
    vocab_size=12,
    d_model=16,
    n_layers=2,
    n_heads=2,
    n_kv_heads=2,
    mlp_hidden_size=24,
    mask_token_id=11,
    eos_token_id=10,
    dtype="float32",
    param_dtype="float32",
    remat="none",
)
TOKENS = jnp.array([[1, 2, 11, 11, 4, 11], [5, 11, 3, 11, 11, 2]])
VALID = jnp.array([[False, True, True, True, True, True], [True] * 6])
FEATURES = jax.random.uniform(jax.random.key(5), (2, 3, FLAGS + TOP))


@functools.cache
def variables():
    own = jax.jit(lambda key: unmasking.init(CFG, key))(jax.random.key(1))
    return {**jax.jit(lambda key: models.init(CFG, key))(jax.random.key(0)), "order": own}


@functools.partial(jax.jit, static_argnames="width")
def read(variables, tokens, features, start, width=3):
    hidden, score = models.bind(CFG, variables).order(tokens, VALID, start, width)
    return hidden, score(features)


def test_it_reads_the_stream_of_the_last_layer_and_gives_what_the_window_gives():
    hidden, score = read(variables(), TOKENS, FEATURES, jnp.int32(2))
    window = jax.jit(lambda v: models.bind(CFG, v).window(TOKENS, VALID, jnp.int32(2), 3))
    np.testing.assert_allclose(hidden, window(variables()), atol=1e-6)
    one_less = Config(**{**vars(CFG), "n_layers": 1})
    params = variables()["params"]
    first = {**params, "blocks": jax.tree.map(lambda x: x[:1], params["blocks"])}
    first["ln_f"] = {"scale": jnp.ones(16)}
    whole = llada.LLaDA(CFG).apply({"params": params}, TOKENS, VALID, method="trunk")
    normed = llada.LLaDA(one_less).apply({"params": first}, TOKENS, VALID)
    rms = jnp.sqrt(jnp.mean(jnp.square(whole), -1, keepdims=True) + CFG.rms_norm_eps)
    np.testing.assert_allclose(normed[VALID], (whole / rms)[VALID], atol=1e-5)
    assert score.shape == (2, 3)
    assert score.dtype == jnp.float32
    assert np.ptp(score) > 1e-3


def test_a_window_of_positions_scores_as_in_the_whole():
    features = jax.random.uniform(jax.random.key(6), (2, 6, FLAGS + TOP))
    whole = read(variables(), TOKENS, features, jnp.int32(0), width=6)[1]
    part = read(variables(), TOKENS, features[:, 2:5], jnp.int32(2))[1]
    np.testing.assert_allclose(part, whole[:, 2:5], atol=1e-5)


def test_padding_changes_nothing():
    other = TOKENS.at[0, 0].set(7)
    args = (FEATURES, jnp.int32(2))
    for got, want in zip(
        read(variables(), other, *args), read(variables(), TOKENS, *args), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_the_denoiser_gets_no_gradient_and_the_policy_reads_all_that_it_is_given():
    @jax.jit
    def gradient(variables, features):
        def total(v, f):
            return jnp.sum(jnp.square(read(v, TOKENS, f, jnp.int32(2))[1]))

        return jax.grad(total, argnums=(0, 1))(variables, features)

    by, features = gradient(variables(), FEATURES)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(by["params"]))
    moved = {
        "/".join(k.key for k in path): np.abs(leaf).max()
        for path, leaf in jax.tree_util.tree_leaves_with_path(by["order"])
    }
    assert min(moved.values()) > 0, moved
    assert np.abs(features).max() > 0


def test_without_its_collection_a_denoiser_has_no_order():
    assert models.bind(CFG, {"params": variables()["params"]}).order is None


def test_its_size_at_8b_is_that_of_the_published_shapes():
    shapes = jax.eval_shape(lambda: unmasking.init(models.Config(), jax.random.key(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    matrices = 4 * 4096**2 + 3 * 4096 * 12288 + 3 * 4106**2 + 4106
    norms = 3 * 4096 + 3 * 2 * 4106
    assert count == matrices + norms == cost.order_params(cost.shape_of(models.Config()))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("float32")}
