"""Frozen weights in a byte: how far they are off, and that everything reads them alike."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import config, rows
from test_llada import LORA, TINY, init, random_lora, sample
from tiny import assert_close

from dmrl import cost, parallel, recipe, trainer
from dmrl.models import bind, int8, weights
from dmrl.models.int8 import Int8

CFG = dataclasses.replace(LORA, int8=True)


@functools.cache
def variables():
    """(rounded, the same widened to float32), with an adapter that does something."""
    fresh = init(LORA, jax.random.key(0))
    rounded = int8.quantized(fresh["params"])
    widened = jax.tree.map(
        lambda x: x.values * x.scale[..., None, :] if isinstance(x, Int8) else x,
        rounded,
        is_leaf=lambda x: isinstance(x, Int8),
    )
    lora = random_lora(fresh)
    return {"params": rounded, "lora": lora}, {"params": widened, "lora": lora}


def test_a_weight_is_off_by_half_a_step_at_most():
    kernel = jax.random.normal(jax.random.key(0), (3, 16, 5)) * jnp.arange(5)[None, None]
    found = int8.rounded(kernel.astype(jnp.bfloat16))
    wide = np.asarray(found.values * found.scale[:, None])
    error = np.abs(wide - np.asarray(kernel.astype(jnp.bfloat16), np.float32))
    assert (error <= np.asarray(found.scale)[:, None] / 2 * 1.0001).all()
    assert error.max() > 0
    assert np.abs(np.asarray(found.values)).max() == 127
    assert (wide[..., 0] == 0).all(), "a column of zeros stays one"


def test_the_kernels_of_the_layers_and_nothing_else():
    fresh = init(TINY, jax.random.key(0))["params"]
    tree = int8.quantized(fresh)
    kinds = {
        parallel.path_name(path): leaf.dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    bytes_ = {name for name, kind in kinds.items() if kind == jnp.int8}
    assert len(bytes_) == 7
    assert all(name.endswith("kernel/values") for name in bytes_)
    for name in ("embedding", "head", "ln_f"):
        assert_close(tree[name], fresh[name], rtol=0)


def test_the_last_positions_alone_are_those_of_the_whole():
    cfg, (rounded, _) = dataclasses.replace(CFG, remat="none"), variables()
    tokens, valid = sample()
    read = jax.jit(lambda *last: bind(cfg, rounded).encode(tokens, valid, *last), static_argnums=0)
    assert_close(read(4), read()[:, -4:], rtol=1e-5)
    assert read(4).shape[1] == 4


@pytest.mark.slow
def test_every_way_to_read_the_model_is_that_of_the_rounded_weights():
    tokens, valid = sample()

    @functools.partial(jax.jit, static_argnums=0)
    def read(cfg, tree):
        denoiser = bind(cfg, tree)
        at = jnp.int32(4)
        window, store = denoiser.cached.prefill(tokens, valid, at, 4)
        again = denoiser.cached.extend(tokens, valid, store, at, 4)
        whole = denoiser.encode(tokens, valid)
        last = denoiser.encode(tokens, valid, 4)
        return whole, last, denoiser.window(tokens, valid, at, 4), window, again

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(cfg, lora, params):
        def value(lora):
            hidden = bind(cfg, {"params": params, "lora": lora}).encode(tokens, valid)
            return jnp.sum(hidden * jnp.cos(jnp.arange(hidden.size)).reshape(hidden.shape))

        return jax.grad(value)(lora)

    rounded, widened = variables()
    assert_close(read(CFG, rounded), read(LORA, widened), rtol=1e-4)
    got, want = (
        gradient(cfg, tree["lora"], tree["params"])
        for cfg, tree in ((CFG, rounded), (LORA, widened))
    )
    assert_close(got, want, rtol=1e-4)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want)) > 0.1


def test_products_and_their_gradients_stay_in_the_compute_type():
    narrow = dataclasses.replace(CFG, dtype="bfloat16")
    tokens, valid = sample()
    tree = variables()[0]

    def value(lora):
        denoiser = bind(narrow, {"params": tree["params"], "lora": lora})
        return jnp.sum(denoiser.encode(tokens, valid).astype(jnp.float32) ** 3)

    text = str(jax.make_jaxpr(jax.grad(value))(tree["lora"]))
    layers = [line for line in text.splitlines() if "dot_general" in line]
    assert any("bf16" in line for line in layers)
    wide = [line for line in layers if ":f32[" in line.split("=")[0]]
    assert not [line for line in wide if "36," in line.split("=")[0]], wide


def test_stored_weights_are_rounded_as_they_are_read(tmp_path):
    fresh = init(TINY, jax.random.key(0))["params"]
    weights.save_weights(tmp_path / "w", TINY, fresh)
    mesh = parallel.make_mesh()
    loaded = weights.load_base(tmp_path / "w", parallel.shardings(mesh, fresh), CFG)
    assert_close(loaded, int8.quantized(fresh), rtol=1e-6)
    halves = dataclasses.replace(LORA, param_dtype="bfloat16")
    plain = weights.load_base(tmp_path / "w", parallel.shardings(mesh, fresh), halves)
    assert {x.dtype for x in jax.tree.leaves(plain)} == {jnp.dtype("bfloat16")}


def test_without_an_adapter_there_is_nothing_to_round():
    with pytest.raises(ValueError, match="without an adapter all are trained: set lora_rank"):
        dataclasses.replace(TINY, int8=True)


def test_the_estimate_of_memory_counts_the_bytes():
    tree = int8.quantized(init(LORA, jax.random.key(0))["params"])
    kernels = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Int8))
    scales = sum(x.scale.nbytes for x in kernels if isinstance(x, Int8))
    total = sum(x.nbytes for x in jax.tree.leaves(tree))
    assert cost.frozen_bytes(cost.shape_of(CFG)) == total - scales
    assert cost.frozen_bytes(cost.shape_of(LORA)) > 2 * (total - scales)


def test_values_are_cut_as_their_kernel_is():
    tree = int8.quantized(init(LORA, jax.random.key(0))["params"])
    mesh = jax.sharding.AbstractMesh((1, 2, 2), parallel.AXES)
    cuts = {
        parallel.path_name(path): leaf.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(parallel.shardings(mesh, tree))
    }
    whole = parallel.shardings(mesh, init(LORA, jax.random.key(0))["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(whole):
        name = parallel.path_name(path)
        if name.endswith("kernel"):
            assert cuts[f"{name}/values"] == leaf.spec
            assert leaf.spec


@pytest.mark.slow
def test_an_adapter_learns_beside_rounded_weights(tmp_path):
    options = {"model__lora_rank": 4, "model__int8": True, "optimizer__learning_rate": 1e-2}
    values = config(**options, warm_start__steps=0, evaluation__every=1)
    made = recipe.build(values)
    found = trainer.train(made, tmp_path, values)
    lines = [r for r in rows(tmp_path / "metrics.jsonl") if "grad_norm" in r]
    assert all(r["grad_norm"] > 0 for r in lines)
    assert found
    mesh = parallel.make_mesh(**made.mesh)
    trainable, frozen = trainer.initial_weights(made, mesh)
    assert set(trainable) == {"lora"}
    assert any(x.dtype == jnp.int8 for x in jax.tree.leaves(frozen))
