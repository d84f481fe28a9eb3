"""The optimiser: exactly the policy's chain, and beside it the heads'."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dmrl import optim

HP = optim.Optimizer(learning_rate=1e-2, warmup_steps=3, clip_norm=0.2)
POLICY = {"params": {"w": jnp.array([0.5, -2.0, 1.0]), "b": jnp.array([0.1])}}
HEADS = {"log_z": {"k": jnp.array([1.0, -1.0])}}


def gradient(tree, step, scale=1.0):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(step), len(leaves))
    drawn = [scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def run(optimizer, params, grads):
    """Parameters after every step, and the last state."""
    state, path = jax.jit(optimizer.init)(params), []
    update = jax.jit(optimizer.update)
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path, state


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_without_heads_it_is_the_chain_bit_for_bit():
    chain = optax.chain(
        optax.clip_by_global_norm(0.2),
        optax.adamw(optim.learning_rate(HP, 9), HP.b1, HP.b2, weight_decay=0.1, mu_dtype="float32"),
    )
    grads = [gradient(POLICY, step) for step in range(4)]
    assert_same(run(optim.make(HP, 9), POLICY, grads), run(chain, POLICY, grads))


def test_heads_change_nothing_for_the_policy_and_are_neither_clipped_nor_decayed():
    grads = [gradient(POLICY, step) for step in range(4)]
    large = [gradient(HEADS, step, scale=1e3) for step in range(4)]
    joined = [g | {"heads": h} for g, h in zip(grads, large, strict=True)]
    path, state = run(optim.make(HP, 9), POLICY | {"heads": HEADS}, joined)
    alone, policy_state = run(optim.make(HP, 9), POLICY, grads)
    assert_same([{"params": p["params"]} for p in path], alone)
    assert_same(state.policy, policy_state)
    own, _ = run(optax.adam(1e-3, HP.b1, HP.b2), HEADS, large)
    assert_same([p["heads"] for p in path], own)
    first = np.asarray(own[0]["log_z"]["k"] - HEADS["log_z"]["k"])
    np.testing.assert_allclose(np.abs(first), 1e-3, rtol=1e-3)


def test_a_head_moves_by_its_own_rate_alone():
    tree = POLICY | {"heads": HEADS}
    grads = [gradient(tree, step) for step in range(3)]
    rates = {"slow": {}, "fast": {"heads_learning_rate": 1e-1}, "policy": {"learning_rate": 1e-1}}
    moved = {}
    for name, options in rates.items():
        options = {"learning_rate": 1e-2, "warmup_steps": 3, **options}
        moved[name] = run(optim.make(optim.Optimizer(**options), 9), tree, grads)[0][-1]
    assert_same(moved["slow"]["params"], moved["fast"]["params"])
    assert_same(moved["slow"]["heads"], moved["policy"]["heads"])
    assert (moved["slow"]["heads"]["log_z"]["k"] != moved["fast"]["heads"]["log_z"]["k"]).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heads_learning_rate": 0.0}, "heads_learning_rate=0.0 must be positive"),
        ({"clip_norm": 0.0}, "self.clip_norm=0.0"),
        ({"schedule": "linear"}, "schedule='linear': choose one of .*'constant', 'cosine'"),
    ],
)
def test_impossible_options_say_what_is_possible(values, message):
    with pytest.raises(ValueError, match=message):
        optim.Optimizer(**values)
