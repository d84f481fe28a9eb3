"""LLaDA: parity with the authors' PyTorch model, invariances, adapters."""

import dataclasses
import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dmrl.models import Config, bind, convert, llada, lora, weights

TINY = Config(
    vocab_size=97,
    d_model=32,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    mlp_hidden_size=48,
    max_sequence_length=64,
    mask_token_id=96,
    eos_token_id=95,
    dtype="float32",
    param_dtype="float32",
    remat="none",
)
LORA = dataclasses.replace(TINY, lora_rank=4, lora_alpha=8.0)
FOLDERS = {"mha": "tiny_llada", "gqa": "tiny_llada_gqa"}


# Known at collection, so that every recorded case is a test of its own.
GOLDEN = Path(os.environ.get("DMRL_GOLDEN", Path(__file__).parent / "golden"))
FORWARD = load_file(GOLDEN / "forward.safetensors")
CASES = sorted(name.removesuffix("_tokens") for name in FORWARD if name.endswith("_tokens"))


init = jax.jit(llada.init, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def encode(cfg, variables, tokens, valid):
    return bind(cfg, variables).encode(tokens, valid)


@functools.partial(jax.jit, static_argnums=0)
def label_log_prob(cfg, variables, tokens, valid):
    model = bind(cfg, variables, keep_mask=True)
    return model.log_prob(model.encode(tokens, valid), tokens[..., None])[..., 0]


def sample(batch=3, seq=12, seed=0):
    tokens = jax.random.randint(jax.random.key(seed), (batch, seq), 0, TINY.vocab_size)
    return tokens, jnp.ones((batch, seq), bool)


def random_lora(variables, seed=7):
    leaves, tree = jax.tree.flatten(variables["lora"])
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    values = [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, values)


def test_golden_forward_has_cases():
    assert {case.split("_")[0] for case in CASES} == set(FOLDERS)
    assert any(case.endswith("leftpad") for case in CASES)


@pytest.mark.parametrize("case", CASES)
def test_golden_forward(case):
    cfg, read = convert.read_hf(GOLDEN / FOLDERS[case.split("_")[0]])
    variables = {"params": weights.build_tree(cfg, read)}
    model = bind(cfg, variables, keep_mask=True)
    tokens = jnp.asarray(FORWARD[f"{case}_tokens"])
    everywhere = np.ones(tokens.shape, bool)
    valid = FORWARD.get(f"{case}_attention_mask", everywhere) > 0
    compared = 0
    for name, keep in (("", valid), ("_mask_ignored", everywhere)):
        hidden = encode(cfg, variables, tokens, jnp.asarray(keep))
        for key, got in (("logits", model.logits(hidden)), ("final_hidden", hidden)):
            if f"{case}_{key}{name}" in FORWARD:
                want = FORWARD[f"{case}_{key}{name}"]
                np.testing.assert_allclose(got[keep], want[keep], rtol=0, atol=2e-4)
                compared += 1
    assert compared


@pytest.fixture(scope="module")
def variables():
    return init(TINY, jax.random.key(0))


@pytest.mark.parametrize("padding", [1, 5, 17])
@pytest.mark.parametrize("filler", [0, 96])
def test_left_padding_changes_nothing(variables, padding, filler):
    tokens, valid = sample()
    want = label_log_prob(TINY, variables, tokens, valid)
    side = ((0, 0), (padding, 0))
    padded = jnp.pad(tokens, side, constant_values=filler)
    got = label_log_prob(TINY, variables, padded, jnp.pad(valid, side))
    np.testing.assert_allclose(got[:, padding:], want, rtol=0, atol=1e-5)
    unmasked = label_log_prob(TINY, variables, padded, jnp.ones(padded.shape, bool))
    assert np.abs(unmasked[:, padding:] - want).max() > 1e-2


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_batch_size_changes_nothing(variables, batch):
    tokens, valid = sample(8)
    valid = valid.at[3, :4].set(False)
    want = label_log_prob(TINY, variables, tokens, valid)
    got = jnp.concatenate(
        [
            label_log_prob(TINY, variables, tokens[i : i + batch], valid[i : i + batch])
            for i in range(0, 8, batch)
        ]
    )
    np.testing.assert_allclose(got[valid], want[valid], rtol=0, atol=1e-5)


def test_attention_is_bidirectional(variables):
    tokens, valid = sample(1)
    changed = tokens.at[0, -1].set((tokens[0, -1] + 1) % 90)
    before, after = (encode(TINY, variables, t, valid) for t in (tokens, changed))
    assert np.abs(before[0, 0] - after[0, 0]).max() > 1e-3


def test_grouped_heads_equal_repeated_heads(variables):
    wide = dataclasses.replace(TINY, n_kv_heads=TINY.n_heads)
    params = jax.tree.map(lambda x: x, variables["params"])
    for name in ("k_proj", "v_proj"):
        kernel = params["blocks"]["attn"][name]["kernel"]
        heads = kernel.reshape(TINY.n_layers, TINY.d_model, TINY.n_kv_heads, TINY.head_dim)
        repeated = jnp.repeat(heads, TINY.n_heads // TINY.n_kv_heads, axis=2)
        params["blocks"]["attn"][name] = {
            "kernel": repeated.reshape(TINY.n_layers, TINY.d_model, TINY.d_model)
        }
    tokens, valid = sample()
    got = encode(wide, {"params": params}, tokens, valid)
    want = encode(TINY, variables, tokens, valid)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def gradient(variables, remat):
    cfg = dataclasses.replace(TINY, remat=remat)
    tokens, valid = sample(2, 8)
    return jax.jit(jax.grad(lambda v: label_log_prob(cfg, v, tokens, valid).sum()))(variables)


@pytest.fixture(scope="module")
def plain_gradient(variables):
    return gradient(variables, "none")


@pytest.mark.parametrize("policy", [p for p in llada.REMAT_POLICIES if p != "none"])
def test_remat_changes_no_gradient(variables, plain_gradient, policy):
    got, want = (jax.tree.leaves(g) for g in (gradient(variables, policy), plain_gradient))
    for g, w in zip(got, want, strict=True):
        scale = float(jnp.abs(w).max())
        assert scale > 0
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * scale)


def test_layers_are_scanned():
    def program(n_layers):
        cfg = dataclasses.replace(TINY, n_layers=n_layers)
        shapes = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
        return str(jax.make_jaxpr(lambda v: bind(cfg, v).encode(*sample()))(shapes))

    shallow, deep = program(2), program(16)
    assert "length=16" in deep
    assert len(deep.splitlines()) == len(shallow.splitlines())


def test_the_mask_token_is_never_predicted(variables):
    model = bind(TINY, variables)
    hidden = encode(TINY, variables, *sample())
    rows = jax.nn.log_softmax(model.logits(hidden))
    assert np.all(rows[..., TINY.mask_token_id] == -np.inf)
    labels = jnp.broadcast_to(jnp.arange(TINY.vocab_size), rows.shape)
    log_p = model.log_prob(hidden, labels)
    assert np.all(log_p[..., TINY.mask_token_id] == -np.inf)
    np.testing.assert_allclose(jnp.exp(log_p).sum(-1), 1.0, rtol=0, atol=1e-5)
    np.testing.assert_allclose(log_p[..., :96], rows[..., :96], rtol=0, atol=1e-5)


def test_bfloat16_compute_on_float32_parameters(variables):
    cfg = dataclasses.replace(TINY, dtype="bfloat16")
    tokens, valid = sample()
    hidden = encode(cfg, variables, tokens, valid)
    assert hidden.dtype == jnp.bfloat16
    want = encode(TINY, variables, tokens, valid)
    np.testing.assert_allclose(hidden.astype(jnp.float32), want, rtol=0, atol=0.2)


@functools.partial(jax.jit, static_argnums=(0, 5))
def encode_window(cfg, variables, tokens, valid, start, width):
    return bind(cfg, variables).window(tokens, valid, start, width)


@pytest.mark.parametrize("remat", ["none", "full"])  # layers unrolled, layers in a loop
@pytest.mark.parametrize("start", [0, 5, 8])
def test_a_window_equals_its_part_of_the_whole(fresh, remat, start):
    cfg = dataclasses.replace(LORA, remat=remat)
    trained = {**fresh, "lora": random_lora(fresh)}
    tokens, valid = sample()
    valid = valid.at[0, :3].set(False)
    want = encode(cfg, trained, tokens, valid)[:, start : start + 4]
    got = encode_window(cfg, trained, tokens, valid, start, 4)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_a_window_spares_the_last_layer_the_other_positions(variables):
    def flops(positions):
        args = (dataclasses.replace(TINY, n_layers=1), first, *sample(), 0, positions)
        return encode_window.lower(*args).compile().cost_analysis()["flops"]

    blocks = jax.tree.map(lambda x: x[:1], variables["params"]["blocks"])
    first = {"params": {**variables["params"], "blocks": blocks}}
    per_token = 2 * (2 * 32 * 32 + 3 * 32 * 48)  # queries, attention's output, SwiGLU
    saved = 3 * 8 * per_token  # of 3 rows, 8 of 12 positions
    assert flops(12) - flops(4) > saved


def cubed(cfg, last, cut):
    """(parameters, tokens, valid) -> gradient of a sum over the last positions; `cut` says so."""

    def value(trained, tokens, valid):
        told = (last,) if cut else ()
        hidden = bind(cfg, trained).encode(tokens, valid, *told)
        assert hidden.shape[1] == last or not cut or cfg.remat != "none"
        return jnp.sum(hidden[:, -last:] ** 3)

    return jax.jit(jax.grad(value))


@pytest.mark.parametrize(("layers", "remat"), [(1, "none"), (2, "none"), (2, "full")])
def test_the_last_positions_alone_have_the_gradient_of_the_whole(layers, remat):
    cfg = dataclasses.replace(LORA, n_layers=layers, remat=remat)
    trained = init(cfg, jax.random.key(0))
    trained["lora"] = random_lora(trained)
    tokens, valid = sample()
    valid = valid.at[0, :3].set(False)
    got, want = (cubed(cfg, 5, cut)(trained, tokens, valid) for cut in (True, False))
    flat = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True)
    for (path, a), b in flat:
        scale = np.abs(b).max()
        assert scale > 0 or path[-1].key == "head", "which hidden states do not read"
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale)


def test_the_last_positions_spare_the_last_layer_the_others_in_the_gradient_too(variables):
    def flops(cut):
        compiled = cubed(TINY, 4, cut).lower(variables, *sample()).compile()
        return compiled.cost_analysis()["flops"]

    per_token = 2 * (2 * 32 * 32 + 3 * 32 * 48)  # queries, attention's output, SwiGLU
    assert flops(False) - flops(True) > 3 * 3 * 8 * per_token  # of 3 rows, 8 of 12 positions


@pytest.fixture(scope="module")
def fresh():
    return init(LORA, jax.random.key(0))


def test_a_fresh_adapter_is_a_no_op(fresh):
    tokens, valid = sample()
    adapted = encode(LORA, fresh, tokens, valid)
    base = encode(TINY, {"params": fresh["params"]}, tokens, valid)
    np.testing.assert_array_equal(adapted, base)
    assert all(np.abs(x).max() > 0 for x in leaves_named(fresh["lora"], "a"))


def leaves_named(tree, name):
    return [x for path, x in jax.tree.leaves_with_path(tree) if path[-1].key == name]


def test_the_reference_is_the_base_of_the_same_tree(fresh):
    trained = {"params": fresh["params"], "lora": random_lora(fresh)}
    tokens, valid = sample()
    policy = encode(LORA, trained, tokens, valid)
    reference = encode(LORA, {"params": trained["params"]}, tokens, valid)
    base = encode(TINY, {"params": fresh["params"]}, tokens, valid)
    np.testing.assert_array_equal(reference, base)
    assert np.abs(policy - reference).max() > 1e-2


def test_gradients_reach_every_adapter_and_nothing_else(fresh):
    tokens, valid = sample()

    def value(tree):
        trained = {"params": fresh["params"], "lora": tree}
        return label_log_prob(LORA, trained, tokens, valid).sum()

    gradient = jax.jit(jax.grad(value))
    first = gradient(fresh["lora"])
    assert jax.tree.structure(first) == jax.tree.structure(fresh["lora"])
    assert len(jax.tree.leaves(first)) == 14
    assert all(np.all(g == 0) for g in leaves_named(first, "a"))  # B is zero
    assert all(np.abs(g).max() > 0 for g in leaves_named(first, "b"))
    later = gradient(random_lora(fresh))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(later))


def test_merging_equals_the_adapted_forward(fresh):
    trained = {"params": fresh["params"], "lora": random_lora(fresh)}
    tokens, valid = sample()
    adapted = encode(LORA, trained, tokens, valid)
    merged = encode(TINY, {"params": lora.merge(trained, LORA)}, tokens, valid)
    np.testing.assert_allclose(merged, adapted, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 30}, "n_heads=4 does not divide d_model=30"),
        ({"n_kv_heads": 3}, "n_kv_heads=3 does not divide self.n_heads=4"),
        ({"d_model": 12}, "head width 3 is odd"),
        ({"remat": "some"}, "remat='some': choose one of none, full"),
        ({"mask_token_id": 97}, "mask_token_id=97 is outside 0..96"),
        ({"eos_token_id": -1}, "eos_token_id=-1 is outside 0..96"),
    ],
)
def test_config_errors_name_the_value(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_a_sequence_that_is_too_long_is_refused(variables):
    with pytest.raises(ValueError, match="65 tokens exceeds"):
        encode(TINY, variables, *sample(1, 65))
