"""The vocabulary head on a mesh: every device reads its own columns, and nobody gathers it."""

import pytest
import simulated

MESHES = ("1x8x1", "2x2x2", "1x4x2", "8x1x1", "1x1x8")
WIDTH, VOCAB = 16, 1216

SCRIPT = f"""
import json, re, sys
import jax, jax.numpy as jnp
from dmrl import parallel
from dmrl.models import logprob, tiles

jax.config.update("jax_numpy_rank_promotion", "raise")
logprob.CHUNK, logprob.SMALLEST, tiles.TILE = 64, 16, 4  # several chunks in every shard
keys = jax.random.split(jax.random.key(0), 4)
hidden = jax.random.normal(keys[0], (16, 5, {WIDTH}))
kernel = jax.random.normal(keys[1], ({WIDTH}, {VOCAB}))
labels = jax.random.randint(keys[2], (16, 5, 2), 38, {VOCAB})
weight = jax.random.normal(keys[3], labels.shape)
some = jnp.any(weight > 0.8, axis=-1).at[:2].set(False)  # some devices need no row

def value(hidden, kernel, rows, skip):
    needed = some[:rows] if skip else None
    log_p = logprob.log_prob(hidden[:rows], kernel, labels[:rows], 37, needed)
    used = jnp.where(needed[..., None], log_p, 0.0) if skip else log_p
    return jnp.sum(weight[:rows] * used), used

def logits(hidden, kernel):
    return jax.nn.log_softmax(logprob.logits(hidden, kernel, 37))

gradient = jax.value_and_grad(value, (0, 1), has_aux=True)
result = {{}}
every = [(16, s, sys.argv[1:]) for s in (False, True)]
for rows, skip, meshes in (*every, (15, False, ["2x2x2"])):  # 15 do not divide: they stay whole
    (_, want), want_grads = jax.jit(gradient, static_argnums=(2, 3))(hidden, kernel, rows, skip)
    for name in meshes:
        mesh = parallel.make_mesh(*map(int, name.split("x")))
        head = jax.device_put(kernel, parallel.shardings(mesh, {{"head": kernel}})["head"])
        cut = jax.device_put(hidden, parallel.batch_sharding(mesh))
        keep = ((None, None), (None, head.sharding))
        with jax.set_mesh(mesh):
            done = jax.jit(gradient, static_argnums=(2, 3), out_shardings=keep)
            done = done.lower(cut, head, rows, skip).compile()
            all_logits = jax.jit(logits).lower(cut, head).compile()
        (_, got), grads = done(cut, head)
        gap = lambda a, b: float(jnp.abs(a - b).max())
        texts = {{"log_prob": done.as_text(), "logits": all_logits.as_text()}}
        result[f"{{name}}/{{rows}}/{{skip}}"] = {{
            "log_prob": gap(got, want),
            "gradients": [gap(a, b) / float(jnp.abs(b).max()) for a, b in zip(grads, want_grads)],
            "logits": gap(jnp.exp(all_logits(cut, head)), jnp.exp(logits(hidden, kernel))),
            "gathered": {{k: re.findall(r"= \\w+\\[([\\d,]*)\\]\\S* all-gather\\(", t)
                         for k, t in texts.items()}},
            "share": head.addressable_shards[0].data.size / head.size,
        }}
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def found():
    """What each mesh computed."""
    return simulated.run(SCRIPT, *MESHES)


CASES = [f"{mesh}/16/{skip}" for mesh in MESHES for skip in (False, True)] + ["2x2x2/15/False"]


@pytest.mark.parametrize("case", CASES)
def test_a_cut_head_gives_the_same_values_and_gradients(found, case):
    seen = found[case]
    assert seen["log_prob"] < 1e-5
    assert max(seen["gradients"]) < 2e-6
    assert seen["logits"] < 1e-6


SHARDS = {"1x8x1": 8, "2x2x2": 4, "1x4x2": 8, "8x1x1": 1, "1x1x8": 8}


@pytest.mark.parametrize("case", CASES)
def test_the_head_is_never_gathered(found, case):
    """Forward and backward: what is gathered is rows, and never as wide as a shard's columns."""
    seen, mesh = found[case], case.partition("/")[0]
    assert seen["share"] == 1 / SHARDS[mesh]
    if mesh == "1x8x1":
        assert seen["gathered"]["log_prob"]  # rows are: the pattern finds what there is
    for shapes in seen["gathered"].values():
        sizes = [[int(n) for n in shape.split(",") if n] for shape in shapes]
        assert all(max(size, default=0) < VOCAB // 8 for size in sizes), shapes
