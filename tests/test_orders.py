"""A run that trains an order: what it leaves alone, what it writes, who may use it."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import sudoku_upo
from dmrl import models, orders, parallel, policy, recipe, trainer
from dmrl.held import Held
from dmrl.models import weights
from dmrl.policy import Policy
from dmrl.stages import Reinforce


def small():
    """The tiny recipe with little of everything."""
    made = sudoku_upo.tiny()
    made.task.update({"blanks": (2, 4), "train_size": 64, "held_out_size": 8})
    made.update({"steps": 2, "prompts_per_step": 4, "num_generations": 2, "checkpoint_every": 0})
    made.model.update({"d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2})
    made.model.mlp_hidden_size = 24
    made.sampling.steps = made.terms.upo.steps = 4
    made.warm_start.update({"steps": 1, "batch": 8})
    made.imitation.update({"steps": 3, "batch": 4, "evaluate_every": 2})
    made.evaluation.update({"steps": (4,), "orders": ("random",), "size": 8, "batch": 8})
    made.evaluation.trajectories = 1
    return made.to_dict()


@pytest.fixture(scope="module")
def run(tmp_path_factory, compile_once):
    """The folder of a finished run and its last evaluation."""
    folder, config = tmp_path_factory.mktemp("upo") / "run", small()
    return folder, trainer.train(recipe.build(config), folder, config)


@pytest.mark.slow
def test_a_run_trains_the_order_and_leaves_the_denoiser(run):
    folder, final = run
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(row["stage"] for row in rows)) == ["warm_start", "imitation", "rl"]
    assert any("eval/agreement" in row for row in rows)
    assert {k.split("/")[2] for k in final} == {
        "greedy_4_learned:1",
        "greedy_4_learned",
        "greedy_4_random",
    }
    before = {}
    for row in rows:
        if row["stage"] == "rl":
            before = {**row, **before}
    # The denoiser stayed: what a heuristic decodes is what it was, to the last token.
    assert final["eval/test/greedy_4_random/cells"] == before["eval/test/greedy_4_random/cells"]
    made = recipe.build(small())
    mesh = parallel.make_mesh(**made.mesh)
    trained = orders.load(str(folder), made.model, mesh)
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), trained, orders.fresh(made)["order"]
    )
    assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.slow
def test_the_order_decodes_with_another_denoiser(run):
    folder, _ = run
    made = recipe.build(small())
    mesh = parallel.make_mesh(**made.mesh)
    other = Policy(
        made.model, {"params": models.init(made.model, jax.random.key(5))["params"]}, None
    )
    greedy = made.sampling.greedy
    with_it = orders.beside(other, ["nowhere", str(folder)], [greedy], mesh)
    assert with_it.trainable["params"] is other.trainable["params"]
    own = policy.load(str(folder), None, mesh)
    np.testing.assert_array_equal(
        with_it.trainable["order"]["score"]["kernel"],
        orders.load(str(folder / "order"), own.model, mesh)["score"]["kernel"],
    )
    plain = dataclasses.replace(greedy, order="random")
    assert orders.beside(other, ["nowhere"], [plain], mesh) is other
    with pytest.raises(ValueError, match="no trained order in nowhere"):
        orders.beside(other, ["nowhere"], [greedy], mesh)
    wide = dataclasses.replace(made.model, d_model=32)
    with pytest.raises(ValueError, match="with d_model=16, this one has 32"):
        orders.load(str(folder), wide, mesh)


def test_an_order_survives_the_disk(tmp_path):
    made = recipe.build(small())
    own = orders.fresh(made)["order"]
    weights.save_weights(tmp_path / "order", made.model, own, "order")
    again = orders.load(str(tmp_path), made.model, parallel.make_mesh())
    jax.tree.map(np.testing.assert_array_equal, again, own)
    assert weights.collection_in(tmp_path / "order") == "order"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling.order": "margin"}, "trains the order of a sampler with order='learned:T'"),
        ({"terms.upo.reference": "top_k", "terms.upo.top_k": 5}, "give it the same K, 'learned:1"),
        ({"sampling.schedule": "cosine"}, "schedule='uniform'.*, not 'learned:1', 'cosine'"),
        ({"sampling.top_p": 0.9}, "top_p=1, not .* and 0.9"),
        ({"model.lora_rank": 4}, "model.lora_rank=4, but upo trains no adapter"),
        ({"terms.upo.steps": 8}, "terms.upo.steps=8, but sampling.steps=4"),
    ],
)
def test_what_does_not_fit_is_said(changes, message):
    config = small()
    for path, value in changes.items():
        *parents, name = path.split(".")
        functools.reduce(lambda tree, key: tree[key], parents, config)[name] = value
    with pytest.raises(ValueError, match=message):
        recipe.build(config)


def test_a_step_that_had_to_reveal_several_is_refused_before_the_run():
    config = small()
    config["sampling"]["steps"] = config["terms"]["upo"]["steps"] = 3
    config["evaluation"]["steps"] = ()
    made = recipe.build(config)
    mesh = parallel.make_mesh(**made.mesh)
    with pytest.raises(ValueError, match=r"sampling.steps=3: a block has up to 4 masks"):
        Reinforce(made, mesh, Held(made, mesh))


def test_a_denoiser_is_not_trained_beside_an_order():
    config = small()
    config["terms"]["sft"] = {"weight": 1.0}
    with pytest.raises(ValueError, match="upo trains an order and keeps the denoiser, sft trains"):
        recipe.build(config)
    del config["terms"]["upo"]
    with pytest.raises(ValueError, match="order='learned:1', but no term"):
        recipe.build(config)
