"""Attention a few heads at a time: what XLA's computes, in any number of parts and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simulated

from dmrl.models import attention, headwise


def inputs(rows=3, queries=20, keys=20, heads=4, kv=4, width=8, dtype="float32", offset=0):
    drawn = jax.random.split(jax.random.key(rows + queries + kv), 3)
    q = jax.random.normal(drawn[0], (rows, queries, heads, width), dtype)
    k, v = (jax.random.normal(key, (rows, keys, kv, width), dtype) for key in drawn[1:])
    return q, k, v + jnp.asarray(offset, dtype), jnp.arange(keys)[None] >= jnp.arange(rows)[:, None]


def both(args, f):
    def value(*qkv):
        return jnp.sum(jnp.cos(f(*qkv, args[3]).astype(jnp.float32)))

    return [f(*args), *jax.grad(value, (0, 1, 2))(*args[:3])]


@pytest.mark.parametrize("kilobytes", [1024, 2, 1])
@pytest.mark.parametrize("shape", [{}, {"queries": 7}, {"kv": 2}, {"kv": 1, "rows": 1}])
def test_it_computes_what_xla_does(monkeypatch, shape, kilobytes):
    monkeypatch.setattr(headwise, "SCORES", kilobytes * 1024)
    args = inputs(**shape)
    for got, want in zip(both(args, headwise.attention), both(args, attention.xla), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * float(jnp.abs(want).max()))


@pytest.mark.parametrize(
    ("heads", "size", "parts"), [(24, 2**15, 1), (24, 2**19, 6), (24, 2**22, 24), (7, 2**20, 7)]
)
def test_parts_are_equal_and_as_few_as_the_cache_allows(heads, size, parts):
    assert headwise._parts(heads, size) == parts


@pytest.mark.parametrize("offset", [0, 10])
def test_half_precision_is_as_near_the_truth_as_xla(offset):
    args = inputs(dtype="bfloat16", offset=offset)
    wide = tuple(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in args)
    truth = both(wide, attention.xla)
    for got, other, true in zip(
        both(args, headwise.attention), both(args, attention.xla), truth, strict=True
    ):
        assert got.dtype == jnp.bfloat16
        errors = [float(jnp.abs(x.astype(jnp.float32) - true).max()) for x in (got, other)]
        assert errors[0] <= 1.5 * errors[1] + 1e-3


def test_a_row_of_padding_alone_gives_numbers():
    q, k, v, valid = inputs()
    args = (q, k, v, valid.at[1].set(False))
    (out, *grads), (want, *others) = both(args, headwise.attention), both(args, attention.xla)
    np.testing.assert_allclose(out, want, atol=1e-6)
    assert not any(x[1].any() for x in grads), "and no gradient"
    for got, other in zip(grads, others, strict=True):
        np.testing.assert_allclose(got[::2], other[::2], atol=1e-5)


def test_no_rows_give_none():
    q, k, v, valid = (x[:0] for x in inputs())
    assert headwise.attention(q, k, v, valid).shape == q.shape


def test_no_scores_of_all_heads_are_ever_held(monkeypatch):
    """Neither forward nor backward; XLA's attention holds them several times."""
    args = inputs(rows=4, queries=256, keys=256, heads=8, kv=8)
    scores = 4 * 8 * 256 * 256 * 4
    held = {}
    for f in (headwise.attention, attention.xla):
        gradient = jax.jit(lambda *a, f=f: both(a, f))
        memory = gradient.lower(*args).compile().memory_analysis()
        held[f] = memory.temp_size_in_bytes / scores
    assert held[headwise.attention] < 1
    assert held[attention.xla] > 2


@pytest.mark.parametrize(("keys", "used"), [(64, headwise.attention), (63, attention.xla)])
def test_on_a_cpu_it_is_the_default_for_all_but_short_sequences(keys, used):
    args = inputs(keys=keys)
    np.testing.assert_array_equal(attention.attend(*args, "xla"), used(*args))


SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
from dmrl import parallel
from dmrl.models import attention

keys = jax.random.split(jax.random.key(0), 3)
q, k, v = (jax.random.normal(key, (8, 64, 2, 16)) for key in keys)
valid = jnp.arange(64)[None] >= jnp.arange(8)[:, None]

def value(q, k, v, f):
    return jnp.sum(jnp.cos(f(q, k, v, valid)))

def gradients(f):
    return jax.jit(jax.grad(lambda *a: value(*a, f), (0, 1, 2)))(q, k, v)

want = gradients(attention.xla)
found = {}
for name in sys.argv[1:]:
    with jax.set_mesh(parallel.make_mesh(*map(int, name.split("x")))):
        got = gradients(lambda *a: attention.attend(*a, "xla"))
    found[name] = max(float(jnp.abs(a - b).max()) for a, b in zip(got, want))
print(json.dumps(found))
"""


def test_on_a_mesh_each_device_has_its_rows_and_heads():
    found = simulated.run(SCRIPT, "8x1x1", "2x2x2", "1x4x2")
    assert max(found.values()) < 1e-5
