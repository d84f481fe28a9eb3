"""Whole runs in this process: what they write, what they refuse, what never changes."""

import importlib.metadata
import json
import re
import shutil
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import config, rows

from dmrl import models, parallel, recipe, scoring, stages, trainer
from dmrl.checkpoint import Checkpoints
from dmrl.held import Held
from dmrl.models import weights
from dmrl.tasks import sudoku
from dmrl.types import Rollout

pytestmark = pytest.mark.usefixtures("compile_once")


def run(workdir, options, **overrides):
    options = options or config(**overrides)
    return trainer.train(recipe.build(options), workdir, options)


DONE = {
    "evaluation__steps": (2,),
    "rollout_chunks": 2,
    "warm_start__evaluate_every": 1,
    "warm_start__target": 0.0,
}


@pytest.fixture(scope="module")
def done(tmp_path_factory, compile_once):
    """A finished run, what it returned, and its second stage."""
    workdir = tmp_path_factory.mktemp("done")
    for name in trainer.FILES:  # as left by a run that was killed before its first checkpoint
        (workdir / name).write_text('{"step": 1, "stage": "warm_start", "loss": 0.0}\n')
    made = []

    class Watched(stages.Reinforce):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    options = config(**DONE)
    final = trainer.train(recipe.build(options), workdir, options, stage_two=Watched)
    return workdir, final, made[0]


def test_config_json_says_what_ran(done):
    written = json.loads((done[0] / "config.json").read_text())
    expected = config(**DONE)
    assert written["config"] == json.loads(json.dumps(expected))
    assert re.fullmatch(r"[0-9a-f]{40}\+?", written["git"])
    for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain"):
        assert written["packages"][name] == importlib.metadata.version(name)
    assert written["device"].endswith(f"x{jax.device_count()}")


def test_metrics_have_a_line_a_step_and_a_line_an_evaluation(done):
    lines = rows(done[0] / "metrics.jsonl")
    steps = [(r["stage"], r["step"]) for r in lines if "loss" in r]
    # The warm start may take two steps, but reaches its target after one.
    assert steps == [("warm_start", 1), ("rl", 1), ("rl", 2), ("rl", 3)]
    evaluated = [(r["stage"], r["step"]) for r in lines if any(k.startswith("eval/") for k in r)]
    assert evaluated == [("warm_start", 1), ("rl", 0), ("rl", 2), ("rl", 3)]
    for row in lines:
        assert all(np.isfinite(v) for v in row.values() if isinstance(v, float)), row
    step = next(r for r in lines if r["stage"] == "rl" and "loss" in r)
    assert {
        "loss", "grad_norm", "learning_rate", "reward", "reward_std", "frac_reward_zero_std",
        "entropy", "num_tokens", "completions/mean_length", "rewards/solved/mean",
        "dispo/step_reward", "dispo/step_reward_std", "dispo/frac_reward_zero_std",
        "clip_ratio/region_mean", "time/rollout", "time/reward", "time/update", "step_time",
        "tokens_per_s",
    } <= step.keys()  # fmt: skip
    assert 0 < step["num_tokens"] <= 8 * 16
    assert step["step_time"] >= step["time/update"] > 0


def test_the_final_evaluation_is_returned_and_compared_with_the_first(done):
    workdir, final, _ = done
    last = rows(workdir / "metrics.jsonl")[-1]
    assert final == {k: v for k, v in last.items() if k.startswith("eval/")}
    assert {k.split("/")[2] for k in final} == {"sampled_4", "greedy_2"}
    compared = {name: (a, b) for name, a, b in trainer.before_after(workdir)}
    first = next(r for r in rows(workdir / "metrics.jsonl") if (r["stage"], r["step"]) == ("rl", 0))
    assert compared == {name: (first[name], final[name]) for name in final}


def test_trajectories_before_and_after_for_every_setting(done):
    found = [r for r in rows(done[0] / "trajectories.jsonl") if r["split"] != "train"]
    order = [(r["when"], r["setting"], r["id"]) for r in found]
    assert order == [
        (when, setting, i)
        for when in ("before", "after")
        for setting in ("validation sampled_4", "validation greedy_2")
        for i in (0, 1)
    ]
    for row in found:
        given = [c != "_" for c in row["template"]]
        assert [step == -1 for step in row["reveal_step"]] == given
        assert row["violation"] is None or row["metrics"]["solved"] == 0.0
        assert max(row["reveal_step"]) < row["steps"] == int(row["setting"].split("_")[1])
        assert all(p <= 0 for p in row["log_prob"])
        pairs = zip(row["tokens"], row["answer"], given, strict=True)
        share = np.mean([token == wanted for token, wanted, fixed in pairs if not fixed])
        if "" not in row["tokens"]:
            assert row["metrics"]["cells"] == pytest.approx(share)


def test_training_rollouts_are_traced_with_their_branches(done):
    found = [r for r in rows(done[0] / "trajectories.jsonl") if r["split"] == "train"]
    assert [(r["id"], r["when"]) for r in found] == [
        ("step 2", "completion 1"),
        ("step 2", "completion 2"),
    ]
    written = rows(done[0] / "completions.jsonl")
    for row, completion in zip(found, written, strict=False):
        assert row["template"] == completion["template"]
        assert row["reward"] == completion["reward"]
        assert len(row["branches"]) == 1  # DiSPO: one state a rollout
        for branch in row["branches"]:
            steps = zip(row["reveal_step"], row["tokens"], strict=True)
            state = [text if step < branch["step"] else None for step, text in steps]
            assert branch["state"] == state
            assert {len(fill) for fill in branch["fills"]} == {state.count(None)}
            assert len(branch["reward"]) == len(branch["fills"]) >= 2
            assert np.mean(branch["advantage"]) == pytest.approx(0, abs=1e-3)
    assert len({r["branches"][0]["step"] for r in found}) == 1  # shared by the group


def test_completions_are_written_every_so_often(done):
    found = rows(done[0] / "completions.jsonl")
    assert [r["step"] for r in found] == [2] * 8
    for row in found:
        assert len(row["template"]) == 16
        assert {"prompt", "completion", "reward", "solved", "cells"} <= row.keys()
    reward = next(
        r["reward"] for r in rows(done[0] / "metrics.jsonl") if r["step"] == 2 and "reward" in r
    )
    assert np.mean([r["reward"] for r in found]) == pytest.approx(reward, abs=1e-6)


def test_every_program_compiled_once(done):
    stage = done[2]
    assert stage.programs._rollout._cache_size() == stage.programs._update._cache_size() == 1
    for setting in stage.held.settings:
        assert stage.held.programs(setting)._rollout._cache_size() == 1


def test_the_report_shows_the_run(done):
    page = (done[0] / "report.html").read_text()
    assert "warm_start" in page
    assert "sampled_4" in page


def test_a_finished_run_is_left_alone(done, capsys):
    workdir, final, _ = done
    before = {p: p.read_bytes() for p in workdir.glob("*.jsonl")}
    assert run(workdir, None, **DONE) == final
    assert {p: p.read_bytes() for p in workdir.glob("*.jsonl")} == before
    assert "rl: resumed after step 3" in capsys.readouterr().out


def test_a_run_of_before_an_option_resumes_with_its_default(done, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(done[0], workdir)
    stored = json.loads((workdir / "config.json").read_text())
    del stored["config"]["reward_text"]
    (workdir / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="with reward_text=upto_eos, this one has full"):
        run(workdir, None, **DONE, reward_text="full", terms__dispo__weight=0.0)
    assert run(workdir, None, **DONE) == done[1]


def test_another_config_is_refused_by_name(done):
    wanted = r"holds a run with seed=0, this one has 7: choose another --workdir"
    with pytest.raises(ValueError, match=wanted):
        run(done[0], None, **DONE, seed=7)
    with pytest.raises(ValueError, match=r"evaluation.steps=\[2\], this one has \[\]"):
        run(done[0], None, **{**DONE, "evaluation__steps": ()})


def handed_to_the_update(monkeypatch, values):
    """The arrays of the first step's rollouts and probes, chunks joined, and the stage."""

    class Caught(Exception):
        pass

    def catch(self, state, frozen, rollouts, probes, key):
        pieces = [
            [np.asarray(x) for x in jax.tree.leaves(piece)]
            for piece in zip(rollouts, probes, strict=True)
        ]
        raise Caught([np.concatenate(leaves) for leaves in zip(*pieces, strict=True)])

    monkeypatch.setattr(stages.Programs, "update", catch)
    made = recipe.build(values)
    mesh = parallel.make_mesh(**made.mesh)
    stage = stages.Reinforce(made, mesh, Held(made, mesh))
    state = stage.init(trainer.initial_weights(made, mesh)[0])
    with pytest.raises(Caught) as caught:
        stage.step(state, 0, np.array([3, 11, 5, 2]), jax.random.key(1))
    return caught.value.args[0], stage


def assert_equal_rows(got, want):
    for a, b in zip(got, want, strict=True):
        if np.issubdtype(a.dtype, np.integer):
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_step_in_chunks_hands_the_same_rows_to_the_update(monkeypatch):
    found = {
        chunks: handed_to_the_update(monkeypatch, config(rollout_chunks=chunks))[0]
        for chunks in (1, 2, 4)
    }
    assert_equal_rows(found[2], found[1])
    assert_equal_rows(found[4], found[1])
    assert len(found[1]) >= 13


@pytest.mark.slow
def test_a_step_with_slots_hands_the_same_rows_to_the_update(monkeypatch):
    found = {}
    for refill in (True, False):
        blocks = {"sampling__block_length": 4, "sampling__steps": 8, "rollout_chunks": 2}
        values = config(refill=refill, **blocks)
        del values["terms"]["dispo"]
        found[refill], stage = handed_to_the_update(monkeypatch, values)
        assert stage.programs.slots == (4 if refill else 0)
    assert_equal_rows(found[True], found[False])


class Says(sudoku.Task):
    """Whose reward is the number of characters that it is shown."""

    def score(self, example, text):
        del example
        return {"reward": float(len(text)), "solved": 0.0}


@pytest.mark.parametrize("text", recipe.REWARD_TEXTS)
def test_rewards_read_the_text_that_the_recipe_says(monkeypatch, text):
    values = config(reward_text=text, sampling__block_length=4, sampling__steps=8)
    values["rollout_chunks"] = 2
    del values["terms"]["dispo"]
    stage = handed_to_the_update(monkeypatch, values)[1]
    assert stage.programs.stops_at_eos is (text == "upto_eos")
    assert stage.programs.slots == (4 if text == "upto_eos" else 0)
    made = stage.recipe._replace(task=Says())
    ids = made.model
    tokens = np.array([[2, 3, ids.eos_token_id, 4], [2, ids.eos_token_id, 3, 3]], np.int32)
    blank = jnp.zeros(tokens.shape)
    rollout = Rollout(
        *(tokens, tokens > 0, jnp.asarray(tokens), jnp.asarray(tokens), blank, blank),
        *(jnp.arange(2), jnp.zeros(2, int), jnp.array([3, 2])),
    )
    scored = scoring.score(made, [None, None], rollout, [None])
    np.testing.assert_array_equal(scored.parts["reward"], [2, 1] if text == "upto_eos" else [3, 3])


def test_divergence_stops_the_run_and_names_the_step(tmp_path):
    options = {
        "optimizer__learning_rate": 1e30,
        "optimizer__warmup_steps": 1,
        "optimizer__schedule": "constant",
        "warm_start__steps": 0,
        "checkpoint_every": 1,
        "steps": 6,
    }
    with pytest.raises(trainer.NotFiniteError, match=r"rl step \d: (loss|grad_norm) is (nan|inf)"):
        run(tmp_path, None, **options)
    steps = [r["step"] for r in rows(tmp_path / "metrics.jsonl") if "loss" in r]
    assert Checkpoints(tmp_path / "checkpoints" / "rl").steps() == steps[-2:]


NOT_A_NUMBER = """
import dataclasses
from dmrl.tasks import sudoku

@dataclasses.dataclass(frozen=True)
class Task(sudoku.Task):
    def score(self, example, completion):
        return super().score(example, completion) | {"reward": float("nan")}
"""


def test_a_reward_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    package = tmp_path / "mytasks"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "broken.py").write_text(NOT_A_NUMBER)
    monkeypatch.syspath_prepend(tmp_path)
    options = config(warm_start__steps=0)
    options["task"]["name"] = "mytasks.broken"
    with pytest.raises(trainer.NotFiniteError, match="rl step 1: loss is nan"):
        run(tmp_path / "run", options)
    assert Checkpoints(tmp_path / "run" / "checkpoints" / "rl").steps() == []
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert "NaN" not in line
    sys.modules.pop("mytasks.broken")


def test_sigterm_at_the_end_of_a_stage_does_not_start_the_next(tmp_path, monkeypatch):
    real = stages.WarmStart.step

    def step(self, state, number, index, key):
        if number == self.steps - 1:
            signal.raise_signal(signal.SIGTERM)
        return real(self, state, number, index, key)

    monkeypatch.setattr(stages.WarmStart, "step", step)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        run(tmp_path, None)
    assert left.value.code == 0
    assert signal.getsignal(signal.SIGTERM) == handler
    assert Checkpoints(tmp_path / "checkpoints" / "warm_start").steps()[-1] == 2
    assert {r["stage"] for r in rows(tmp_path / "metrics.jsonl")} == {"warm_start"}


BETA = {"terms__diffu_grpo__beta": 0.5, "terms__dispo__beta": 0.5}


@pytest.mark.slow
def test_the_reference_of_an_adapter_is_the_base_it_started_from(tmp_path, monkeypatch):
    made = recipe.build(config())
    params = models.init(made.model, jax.random.key(3))["params"]
    weights.save_weights(tmp_path / "weights", made.model, params)
    seen = []

    class Watched(Held):
        def __init__(self, *args):
            super().__init__(*args)
            seen.append(self)

    monkeypatch.setattr(trainer, "Held", Watched)
    run(
        tmp_path / "run",
        None,
        model__init_from=str(tmp_path / "weights"),
        model__lora_rank=4,
        warm_start__steps=0,
        optimizer__learning_rate=1e-2,
        **BETA,
    )
    lines = [r for r in rows(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert lines[0]["kl"] == lines[0]["dispo/kl"] == 0
    assert lines[-1]["kl"] > 0
    for a, b in zip(jax.tree.leaves(seen[0].frozen), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    trained = _last_state(tmp_path / "run").trainable
    names = [parallel.path_name(path) for path, _ in jax.tree.leaves_with_path(trained)]
    assert {name.rpartition("/")[2] for name in names} == {"a", "b"}
    assert any(
        np.any(leaf)
        for n, leaf in zip(names, jax.tree.leaves(trained), strict=True)
        if n.endswith("/b")
    )


def _last_state(workdir):
    options = json.loads((workdir / "config.json").read_text())["config"]
    made = recipe.build(options)
    mesh = parallel.make_mesh(**made.mesh)
    trainable, _ = trainer.initial_weights(made, mesh)
    state = stages.Reinforce(made, mesh, Held(made, mesh)).init(trainable)
    found = Checkpoints(workdir / "checkpoints" / "rl").restore(state)
    assert found is not None
    return found[1]
