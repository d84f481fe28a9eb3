"""Heads beside the vocabulary: where their gradients go, and what a head of a prompt reads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dmrl import models
from dmrl.models import heads, llada

CFG = models.Config(
    vocab_size=8,
    d_model=16,
    n_layers=1,
    n_heads=2,
    n_kv_heads=2,
    mlp_hidden_size=16,
    mask_token_id=7,
    eos_token_id=6,
    dtype="float32",
    param_dtype="float32",
    remat="none",
    lora_rank=2,
)
PROMPT = jnp.array([[1, 2, 3], [4, 5, 1]])
VALID = jnp.array([[False, True, True], [True, True, True]])
TEMPLATE = jnp.array([[7, 2, 7], [7, 7, 7]])


@pytest.fixture(scope="module")
def variables():
    """A model with an adapter and a head that has learned something."""
    made = jax.jit(lambda key: models.init(CFG, key))(jax.random.key(0))
    own = heads.init(CFG, {"log_z"}, jax.random.key(1))
    own["log_z"]["down"]["kernel"] = jax.random.normal(jax.random.key(2), (heads.WIDTH, 1))
    return {**made, "heads": own}


@jax.jit
def encode(variables, tokens, valid):
    return models.bind(CFG, variables).encode(tokens, valid)


@jax.jit
def log_z(variables, prompt, valid, template):
    return models.bind(CFG, variables).heads["log_z"](prompt, valid, template)


def test_a_fresh_head_says_zero_and_depends_on_its_own_key(variables):
    fresh = heads.init(CFG, ["log_z"], jax.random.key(3))
    out = log_z(variables | {"heads": fresh}, PROMPT, VALID, TEMPLATE)
    np.testing.assert_array_equal(out, [0, 0])
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {np.dtype("float32")}
    other = heads.init(CFG, ["log_z"], jax.random.key(4))
    assert (fresh["log_z"]["up"]["kernel"] != other["log_z"]["up"]["kernel"]).any()
    assert heads.init(CFG, (), jax.random.key(3)) == {}


def test_an_unknown_head_is_refused():
    with pytest.raises(ValueError, match="no head 'value'; there are log_z"):
        heads.init(CFG, ["value"], jax.random.key(0))


def test_it_is_a_perceptron_of_the_mean_hidden_state(variables):
    tokens = jnp.concatenate([PROMPT, TEMPLATE], axis=1)
    valid = jnp.concatenate([VALID, jnp.ones(TEMPLATE.shape, bool)], axis=1)
    hidden = np.asarray(encode(variables, tokens, valid), np.float64)
    own = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["heads"]["log_z"])
    for row in range(2):
        pooled = hidden[row][np.asarray(valid[row])].mean(axis=0)
        x = pooled @ own["up"]["kernel"] + own["up"]["bias"]
        want = (x / (1 + np.exp(-x))) @ own["down"]["kernel"] + own["down"]["bias"]
        got = log_z(variables, PROMPT, VALID, TEMPLATE)[row]
        assert float(got) == pytest.approx(want.item(), rel=1e-4)


def test_padding_changes_nothing(variables):
    out = log_z(variables, PROMPT, VALID, TEMPLATE)
    other = log_z(variables, jnp.where(VALID, PROMPT, 5), VALID, TEMPLATE)
    np.testing.assert_array_equal(out, other)
    shown = log_z(variables, jnp.where(VALID, PROMPT, 5), jnp.ones_like(VALID), TEMPLATE)
    assert float(shown[0]) != float(out[0])


def test_its_gradient_stays_in_the_head(variables):
    grad = jax.grad(lambda v: jnp.sum(log_z(v, PROMPT, VALID, TEMPLATE)))(variables)
    for name in ("params", "lora"):
        assert (tiny.flat(grad[name]) == 0).all(), name
    assert all((np.asarray(leaf) != 0).any() for leaf in jax.tree.leaves(grad["heads"]))


def test_the_network_is_not_shown_the_heads(variables, monkeypatch):
    seen, apply = [], llada.LLaDA.apply

    def spy(module, shown, *args, **options):
        seen.append(set(shown))
        return apply(module, shown, *args, **options)

    monkeypatch.setattr(llada.LLaDA, "apply", spy)
    # A model of its own, or what was traced for another test would serve.
    longer = dataclasses.replace(CFG, max_sequence_length=CFG.max_sequence_length + 1)
    denoiser = models.bind(longer, variables)
    jax.eval_shape(denoiser.encode, PROMPT, VALID)
    assert seen == [{"params", "lora"}]
    assert set(denoiser.heads) == {"log_z"}
    plain = {name: tree for name, tree in variables.items() if name != "heads"}
    assert not models.bind(CFG, plain).heads
