"""Slots that take the next row: the same completions as in one batch, for less work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simulated
import tiny

from dmrl import models
from dmrl.diffusion import refill, sampler
from dmrl.diffusion.sampling import Sampling

EOS, LENGTH, ROWS = 2, 8, 13
CONFIG = Sampling(length=LENGTH, steps=8, block_length=2, temperature=1.0)
PARAMS, PROMPT, BIND = tiny.perceptron(LENGTH, eos=EOS)
NAMES = ("tokens", "reveal_step", "log_prob", "entropy", "length", "row", "group", "prompt")


def queue(rows=ROWS):
    """Prompts that differ, and templates of which some end early or have a token given."""
    keys = jax.random.split(jax.random.key(4), 2)
    prompt = jax.random.randint(keys[0], (rows, PROMPT.shape[0]), 0, tiny.MASK)
    template = jnp.full((rows, LENGTH), tiny.MASK).at[1, 1].set(EOS).at[4, 2:4].set(0)
    row = jnp.arange(rows, dtype=jnp.int32) + 3
    return prompt, jnp.ones(prompt.shape, bool), template, row, row // 2


@functools.partial(jax.jit, static_argnames=("config", "slots"))
def refilled(args, config=CONFIG, slots=4):
    return refill.sample(BIND(PARAMS), *args, jax.random.key(0), config, slots)


@functools.partial(jax.jit, static_argnames="config")
def together(args, config=CONFIG):
    denoiser, key = BIND(PARAMS), jax.random.key(0)
    return sampler.sample(denoiser, *args, key, config, stop_at_eos=True)


@pytest.mark.parametrize("slots", [1, 2, 4, 12, ROWS])
def test_every_row_is_what_it_is_in_one_batch(slots):
    want, got = together(queue()), refilled(queue(), slots=slots)
    for name in NAMES:
        ours, theirs = getattr(got, name), getattr(want, name)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6, err_msg=name)
    ends = np.asarray(want.length)
    assert len(set(ends)) > 3, "completions of many lengths"


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"order": "random"},
        {"order": "entropy", "top_p": 0.9},
        {"schedule": "cosine", "steps": 4},
        {"order": "eoser:0.4", "steps": 4},
        {"cfg_scale": 0.5},
    ],
    ids=str,
)
def test_rules_go_with_slots(options):
    config = Sampling(**({"length": LENGTH, "steps": 8, "block_length": 2} | options))
    want, got = together(queue(), config), refilled(queue(), config)
    for name in NAMES:
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"cfg_scale": 0.5}], ids=str)
def test_a_model_that_reads_windows_reads_each_rows_own(options):
    cfg = models.Config(vocab_size=8, mask_token_id=7, eos_token_id=2, d_model=16, n_layers=2,
                        n_heads=2, n_kv_heads=2, mlp_hidden_size=16, max_sequence_length=32,
                        dtype="float32", param_dtype="float32", remat="none")  # fmt: skip
    params = jax.jit(lambda: models.init(cfg, jax.random.key(0)))()["params"]
    config = Sampling(**({"length": LENGTH, "steps": 8, "block_length": 2} | options))
    prompt, valid, template, row, group = queue()
    template = jnp.where(template == tiny.MASK, 7, template)
    args = (prompt, valid, template, row, group, jax.random.key(0), config)

    def run(f, **more):
        return jax.jit(lambda p: f(models.bind(cfg, {"params": p}), *args, **more))(params)

    want, got = run(sampler.sample, stop_at_eos=True), run(refill.sample, slots=4)
    for name in NAMES:
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=0, atol=1e-5)


def test_work_follows_the_mean_length():
    """Templates that end after 1, 2, 3 and 4 of 4 blocks: a quarter of the rows each."""
    rows, blocks = 32, jnp.arange(32) % 4
    prompt = jnp.zeros((rows, PROMPT.shape[0]), jnp.int32)
    place = jnp.arange(LENGTH)[None] == (2 * blocks + 1)[:, None]
    template = jnp.where(place, EOS, tiny.MASK)
    row = jnp.arange(rows, dtype=jnp.int32)
    args = (prompt, jnp.ones(prompt.shape, bool), template, row, row)
    calls, denoiser = [], BIND(PARAMS)

    def encode(tokens, valid, *_):
        jax.debug.callback(lambda: calls.append(tokens.shape[0]))
        return denoiser.encode(tokens, valid)

    def logits(hidden):
        no_eos = jnp.expand_dims(jnp.arange(tiny.VOCAB) == EOS, range(hidden.ndim - 1))
        return jnp.where(no_eos, -jnp.inf, denoiser.logits(hidden))

    watched, key = denoiser._replace(encode=encode, logits=logits), jax.random.key(0)
    done = jax.jit(lambda *a: refill.sample(watched, *a, key, CONFIG, 8))(*args)
    jax.effects_barrier()
    np.testing.assert_array_equal(done.length, 2 * blocks + 2)
    # A block takes two steps, but one where its second position is given: 2, 4, 6, 8 minus one of
    # 32 rows, 8 at a time. All at once would take 8 steps of 32 rows.
    forwards = sum(calls)
    assert forwards < 0.8 * 8 * 32
    assert forwards >= 32 * 2.5 * 2 - 32


def test_what_cannot_refill_says_so():
    assert refill.able(CONFIG)
    one_block = Sampling(length=LENGTH, steps=4, block_length=LENGTH)
    adaptive = Sampling(length=LENGTH, steps=8, block_length=2, schedule="threshold:0.9")
    for config in (one_block, adaptive):
        assert not refill.able(config)
        with pytest.raises(ValueError, match="needs several equal blocks"):
            refill.sample(BIND(PARAMS), *queue(), jax.random.key(0), config, 2)
    for slots in (0, ROWS + 1):
        with pytest.raises(ValueError, match=f"slots={slots} for 13 rows: choose 1 to 13"):
            refill.sample(BIND(PARAMS), *queue(), jax.random.key(0), CONFIG, slots)


SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, optax
from dmrl import models, parallel
from dmrl.diffusion.sampling import Sampling
from dmrl.programs import Programs

jax.config.update("jax_numpy_rank_promotion", "raise")
cfg = models.Config(vocab_size=24, mask_token_id=23, eos_token_id=5, d_model=16, n_layers=2,
    n_heads=4, n_kv_heads=4, mlp_hidden_size=32, max_sequence_length=32, dtype="float32",
    param_dtype="float32", remat="none")
params = {"params": models.init(cfg, jax.random.key(0))["params"]}
params["params"]["head"] = params["params"]["head"].at[:, 5].mul(0.0)
sampling = Sampling(length=16, steps=16, block_length=4, temperature=1.0)
prompt = np.asarray(jax.random.randint(jax.random.key(1), (15, 6), 6, 23), np.int32)
prompts = (prompt, np.ones_like(prompt, bool), np.full((15, 16), 23, np.int32))
found = {}
for name in ("1x1x1", *sys.argv[1:]):
    sizes = tuple(map(int, name.split("x")))
    mesh = parallel.mesh_over(jax.devices()[: sizes[0] * sizes[1] * sizes[2]], *sizes)
    programs = Programs(cfg, (), sampling, optax.sgd(1.0), mesh, 2).with_slots(8)
    assert programs.slots == 8
    laid = jax.device_put(params, parallel.shardings(mesh, params))
    rollout, _ = programs.rollout(laid, None, prompts, 0, jax.random.key(2))
    host = parallel.gather(rollout)
    found[name] = {n: np.asarray(getattr(host, n)).tolist() for n in ("tokens", "reveal_step")}
    found[name]["length"] = np.asarray(host.length).tolist()
print(json.dumps(found))
"""
MESHES = ("8x1x1", "1x8x1", "2x2x2")


@pytest.mark.slow
def test_slots_on_a_mesh_give_the_same_tokens():
    found = simulated.run(SCRIPT, *MESHES)
    want = found["1x1x1"]
    assert len(set(want["length"])) > 3
    assert len(want["tokens"]) == 30
    for mesh in MESHES:
        assert found[mesh] == want, mesh
