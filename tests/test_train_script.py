"""launch/train.py: what a user sees, above all when something is wrong."""

import importlib.util
import sys
import types

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags
from running import RECIPE, ROOT, arguments, config, finish, start

from configs import command_line
from dmrl import heap, processes, trainer

# ml_collections loads recipes the old way; on Python 3.12 it does not.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def parse(monkeypatch, *options, recipe=RECIPE):
    """The recipe's config as a command line with these options gives it."""
    argv = ["train.py", f"--config={recipe}", *options]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", None, flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.chdir(ROOT)
    assert command_line.parse(argv) == ["train.py"]
    return holder.value


def test_options_change_the_recipe(monkeypatch):
    found = parse(
        monkeypatch,
        "--config.steps=7",
        "--config.optimizer.learning_rate=1",
        "--config.evaluation.steps=(2,4)",
        "--workdir=x",
    )
    assert (found.steps, found.optimizer.learning_rate) == (7, 1.0)
    assert found.evaluation.steps == (2, 4)
    assert parse(monkeypatch, recipe=f"{RECIPE}:llada_8b").model.d_model == 4096


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--config.stepz=1", "no option --config.stepz; did you mean --config.steps?"),
        ("--config.optimizer.lr=1", "no option --config.optimizer.lr; there are optimizer.b1, "),
        ("--config.learning_rate=1", "did you mean --config.optimizer.learning_rate?"),
        ("--config.optimiser.b1=1", "did you mean --config.optimizer.b1?"),
        ("--config.terms.dispo.fil=3", "did you mean --config.terms.dispo.fillings?"),
        ("--config.zzz=1", "no option --config.zzz; there are checkpoint_every, "),
        ("--config.steps=many", "flag --config.steps=many: invalid literal for int()"),
        ("--config.seed.deep=1", "no option --config.seed.deep"),
        ("--confg.steps=3", "Unknown command line flag 'confg.steps'"),
        ("--worksir=x", "Unknown command line flag 'worksir'. Did you mean: workdir"),
    ],
)
def test_a_mistaken_option_costs_one_line(monkeypatch, option, message):
    with pytest.raises(SystemExit) as left:
        parse(monkeypatch, "--config.steps=3", option)
    assert message in left.value.code
    assert left.value.code.startswith("error: ")
    assert "\n" not in left.value.code


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (f"{RECIPE}:tinny", "no preset 'tinny': choose one of tiny, llada_8b"),
        ("configs/sudok.py", "No such file or directory: 'configs/sudok.py'"),
    ],
)
def test_a_mistaken_recipe_costs_one_line(monkeypatch, recipe, message):
    with pytest.raises(SystemExit) as left:
        parse(monkeypatch, recipe=recipe)
    assert message in left.value.code
    assert "\n" not in left.value.code


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--config.stepz=1"], ["--config.stepz", "--config.steps?"]),
        (["--config.sampling.block_length=5"], ["block_length=5", "[1, 2, 4, 8, 16"]),
        (["--config.mesh.data=2"], ["mesh data=2", "the 1 devices"]),
    ],
)
def test_the_script_itself_fails_in_one_line_and_leaves_nothing(tmp_path, options, words):
    _, err = finish(start(f"--workdir={tmp_path / 'run'}", *arguments(), *options), code=1)
    (line,) = err.strip().splitlines()
    for word in words:
        assert word in line
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def script():
    """launch/train.py as a module."""
    path, before = ROOT / "launch" / "train.py", list(sys.path)
    spec = importlib.util.spec_from_file_location("launch_train", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    for name in ("config", "workdir"):
        delattr(flags.FLAGS, name)
    return module


@pytest.mark.parametrize(
    "error", [trainer.NotFiniteError("rl step 3: loss is nan"), OSError("disk full")]
)
def test_a_failed_run_says_why_in_one_line(script, monkeypatch, tmp_path, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(trainer, "train", fail)
    monkeypatch.setattr(processes, "join", lambda: None)  # this process has used jax already
    asked: list[bool] = []
    monkeypatch.setattr(heap, "keep_pages", lambda: asked.append(True))
    monkeypatch.setattr(script, "CONFIG", types.SimpleNamespace(value=ConfigDict(config())))
    monkeypatch.setattr(script, "WORKDIR", types.SimpleNamespace(value=str(tmp_path)))
    with pytest.raises(SystemExit) as left:
        script.main(["train.py"])
    assert left.value.code == f"error: {error}"
    assert asked == [True]


@pytest.mark.parametrize(
    ("recipe", "workdir"),
    [(RECIPE, "runs/sudoku_dispo"), (f"{RECIPE}:llada_8b", "runs/sudoku_dispo-llada_8b")],
)
def test_the_default_workdir_is_named_after_the_recipe(script, monkeypatch, recipe, workdir):
    parse(monkeypatch, recipe=recipe)
    monkeypatch.setattr(script.flags, "FLAGS", flags.FLAGS)
    assert str(script.default_workdir()) == workdir
