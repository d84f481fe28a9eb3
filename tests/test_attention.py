"""The splash kernel, interpreted, against XLA's attention; refusals."""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simulated
from running import ROOT

from dmrl.models import Config, attention, target

SMALL = Config(vocab_size=16, d_model=256, n_layers=1, n_heads=2, n_kv_heads=2,
               mlp_hidden_size=8, mask_token_id=0, eos_token_id=1)  # fmt: skip


def inputs(length, kv=2, rows=2):
    keys = jax.random.split(jax.random.key(length), 3)
    q = jax.random.normal(keys[0], (rows, length, 2, 128))
    k, v = (jax.random.normal(key, (rows, length, kv, 128)) for key in keys[1:])
    valid = jnp.arange(length)[None] >= jnp.array([0, 3])[:rows, None]
    return q, k, v, valid


@pytest.mark.parametrize(("length", "kv"), [(128, 2), (200, 2), (40, 1)])
def test_the_kernel_computes_what_xla_does(length, kv):
    args = inputs(length, kv)

    def value(q, k, v, f):
        return jnp.sum(jnp.cos(f(q, k, v, args[3])))

    def splash(*args):
        return attention.splash(*args, interpret=True)

    for f in (lambda f: f(*args), lambda f: jax.grad(value, (0, 1, 2))(*args[:3], f)):
        got, want = f(splash), f(attention.xla)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(jnp.abs(b).max()))


def test_elsewhere_than_on_a_tpu_it_is_the_usual():
    args = inputs(128)
    text = jax.jit(lambda *a: attention.attend(*a, "splash")).lower(*args).as_text()
    assert "tpu_custom_call" not in text
    np.testing.assert_array_equal(attention.attend(*args, "splash"), attention.attend(*args, "xla"))


def test_a_window_does_not_take_the_kernel(monkeypatch):
    monkeypatch.setattr(target, "platform", lambda: "tpu")
    q, k, v, valid = inputs(128)
    made = jax.make_jaxpr(lambda *a: attention.attend(*a, "splash"))
    assert "pallas_call" not in str(made(q[:, :32], k, v, valid))
    assert "pallas_call" in str(made(q, k, v, valid))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention": "flash"}, "attention='flash': choose one of xla, splash"),
        ({"attention": "splash", "n_heads": 4, "n_kv_heads": 4}, "multiple of 128, not 64 wide"),
    ],
)
def test_what_cannot_work_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **values)


SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
from dmrl import parallel
from dmrl.models import attention

keys = jax.random.split(jax.random.key(0), 3)
q, k, v = (jax.random.normal(key, (8, 40, 2, 128)) for key in keys)
valid = jnp.arange(40)[None] >= jnp.arange(8)[:, None]
want = attention.xla(q, k, v, valid)
found = {}
for name in sys.argv[1:]:
    with jax.set_mesh(parallel.make_mesh(*map(int, name.split("x")))):
        got = jax.jit(lambda *a: attention.splash(*a, interpret=True))(q, k, v, valid)
    found[name] = float(jnp.abs(got - want).max())
print(json.dumps(found))
"""


def test_on_a_mesh_each_device_has_its_rows_and_heads():
    found = simulated.run(SCRIPT, "8x1x1", "2x2x2", "1x4x2")
    assert max(found.values()) < 1e-5


AHEAD = """
import sys
import jax, jax.numpy as jnp
from dmrl import models, parallel, slices

where = slices.find(sys.argv[1])
mesh = parallel.mesh_over(where.devices, 1, -1, 1)
cfg = models.Config(vocab_size=512, d_model=256, n_layers=2, n_heads=2, n_kv_heads=2,
    mlp_hidden_size=256, mask_token_id=0, eos_token_id=1, attention="splash")
params = jax.eval_shape(lambda: models.init(cfg, jax.random.key(0))["params"])
shaped = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
params = jax.tree.map(shaped, params, parallel.shardings(mesh, params))
rows, size = parallel.batch_sharding(mesh), (mesh.size, 1756)
tokens = jax.ShapeDtypeStruct(size, jnp.int32, sharding=rows)
valid = jax.ShapeDtypeStruct(size, jnp.bool_, sharding=rows)

def loss(params, tokens, valid):
    hidden = models.bind(cfg, {"params": params}).encode(tokens, valid)
    return jnp.sum(jnp.cos(hidden.astype(jnp.float32)))

with jax.set_mesh(mesh):
    lowered = jax.jit(jax.grad(loss)).trace(params, tokens, valid).lower()
    print("kernels", lowered.as_text().count("tpu_custom_call"))
    lowered.compile()
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"),
    reason="the TPU compiler is not installed: pip install '.[tpu]' in an environment of its own",
)
@pytest.mark.parametrize("topology", ["v4-8", "v5e-4", "v5p-8"])
def test_forward_and_backward_compile_for_tpus(topology):
    command = [sys.executable, "-c", AHEAD, topology]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *_, kernels, compiled = done.stdout.splitlines()
    assert int(kernels.removeprefix("kernels ")) >= 3, "forward, dq, dkv"
    assert compiled == "compiled"
