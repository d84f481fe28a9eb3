"""A checkpoint on a split: the published protocol, what a result holds, what compares."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from running import ROOT, config, rows

from configs import diffu_grpo
from dmrl import accuracy, models, parallel, policy, protocol, recipe, results
from dmrl.diffusion.sampler import Sampling
from dmrl.models import weights

HELD = {"task__held_out_size": 11}


def stored(workdir, config, adapter=False):
    """A finished run's folder without the run: fresh weights and the config."""
    made = recipe.build(config)
    cfg = made.model
    tree = models.init(cfg, jax.random.key(5))
    if adapter:
        tree["lora"] = jax.tree.map(lambda x: x + 0.3, tree["lora"])
    kind = "lora" if adapter else "params"
    weights.save_weights(workdir / "weights", cfg, tree[kind], kind)
    (workdir / "config.json").write_text(json.dumps({"config": config}))
    return made, tree


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    made, _ = stored(workdir, config(**HELD))
    return workdir, made


def measured(run, **asked):
    workdir, made = run
    mesh = parallel.make_mesh(**made.mesh)
    loaded = policy.load(str(workdir), made.init_from, mesh)
    wanted = accuracy.Asked(**asked)
    return list(accuracy.measure(made, loaded, mesh, wanted, accuracy.samplings(made, wanted)))


def test_the_default_is_the_published_protocol():
    made = recipe.build(diffu_grpo.get_config("countdown").to_dict())
    found = accuracy.samplings(made, accuracy.Asked())
    assert [(s.length, s.steps, s.block_length) for s in found] == [
        (128, 64, 32),
        (256, 128, 32),
        (512, 256, 32),
    ]
    assert {(s.temperature, s.order, s.cfg_scale) for s in found} == {(0.0, "low_confidence", 0.0)}


def test_templates_are_decoded_at_their_own_length(run):
    (sampling,) = accuracy.samplings(run[1], accuracy.Asked())
    assert (sampling.length, sampling.steps, sampling.block_length) == (16, 8, 16)


def test_boards_have_cells_and_solved_apart_and_the_generations_score_the_same(run):
    ((result, lines),) = measured(run)
    assert result["n"] == result["n_questions"] == 11
    assert result["board_accuracy"] == result["accuracy"]
    low, high = result["accuracy_95"]
    assert low <= result["accuracy"] <= high
    task = run[1].task
    examples = task.examples("test")
    scores = [task.score(e, r["generations"]) for e, r in zip(examples, lines, strict=True)]
    empty = np.array([task.empty(e) for e in examples])
    cells = np.array([s["cells"] for s in scores])
    assert result["cell_accuracy"] == pytest.approx((cells * empty).sum() / empty.sum(), abs=1e-6)
    assert 0 < result["cell_accuracy"] < 1
    assert [r["cells"] for r in lines] == cells.tolist()


def test_the_batch_changes_no_completion(run):
    whole = [r["generations"] for r in measured(run, batch=11)[0].generations]
    assert len(set(whole)) > 5
    found = measured(run, batch=4)[0]
    assert [r["generations"] for r in found.generations] == whole
    assert found.result["tokens_per_s"] > 0
    sampled = [
        [
            r["generations"]
            for r in measured(run, samples=2, temperature=1.0, batch=b)[0].generations
        ]
        for b in (2, 22)
    ]
    assert sampled[0] == sampled[1]


def test_sampled_runs_have_pass_at_k(run):
    ((result, lines),) = measured(run, samples=4, temperature=1.0, size=5)
    assert [(r["id"], r["sample"]) for r in lines] == [(i, j) for i in range(5) for j in range(4)]
    assert len({r["generations"] for r in lines[:4]}) > 1
    assert list(result["pass_at"]) == ["1", "2", "4"]
    assert result["pass_at"]["1"] == pytest.approx(result["accuracy"], abs=1e-6)
    assert (result["n"], result["n_questions"]) == (20, 5)


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    import itertools

    rights, samples = [0, 1, 3, 5], 5
    for k in range(1, 6):
        draws = [
            any(i < right for i in chosen)
            for right in rights
            for chosen in itertools.combinations(range(samples), k)
        ]
        assert results.pass_at(rights, samples, k) == pytest.approx(np.mean(draws))


@pytest.mark.slow
def test_an_adapter_needs_the_base_it_was_trained_on(tmp_path):
    options = config(**HELD, model__lora_rank=2, model__lora_alpha=4.0)
    made, tree = stored(tmp_path, options, adapter=True)
    mesh = parallel.make_mesh(**made.mesh)
    with pytest.raises(ValueError, match="is an adapter: name the weights it was trained on"):
        policy.load(str(tmp_path), "", mesh)
    loaded = policy.load(str(tmp_path / "weights"), tree["params"], mesh)
    np.testing.assert_array_equal(
        jax.tree.leaves(loaded.trainable["lora"])[0], jax.tree.leaves(tree["lora"])[0]
    )
    with_adapter = measured((tmp_path, made._replace(init_from=tree["params"])))
    bare = tmp_path / "base"
    weights.save_weights(bare, dataclasses.replace(made.model, lora_rank=0), tree["params"])
    base = measured((bare, made))
    texts = [[r["generations"] for r in m[0].generations] for m in (with_adapter, base)]
    assert texts[0] != texts[1], "the adapter changes nothing"
    assert with_adapter[0].result["hash"] == base[0].result["hash"]
    named = policy.load(str(tmp_path), str(bare), mesh)
    np.testing.assert_array_equal(
        jax.tree.leaves(named.frozen)[-1], jax.tree.leaves(tree["params"])[-1]
    )


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"samples": 3}, "--samples=3 with --temperature=0 would be 3 times the same"),
        ({"size": -1}, "--size=-1"),
        ({"split": "nope"}, "split='nope' is not one of"),
        ({"steps": 17}, "steps=17 must be a multiple"),
        ({"lengths": (8,), "block": 8}, "is 16 tokens, the completion 8"),
        ({"lengths": (4096,)}, "more than the model's"),
    ],
)
def test_what_cannot_work_is_refused(run, asked, message):
    with pytest.raises(ValueError, match=message):
        measured(run, **asked)


def test_a_checkpoint_of_another_tokenizer_is_refused(run):
    workdir, made = run
    loaded = policy.load(str(workdir), "", parallel.make_mesh(**made.mesh))
    other = made._replace(model=dataclasses.replace(made.model, vocab_size=99))
    with pytest.raises(ValueError, match=r"model\.vocab_size=\d+, the recipe 99"):
        accuracy.agrees(other, loaded)
    with pytest.raises(FileNotFoundError, match=r"no model\.json there or in its folder weights"):
        policy.load(str(workdir / "none"), "", None)


@pytest.mark.parametrize("name", ["gsm8k", "math500", "countdown", "sudoku"])
def test_training_prompts_become_those_of_the_evaluation(name):
    changed = accuracy.in_published_style({"name": name, "style": "published"})
    assert changed["style"] == ("published" if name == "sudoku" else "evaluation")
    kept = {"name": name, "style": "compact"}
    assert accuracy.in_published_style(kept) == kept


@pytest.mark.parametrize(
    ("name", "example"),
    [
        ("gsm8k", ("1 + 1?", "2")),
        ("math500", ("What?", r"\frac12")),
        ("countdown", ((3, 4, 5), 12)),
        ("sudoku", ("0000000000000001", "3" * 15 + "1")),
    ],
)
def test_saved_truths_make_the_example_again(name, example):
    module = __import__(f"dmrl.tasks.{name}", fromlist=["Example"])
    style = "published" if name == "sudoku" else "evaluation"
    task = protocol.load(name, "paper", style=style)
    made = module.Example(*example)
    question = made.question if name in ("gsm8k", "math500") else task.prompt(made)
    assert task.recorded(question, json.loads(json.dumps(task.truth(made)))) == made


def result(**changed):
    told = {"task": "gsm8k", "length": 128, "steps": 64, "temperature": 0.0} | changed
    return {
        "hash": results.digest(told),
        "protocol": told,
        "accuracy": 0.25,
        "accuracy_95": [0.2, 0.3],
    }


def write(path, *found):
    path.mkdir(exist_ok=True)
    (path / "results.json").write_text(json.dumps({"results": found}))
    return path


def test_results_of_one_protocol_compare(tmp_path):
    a = write(tmp_path / "a", result(), result(length=256))
    b = write(tmp_path / "b", result(length=256) | {"accuracy": 0.5}, result())
    found = results.compare(a, b)
    assert [(row[0], row[2], row[3]) for row in found] == [
        ("128", "25.0 [20.0, 30.0]", "25.0 [20.0, 30.0]"),
        ("256", "25.0 [20.0, 30.0]", "50.0 [20.0, 30.0]"),
    ]


@pytest.mark.parametrize("name", ["task", "length", "steps", "temperature", "shots"])
def test_results_of_two_protocols_do_not(name, tmp_path):
    a, b = write(tmp_path / "a", result()), write(tmp_path / "b", result(**{name: 7}))
    for one, other in ((a, b), (b, a)):
        with pytest.raises(results.DifferentProtocols, match=rf"not comparable: .*: {name} .*7"):
            results.compare(one, other)
    more = write(tmp_path / "c", result(), result(**{name: 7}))
    with pytest.raises(results.DifferentProtocols, match="not comparable"):
        results.compare(a, more)


def test_a_result_that_was_edited_is_refused(tmp_path):
    forged = result()
    forged["protocol"]["temperature"] = 0.5
    with pytest.raises(ValueError, match=r"not as launch/evaluate\.py wrote it"):
        results.read(write(tmp_path / "a", forged))


def evaluate(*args, code=0):
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "evaluate.py"), *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.mark.slow
def test_the_script_evaluates_a_run_and_compares(run, tmp_path):
    workdir, _ = run
    said = evaluate(f"--checkpoint={workdir}", "--size=6", "--batch=3", f"--out={tmp_path / 'a'}")
    assert "cells" in said
    assert "tokens/s" in said
    (found,) = results.read(tmp_path / "a")
    lines = rows(tmp_path / "a" / found["generations"])
    whole = measured(run, size=6)[0]
    assert [r["generations"] for r in lines] == [r["generations"] for r in whole.generations]
    assert found["hash"] == whole.result["hash"]
    other = write(tmp_path / "b", result())
    assert "not comparable" in evaluate("--compare", tmp_path / "a", other, code=1)
    assert found["hash"] in evaluate("--compare", tmp_path / "a", tmp_path / "a")


def test_the_script_says_what_is_missing(tmp_path):
    assert "give --checkpoint=DIR" in evaluate(code=1)
    said = evaluate(f"--checkpoint={tmp_path}", code=1)
    assert "is no run's: name a recipe by --config" in said


def test_sampling_has_nothing_that_the_protocol_leaves_out(run):
    ((result, _),) = measured(run, size=2)
    assert {f.name for f in dataclasses.fields(Sampling)} < result["protocol"].keys()
