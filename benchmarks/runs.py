"""What the benchmarks of whole training runs share: reading workdirs, intervals over seeds."""

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs import common
from dmrl import policy, stages, trainer
from dmrl.held import Held
from dmrl.recipe import Recipe

SETTINGS = ("sampled_4", "greedy_16", "greedy_8", "greedy_4")
"""How held-out boards are decoded in the tiny Sudoku setting."""
HEADINGS = ("sampled, 4 steps", "16 steps", "8 steps", "4 steps")
_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""97.5% points of Student's t for n - 1 degrees of freedom."""


def step_lines(path: Path, stage: str = "rl") -> list[dict[str, float]]:
    """The step lines of a stage."""
    lines = [json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if x["stage"] == stage and "step_time" in x]


def median_step(path: Path, stage: str = "rl") -> float:
    """Median seconds of a stage's steps."""
    return float(np.median([x["step_time"] for x in step_lines(path, stage)]))


def seconds(path: Path) -> float:
    """Median seconds of a step of stage 2, times its steps: compilation does not count."""
    return median_step(path) * len(step_lines(path))


def reward_calls(path: Path) -> int:
    """Completions and fillings that were scored in stage 2."""
    return int(sum(x.get("reward_calls", 0) for x in step_lines(path)))


def half_width(values: Sequence[float]) -> float:
    """Half of the 95% t-interval of the mean; NaN for one value.

    Raises:
      ValueError: more values than the table of t has.
    """
    if len(values) == 1:
        return float("nan")
    if len(values) not in _T:
        raise ValueError(f"{len(values)} seeds: the table of t has {min(_T)} to {max(_T)}")
    return _T[len(values)] * float(np.std(values, ddof=1)) / len(values) ** 0.5


def copy_warm_start(source: Path, target: Path) -> None:
    """Empties `target` and lets it begin with the warm start of `source`."""
    shutil.rmtree(target, ignore_errors=True)
    place = Path("checkpoints") / "warm_start"
    shutil.copytree(source / place, target / place)


def config_of(path: Path) -> dict[str, Any]:
    """The resolved config of a run; a section that is younger than the run as in any tiny recipe.

    Raises:
      ValueError: this is no run's folder.
    """
    told = policy.config(str(path))
    if told is None:
        raise ValueError(f"{path} is no run's folder: it has no config.json")
    return {**common.tiny_sudoku({}).to_dict(), **told}


def warm_started(made: Recipe, mesh: Any, held: Held, path: Path) -> Any:
    """The weights that the warm start in workdir `path` left; sets `held.frozen`.

    Raises:
      FileNotFoundError: it has no checkpoint of one.
    """
    trainable, held.frozen = trainer.initial_weights(made, mesh)
    warm = stages.WarmStart(made, mesh, held).init(trainable)
    place = path / "checkpoints" / "warm_start"
    with contextlib.closing(trainer.Checkpoints(place)) as kept:
        found = kept.restore(warm)
    if found is None:
        raise FileNotFoundError(f"{place} holds no checkpoint")
    return found[1].trainable
