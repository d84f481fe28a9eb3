"""Short programs with tests: MBPP (arXiv 2108.07732), and rows of the same kind (KodCode).

A row of the files has a description (`text`, `prompt` or `question`), a solution (`code` or
`solution`) and tests: `test_list`, statements that call the function by name, or `test`, a
file with `from solution import NAME` and functions `test_*`.
"""

import builtins
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dmrl import sandbox
from dmrl.tasks import programs
from dmrl.tasks.answers import FreeText
from dmrl.tasks.options import at_least, divided, one_of, shots_of, source_of_rows


class Example(NamedTuple):
    """A description, the function's name, what runs before the tests, and the tests."""

    question: str
    entry: str
    setup: str
    checks: tuple[str, ...]
    solution: str = ""


@dataclass(frozen=True)
class Task(FreeText):
    """MBPP and its kind.

    Splits:
      train, validation: the rows of FOLDER/train.jsonl; `held_out_size` of them, drawn by
        `split_seed`, are validation and the rest is train.
      test: the rows of FOLDER/test.jsonl.
    """

    allow_code: bool = False
    """Must be True: this task runs programs that a model wrote."""
    style: str = "published"
    """'published': d1's format, the program fenced inside <answer>. 'compact': the
    description alone; the completion is a fenced program."""
    folder: str = "mbpp"
    """Of the files, below `data_dir`."""
    shown: int = 1
    """Tests that the prompt shows, as in MBPP's own prompts, which show all three."""
    shots: int = 0
    """Worked problems in the prompt, from train."""
    seconds: float = 5.0
    """Wall-clock time of a program with its tests; near it, verdicts depend on the machine."""
    memory: int = 1 << 30
    """Bytes of address space of a program."""
    confinement: str = "namespaces"
    """See `dmrl.sandbox.Limits`."""
    split_seed: int = 0
    """Draws validation."""
    held_out_size: int = 64
    """Rows in 'validation'."""
    source: str = "published"
    """'published': the files below `data_dir`. Or `jsonl:PATH`, `hf:NAME[/CONFIG][:SPLIT]`,
    `tfds:NAME` (see `dmrl.sources`), with the same fields."""
    data_dir: str | None = None
    """Directory holding FOLDER/train.jsonl and test.jsonl; default $DMRL_DATA."""

    def __post_init__(self) -> None:
        programs.allow(self.allow_code)
        one_of("style", self.style, ("published", "compact"))
        one_of("confinement", self.confinement, sandbox.CONFINEMENTS)
        source_of_rows(self.source, "published")
        at_least("shown", self.shown, 0)
        at_least("shots", self.shots, 0)
        at_least("split_seed", self.split_seed, 0)
        at_least("held_out_size", self.held_out_size, 1)

    @property
    def published(self) -> str:
        """The folder of the published files."""
        return self.folder

    def examples(self, split: str) -> Sequence[Example]:
        """The rows of a split; the same on every call.

        Raises:
          ValueError: for an unknown split, without a data directory, or for a row without a
            description or tests.
          FileNotFoundError: when the file is not there.
        """
        return divided(self, split, _example)

    def prompt(self, example: Example) -> str:
        """The description and the tests that are shown, after worked problems."""
        worked = shots_of(self, self.shots, self.split_seed)
        if not all(shot.solution for shot in worked):
            raise ValueError(f"shots={self.shots}: some of the rows drawn have no solution to show")
        shots = [(self._asked(shot), shot.solution) for shot in worked]
        return programs.prompt(self.style, self._asked(example), shots)

    def _asked(self, example: Example) -> str:
        shown = "\n".join(example.checks[: self.shown])
        tests = f"\n\nYour program must pass:\n{shown}" if shown else ""
        return f"{example.question}{tests}\n"

    def template(self, example: Example) -> str | None:
        """None: the model fills every position."""
        return None

    def answer(self, example: Example) -> str | None:
        """The known solution; None where the row has none."""
        return programs.answer(self.style, example.solution) if example.solution else None

    def score(self, example: Example, completion: str) -> dict[str, float]:
        """See `dmrl.tasks.programs.score`; every test counts."""
        tests = sandbox.Tests(example.setup, {example.entry: example.entry}, example.checks)
        limits = sandbox.Limits(self.seconds, self.memory, confinement=self.confinement)
        return programs.score(completion, "", example.entry, tests, limits)


def _example(row: dict[str, Any]) -> Example:
    question = str(row.get("text") or row.get("prompt") or row.get("question") or "")
    solution = row.get("code") or row.get("solution") or ""
    if question and row.get("test_list"):
        checks = tuple(row["test_list"])
        setup = "\n".join([*row.get("test_imports", []), row.get("test_setup_code", "")])
        called = re.findall(r"\b([A-Za-z_]\w*)\s*\(", " ".join(checks))
        entry = next((c for c in called if re.search(rf"\bdef\s+{c}\b", solution)), None)
        entry = entry or next((c for c in called if c not in dir(builtins)), "")
    elif question and row.get("test"):
        setup = row["test"]
        checks = tuple(f"{name}()" for name in re.findall(r"^def (test_?\w*)\(\):", setup, re.M))
        entry = next(iter(re.findall(r"from solution import (\w+)", setup)), "")
    else:
        checks, entry = (), ""
    if not checks or not entry:
        raise ValueError(
            f"row {str(row)[:80]!r} lacks a description, or test_list or test that call a function"
        )
    return Example(question, entry, setup, checks, solution)
