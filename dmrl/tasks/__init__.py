"""Tasks: prompt, answer extraction and reward. Pure Python and numpy, no jax.

A task is a module with a frozen dataclass `Task`, chosen by the module's name; there is no
registry. The fields of the dataclass are the task's options.
"""

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

BLANK = "_"
"""Marks the positions of a completion template that the model fills."""


@runtime_checkable
class Task(Protocol):
    """What every task offers. Examples are the task's own, opaque to the caller."""

    @property
    def alphabet(self) -> str:
        """The characters a character tokenizer needs for prompts and answers."""

    @property
    def grid(self) -> list[list[int]] | None:
        """If a completion is a board: which positions are its cells, row by row. Else None.

        A board may also have `units` (see `dmrl.trace.Ruled`): its cells that must differ.
        """

    def examples(self, split: str) -> Sequence[Any]:
        """The examples of 'train', 'validation', 'test' or a further split of the task.

        The same on every call. Raises ValueError for an unknown split.
        """

    def prompt(self, example: Any) -> str:
        """The text of the user's turn."""

    def template(self, example: Any) -> str | None:
        """The completion with BLANK where the model fills; None when all positions are free."""

    def answer(self, example: Any) -> str | None:
        """A completion that earns full reward, for supervised stages; None if none is known."""

    def score(self, example: Any, completion: str) -> dict[str, float]:
        """'reward' and the task's metrics, always the same keys, all finite.

        Never raises and returns within 50 ms, whatever the completion holds.
        """


def load(name: str, **options: Any) -> Task:
    """The task `name` with these options.

    Args:
      name: a module of this package ("sudoku"), or the dotted path of a module of your own.
      options: fields of the module's `Task` dataclass; what is left out keeps its default.

    Raises:
      ValueError: for an unknown task, option or option value, with what would be right.
    """
    path = name if "." in name else f"{__name__}.{name}"
    module: Any = None
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise  # the task exists, but a package that it imports is missing
    if not hasattr(module, "Task"):
        raise ValueError(f"no task {name!r}{_choices(name, names())}")
    known = [field.name for field in dataclasses.fields(module.Task)]
    for option in options:
        if option not in known:
            raise ValueError(f"task {name!r} has no option {option!r}{_choices(option, known)}")
    return cast(Task, module.Task(**options))


def names() -> list[str]:
    """The tasks of this package, sorted."""
    modules = (info.name for info in pkgutil.iter_modules(__path__))
    return [m for m in modules if hasattr(importlib.import_module(f"{__name__}.{m}"), "Task")]


def _choices(word: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} choose from {', '.join(known)}"
