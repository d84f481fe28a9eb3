"""Meshes: who holds what, and eight simulated devices computing what one does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import simulated
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from dmrl import models, parallel

MESHES = ("1x1x1", "1x8x1", "8x1x1", "2x2x2", "1x4x2")

SCRIPT = """
import json, sys
import jax, numpy as np, optax
from jax.sharding import Mesh
from dmrl import models, parallel
from dmrl.diffusion.sampler import Sampling
from dmrl.objective import make_term
from dmrl.programs import Programs

jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
cfg = models.Config(vocab_size=16, d_model=32, n_layers=1, n_heads=4, n_kv_heads=4,
    mlp_hidden_size=48, max_sequence_length=32, mask_token_id=0, eos_token_id=1,
    dtype="float32", param_dtype="float32", remat="none")
terms = (make_term("diffu_grpo", 1.0, {"beta": 0.5, "divide_by_std": True}),
         make_term("dispo", 0.5, {"beta": 0.0}))
sampling = Sampling(length=8, steps=2, block_length=8, temperature=1.0)
rng = np.random.default_rng(0)
prompts = (rng.integers(2, 16, (8, 4)).astype(np.int32), np.ones((8, 4), bool),
           np.zeros((8, 8), np.int32))
params = jax.tree.map(np.asarray, models.init(cfg, jax.random.key(0))["params"])
result = {}
for name in sys.argv[1:]:
    shape, _, microbatches = name.partition("/")
    sizes = [int(n) for n in shape.split("x")]
    if shape == "1x1x1":
        one = np.array(jax.devices()[:1]).reshape(1, 1, 1)
        mesh = Mesh(one, parallel.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    else:
        mesh = parallel.make_mesh(*sizes)
    inner = 1 if microbatches else 2
    programs = Programs(
        cfg, terms, sampling, optax.adam(1e-2), mesh, 2, inner, int(microbatches or 2)
    )
    layout = parallel.shardings(mesh, params)
    frozen = jax.device_put(params, layout)
    state = programs.init_state({"params": jax.device_put(params, layout)})
    seen = {"tokens": [], "fills": [], "loss": [], "grad_norm": []}
    for number in range(2):
        key = jax.random.fold_in(jax.random.key(5), number)
        rollout, probes = programs.rollout(state.trainable, frozen, prompts, 0, key)
        put = lambda x: jax.device_put(x, parallel.batch_sharding(mesh))
        reward = lambda x: put(np.mean(np.asarray(x) % 2, axis=-1, dtype=np.float32))
        rollout = rollout._replace(reward=reward(rollout.tokens))
        probes = tuple(p and p._replace(reward=reward(p.fills)) for p in probes)
        if number == 0:
            seen["tokens"] = np.asarray(rollout.tokens).tolist()
            seen["fills"] = np.asarray(probes[1].fills).tolist()
        state, metrics = programs.update(state, frozen, [rollout], [probes], key)
        if number == 0:
            seen["loss"], seen["grad_norm"] = float(metrics["loss"]), float(metrics["grad_norm"])
            seen["embedding"] = np.asarray(state.opt_state[0].mu["params"]["embedding"]).tolist()
    head = state.trainable["params"]["head"]
    seen["compiled"] = [programs._rollout._cache_size(), programs._update._cache_size()]
    seen["share"] = head.addressable_shards[0].data.size / head.size
    result[name] = seen
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def eight():
    """What each mesh computed, in one process with eight simulated devices."""
    return simulated.run(SCRIPT, *MESHES)


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_a_mesh_computes_what_one_device_does(eight, mesh):
    one, many = eight["1x1x1"], eight[mesh]
    assert many["tokens"] == one["tokens"]
    assert many["fills"] == one["fills"]
    assert len({tuple(row) for row in one["tokens"]}) == 16
    assert many["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert one["grad_norm"] > 0.1
    np.testing.assert_allclose(many["embedding"], one["embedding"], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def accumulated():
    """One inner update with gradients of 1 and of 4 microbatches."""
    return simulated.run(SCRIPT, *(f"{mesh}/{n}" for n in (1, 4) for mesh in MESHES))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_accumulated_gradients_are_those_of_the_whole_batch(accumulated, mesh):
    """With a cut vocabulary too, where a pass of the compiler has moved scattered sums wrongly."""
    whole, pieces = accumulated[f"{mesh}/1"], accumulated[f"{mesh}/4"]
    np.testing.assert_allclose(pieces["embedding"], whole["embedding"], rtol=0, atol=1e-6)
    assert np.abs(whole["embedding"]).max() > 1e-3
    assert pieces["loss"] == pytest.approx(whole["loss"], abs=1e-6)


WORK = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, optax
from dmrl import hlo, models, parallel
from dmrl.diffusion.sampler import Sampling
from dmrl.flops import matmul_flops
from dmrl.models import logprob, tiles
from dmrl.objective import make_term
from dmrl.programs import Programs

jax.config.update("jax_disable_most_optimizations", True)
# All meshes walk the vocabulary in chunks, and all rows of it.
logprob.CHUNK, tiles.TILE = 256, 10**6
cfg = models.Config(vocab_size=1024, d_model=64, n_layers=2, n_heads=8, n_kv_heads=8,
    mlp_hidden_size=192, max_sequence_length=128, mask_token_id=0, eos_token_id=1,
    dtype="float32", param_dtype="float32", remat="none")
terms = (make_term("diffu_grpo", 1.0, {"beta": 0.0}),)
sampling = Sampling(length=32, steps=4, block_length=16, temperature=1.0)
prompts = (np.full((8, 16), 2, np.int32), np.ones((8, 16), bool), np.zeros((8, 32), np.int32))
params = models.init(cfg, jax.random.key(0))["params"]
result = {}
for name in ("1x1x1", *sys.argv[1:]):
    sizes = [int(n) for n in name.split("x")]
    mesh = parallel.mesh_over(jax.devices()[: int(np.prod(sizes))], *sizes)
    programs = Programs(cfg, terms, sampling, optax.sgd(1.0), mesh, 2)
    state = programs.init_state({"params": params})
    key = jax.random.key(1)
    rollout = programs.trace_rollout(state.trainable, None, prompts, key)
    done, _ = programs.rollout(state.trainable, None, prompts, 0, key)
    done = done._replace(reward=jax.device_put(jnp.ones(16), parallel.batch_sharding(mesh)))
    update = programs.trace_update(state, None, [done], [(None,)], key)
    result[name] = {}
    for what, traced in (("rollout", rollout), ("update", update)):
        text = traced.lower().compile().as_text()
        result[name][what] = hlo.products(text) * mesh.size
        if name == "1x1x1":
            result[name][f"{what} jaxpr"] = matmul_flops(traced.jaxpr)
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def work():
    """FLOPs of all products on all devices of a mesh together, as compiled."""
    return simulated.run(WORK, *MESHES[1:])


@pytest.mark.slow
@pytest.mark.parametrize("program", ["rollout", "update"])
def test_the_devices_together_multiply_what_one_does(work, program):
    one = work["1x1x1"]
    assert one[program] == pytest.approx(one[f"{program} jaxpr"], rel=0.05)
    for mesh in MESHES[1:]:
        assert work[mesh][program] <= 1.05 * one[program], mesh
        assert work[mesh][program] > 0.9 * one[program], mesh


@pytest.mark.parametrize("mesh", MESHES)
def test_two_steps_compile_two_programs(eight, mesh):
    assert eight[mesh]["compiled"] == [1, 1]


@pytest.mark.parametrize(
    ("mesh", "share"),
    [("1x1x1", 1), ("1x8x1", 1 / 8), ("8x1x1", 1), ("2x2x2", 1 / 4), ("1x4x2", 1 / 8)],
)
def test_weights_stay_cut_after_updates(eight, mesh, share):
    assert eight[mesh]["share"] == share


def mesh_of(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), parallel.AXES, axis_types=(AxisType.Auto,) * 3)


CFG = models.Config(
    vocab_size=32,
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=4,
    mlp_hidden_size=24,
    mask_token_id=0,
    eos_token_id=1,
    lora_rank=3,
)


def specs(mesh, tree):
    laid = parallel.shardings(mesh, tree)
    return {
        parallel.path_name(path): sharding.spec
        for path, sharding in jax.tree_util.tree_leaves_with_path(laid)
    }


def test_one_table_for_weights_adapter_and_optimiser():
    tree = jax.eval_shape(lambda: models.init(CFG, jax.random.key(0)))
    found = specs(mesh_of(2, 2, 2), tree)
    assert found["params/blocks/attn/q_proj/kernel"] == P(None, "fsdp", "tensor")
    assert found["params/blocks/ff_out/kernel"] == P(None, "tensor", "fsdp")
    assert found["params/embedding"] == P("tensor", "fsdp")
    assert found["params/head"] == P(None, ("fsdp", "tensor"))
    assert found["lora/blocks/attn/q_proj/a"] == P(None, "fsdp")
    assert found["lora/blocks/attn/q_proj/b"] == P(None, None, "tensor")
    moments = jax.eval_shape(lambda: optax.adam(1.0).init(tree["params"]))
    inside = specs(mesh_of(2, 2, 2), moments)
    assert inside["0/mu/blocks/attn/q_proj/kernel"] == P(None, "fsdp", "tensor")
    assert inside["0/count"] == P()


def test_every_matrix_is_cut_by_some_rule_of_its_own():
    tree = jax.eval_shape(lambda: models.init(CFG, jax.random.key(0)))
    whole = [n for n, spec in specs(mesh_of(1, 2, 2), tree).items() if spec == P()]
    assert whole
    assert all(name.endswith("/scale") for name in whole), whole


def test_every_matrix_of_an_order_is_cut_but_its_one_column():
    tree = jax.eval_shape(lambda: models.unmasking.init(CFG, jax.random.key(0)))
    cut = specs(mesh_of(1, 2, 2), tree)
    whole = {name for name, spec in cut.items() if spec == P()}
    assert all(name.endswith(("/scale", "/bias", "score/kernel")) for name in whole), whole
    assert cut["block/attn/attn_out/kernel"] == P("tensor", "fsdp")
    assert cut["hidden_0/kernel"] == P("fsdp", "tensor")


def test_an_axis_that_does_not_divide_or_cuts_nothing_is_dropped():
    tree = {"head": jnp.zeros((6, 5)), "embedding": jnp.zeros((5, 6))}
    assert specs(mesh_of(1, 2, 2), tree) == {"head": P(), "embedding": P(None, "fsdp")}
    assert specs(mesh_of(1, 1, 5), tree) == {"head": P(None, "tensor"), "embedding": P("tensor")}
    assert specs(mesh_of(8, 1, 1), tree) == {"head": P(), "embedding": P()}
    assert parallel.batch_shards(mesh_of(2, 3, 4)) == 6


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2},
        {"data": 2, "fsdp": 1, "tensor": 1},
        {"fsdp": 0},
        {"data": -1, "fsdp": -1},
        {"data": -2},
    ],
)
def test_meshes_that_do_not_fit_the_devices_are_refused(sizes):
    with pytest.raises(ValueError, match=r"mesh data=.*, tensor=.* does not cover the 1 devices"):
        parallel.make_mesh(**sizes)


def test_minus_one_is_the_rest():
    assert dict(parallel.make_mesh(1, 1, -1).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert np.prod(list(parallel.make_mesh().shape.values())) == jax.device_count()


PHASES = """
import json, jax, optax
from dmrl import models, parallel
from dmrl.objective import make_term
from dmrl.programs import Programs

cfg = models.Config(vocab_size=16, d_model=32, n_layers=1, n_heads=4, n_kv_heads=4,
    mlp_hidden_size=48, max_sequence_length=32, mask_token_id=0, eos_token_id=1,
    dtype="float32", param_dtype="float32", remat="none")
mesh = parallel.make_mesh(1, 8, 1)
programs = Programs(cfg, (make_term("dtm", 1.0, {}),), None, optax.adam(1e-2), mesh,
    phases=True, ema=0.5)
state = programs.init_state({"params": models.init(cfg, jax.random.key(0))["params"]})
share = lambda s: {parallel.path_name(path): x.addressable_shards[0].data.size / x.size
                   for path, x in jax.tree_util.tree_leaves_with_path(s)}
print(json.dumps([share(state), share(programs.next_phase(state))]))
"""


def test_a_new_phase_keeps_every_layout():
    before, after = simulated.run(PHASES)
    assert after == before
    cut = {name for name, share in before.items() if share == 1 / 8}
    for tree in ("trainable", "teacher", "ema", "opt_state/0/mu"):
        assert f"{tree}/params/head" in cut
