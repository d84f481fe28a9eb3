"""The base of a task of your own: a file of rows and a reward (docs/your_task.md)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dmrl.tasks.answers import FreeText
from dmrl.tasks.options import at_least, divided, source_of_rows


@dataclass(frozen=True)
class RowTask(FreeText):
    """Rows with a field `prompt`, perhaps `answer` (a completion that earns full reward, for a
    warm start) and `template` (the completion with _ where the model fills).

    A subclass named `Task` gives `source` a default and defines `reward`. Its further fields are
    options of a config.
    """

    source: str = ""
    """`jsonl:PATH`, `hf:NAME[/CONFIG][:SPLIT]` or `tfds:NAME` (see `dmrl.sources`). Splits that
    the data lacks are cut from its 'train'."""
    held_out_size: int = 64
    """Rows in 'validation' and 'test' where these are cut from 'train'."""
    split_seed: int = 0
    """Draws them."""
    solved_from: float = 1.0
    """The least reward with which a completion counts as `solved`."""

    def __post_init__(self) -> None:
        source_of_rows(self.source, "jsonl:PATH")
        at_least("held_out_size", self.held_out_size, 1)
        at_least("split_seed", self.split_seed, 0)

    def reward(self, row: Mapping[str, Any], completion: str) -> float:
        """What a completion earns; `row` is all of its line."""
        raise NotImplementedError(f"{type(self).__module__}.Task defines no method `reward`")

    def examples(self, split: str) -> Sequence[dict[str, Any]]:
        """The rows of a split; the same on every call. Raises as `dmrl.tasks.options.divided`."""
        return divided(self, split, dict, ("prompt",))

    def prompt(self, example: Mapping[str, Any]) -> str:
        """The field of that name."""
        return str(example["prompt"])

    def template(self, example: Mapping[str, Any]) -> str | None:
        """The field of that name; None without one."""
        return example.get("template")

    def answer(self, example: Mapping[str, Any]) -> str | None:
        """The field of that name; None without one."""
        return example.get("answer")

    def score(self, example: Mapping[str, Any], completion: str) -> dict[str, float]:
        """`reward`, and `solved`, 1.0 from `solved_from` on.

        Raises:
          ValueError: the reward is not a finite number.
        """
        reward = float(self.reward(example, completion))
        if not math.isfinite(reward):
            raise ValueError(f"reward {reward} of {completion!r} is not a finite number")
        return {"reward": reward, "solved": float(reward >= self.solved_from)}
