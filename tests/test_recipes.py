"""Every recipe: all presets build, and the tiny one of every method takes real steps."""

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from running import TINY, rows, timeless

from dmrl import recipe, trainer

FOLDER = Path(__file__).parent.parent / "configs"
NAMES = sorted(
    p.stem for p in FOLDER.glob("*.py") if p.stem not in ("__init__", "common", "command_line")
)
SMALL = TINY | {
    "num_generations": 4,
    "steps": 2,
    "checkpoint_every": 1,
    "warm_start.steps": 0,
    "imitation.steps": 0,
    "evaluation.every": 0,
    # Few empty cells: a policy that knows nothing is right often enough to tell rewards apart.
    "task.blanks": (2, 4),
}
"""Of every method's recipe, so that it trains in seconds."""


def module(name):
    return importlib.import_module(f"configs.{name}")


def presets(name):
    """The presets' names, as the error for a wrong one lists them."""
    with pytest.raises(ValueError, match="choose one of") as said:
        module(name).get_config("none")
    return str(said.value).rpartition("choose one of ")[2].split(", ")


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_builds_and_says_where_it_comes_from(name):
    found = presets(name)
    assert found[0] == "tiny"
    for preset in found:
        made = recipe.build(module(name).get_config(preset).to_dict())
        assert made.terms
    text = module(name).__doc__
    assert "arXiv" in text or "our own" in text, "say the source in the docstring"
    assert f"--config=configs/{name}.py" in text
    if len(found) > 1:
        assert f"--config=configs/{name}.py:{found[1]}" in text
        assert "Not run here" in " ".join(text.split())


def small(name, **overrides):
    made = module(name).get_config("tiny")
    made.update_from_flattened_dict(SMALL | {k.replace("__", "."): v for k, v in overrides.items()})
    for term in made.terms.values():
        if "block_length" in term:
            term.block_length = 16
        if "steps" in term:
            term.steps = made.sampling.steps
    if made.phase_steps:
        made.phase_steps = 1
    return made.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n != "sudoku_dispo"])
@pytest.mark.usefixtures("compile_once")
def test_the_tiny_recipe_trains(name, tmp_path):
    values = small(name)
    trainer.train(recipe.build(values), tmp_path, values)
    steps = [r for r in rows(tmp_path / "metrics.jsonl") if "grad_norm" in r]
    assert [r["step"] for r in steps] == [1, 2]
    assert all(math.isfinite(r["loss"]) for r in steps)
    assert max(r["grad_norm"] for r in steps) > 1e-6, "no gradient in two steps"


@pytest.mark.slow
@pytest.mark.usefixtures("compile_once")
def test_a_learned_log_z_is_trained_and_kept_but_is_no_part_of_the_weights(tmp_path):
    values = small("trafl", terms__trafl__log_z="learned", steps=3)
    made = recipe.build(values)
    trainer.train(made, tmp_path, values)
    lines = [r for r in rows(tmp_path / "metrics.jsonl") if "log_z" in r]
    assert lines[0]["log_z"] == 0, "the head starts at 0"
    assert lines[-1]["log_z"] != 0
    stored = json.loads((tmp_path / "weights" / "model.json").read_text())
    assert "log_z" not in json.dumps(stored)
    before = timeless(rows(tmp_path / "metrics.jsonl"))
    trainer.train(made, tmp_path, values)  # the head is in the checkpoint: nothing to do
    assert timeless(rows(tmp_path / "metrics.jsonl")) == before


class Killed(Exception):
    """The run ends here."""


@pytest.mark.slow
@pytest.mark.usefixtures("compile_once")
def test_a_run_with_phases_resumes_bit_for_bit(tmp_path, monkeypatch):
    """Killed within a phase: teacher, average and Adam come back from the checkpoint."""
    overrides = {"steps": 5, "ema": 0.5}
    values = small("dtm", **overrides) | {"phase_steps": 2}
    made = recipe.build(values)
    trainer.train(made, tmp_path / "whole", values)
    save = trainer._StageRun.save

    def save_and_die(self):
        save(self)
        if self.number == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trainer._StageRun, "save", save_and_die)
        with pytest.raises(Killed):
            trainer.train(made, tmp_path / "cut", values)
    trainer.train(made, tmp_path / "cut", values)
    whole, cut = (timeless(rows(tmp_path / d / "metrics.jsonl")) for d in ("whole", "cut"))
    assert cut == whole
    rates = [r["learning_rate"] for r in whole if "learning_rate" in r]
    assert rates[0] == rates[2] == rates[4] == 0, "the schedule starts again with every phase"
    assert rates[1] == rates[3] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("compile_once")
def test_all_wrong_groups_are_rescued_by_right_answers(tmp_path):
    values = small("igpo", steps=4, prompts_per_step=16, task__reward="board", completions_every=1)
    trainer.train(recipe.build(values), tmp_path, values)
    steps = [r for r in rows(tmp_path / "metrics.jsonl") if "rescued" in r]
    assert sum(r["rescued"] for r in steps) > 0
    for number, step in enumerate(steps, 1):
        done = [r["reward"] for r in rows(tmp_path / "completions.jsonl") if r["step"] == number]
        groups = np.array(done).reshape(-1, 4)
        assert step["reward"] == pytest.approx(np.mean(done))
        # Half of a group at most is replaced, so one that was all wrong has at most two right.
        rescued = step["rescued"] * groups.size
        assert rescued <= 2 * np.sum(groups.any(axis=1))
        assert np.sum(groups) >= rescued, "only right completions take a wrong one's place"


def test_a_rescue_and_probes_exclude_each_other():
    values = small("igpo")
    values["terms"] = {"dispo": module("sudoku_dispo").get_config().terms.dispo.to_dict()}
    with pytest.raises(ValueError, match=r"rescue.fraction=0.5 replaces .* dispo has probed"):
        recipe.build(values)


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("trafl", "terms__trafl__group_size", "group_size=3, but num_generations=4"),
        ("vrpo", "terms__vrpo__group_size", "group_size=3, but num_generations=4"),
        ("spg", "sampling__block_length", "block_length=16, but sampling.block_length=8"),
        ("dtm", "sampling__block_length", "block_length=16, but sampling.block_length=8"),
    ],
)
def test_options_that_repeat_another_must_agree(name, option, message):
    with pytest.raises(ValueError, match=message):
        recipe.build(small(name, **{option: 3 if "group" in option else 8}))


@pytest.mark.parametrize(("ema", "phase_steps"), [(0.9, 0), (1.0, 2), (0.0, -1)])
def test_phases_that_cannot_be_are_refused(ema, phase_steps):
    with pytest.raises(ValueError, match=f"ema={ema} with phase_steps={phase_steps}"):
        recipe.build(small("dtm") | {"ema": ema, "phase_steps": phase_steps})
