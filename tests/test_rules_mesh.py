"""Eight simulated devices decode by every kind of rule what one does."""

import json

import pytest
import simulated

MESHES = ("1x1x1", "8x1x1", "1x4x2", "2x2x2")
SETTINGS = {
    "adaptive, cached": {"schedule": "threshold:0.3", "cache": "dual:2"},
    "prefix": {"cache": "prefix"},
    "rcr": {"remask": "rcr", "schedule": "linear"},
    "remdm": {"remask": "remdm:0.5", "order": "margin"},
    "doubling": {"schedule": "doubling:2", "steps": 3, "block_length": 8, "order": "eoser:0.1"},
    "drawn order": {"order": "softmax_confidence:0.1", "top_p": 0.9},
}

SCRIPT = """
import json, sys
import jax, numpy as np, optax
from jax.sharding import Mesh
from dmrl import models, parallel
from dmrl.diffusion.sampler import Sampling
from dmrl.programs import Programs

jax.config.update("jax_numpy_rank_promotion", "raise")
cfg = models.Config(vocab_size=16, d_model=32, n_layers=2, n_heads=4, n_kv_heads=4,
    mlp_hidden_size=48, max_sequence_length=32, mask_token_id=0, eos_token_id=1,
    dtype="float32", param_dtype="float32", remat="none")
rng = np.random.default_rng(0)
prompts = (rng.integers(2, 16, (8, 4)).astype(np.int32), np.ones((8, 4), bool),
           np.where(rng.random((8, 8)) < 0.8, 0, 3).astype(np.int32))
params = jax.tree.map(np.asarray, models.init(cfg, jax.random.key(0))["params"])
result, settings = {}, json.loads(sys.argv[1])
for name in sys.argv[2:]:
    sizes = [int(n) for n in name.split("x")]
    if name == "1x1x1":
        one = np.array(jax.devices()[:1]).reshape(1, 1, 1)
        mesh = Mesh(one, parallel.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    else:
        mesh = parallel.make_mesh(*sizes)
    weights = {"params": jax.device_put(params, parallel.shardings(mesh, params))}
    result[name] = {}
    for title, options in settings.items():
        config = Sampling(**{"length": 8, "steps": 4, "block_length": 4, "temperature": 1.0,
                             **options})
        programs = Programs(cfg, (), config, optax.sgd(1.0), mesh, 2)
        out, _ = programs.rollout(weights, None, prompts, 0, jax.random.key(5))
        result[name][title] = [np.asarray(out.tokens).tolist(),
                               np.asarray(out.reveal_step).tolist()]
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def decoded():
    return simulated.run(SCRIPT, json.dumps(SETTINGS), *MESHES)


@pytest.mark.slow
@pytest.mark.parametrize("title", SETTINGS)
@pytest.mark.parametrize("mesh", MESHES[1:])
def test_a_mesh_decodes_what_one_device_does(decoded, mesh, title):
    one, many = decoded["1x1x1"][title], decoded[mesh][title]
    assert many == one
    assert len({tuple(row) for row in one[0]}) > 8
