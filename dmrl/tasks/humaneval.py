"""HumanEval: complete a Python function from its signature and description (arXiv 2107.03374).

164 problems, all of them a test: there is nothing to train or choose on. Programs run in
`dmrl.sandbox`, where the tests see them as functions from plain data to plain data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dmrl import sandbox
from dmrl.tasks import programs
from dmrl.tasks.answers import FreeText
from dmrl.tasks.options import one_of, rows


class Example(NamedTuple):
    """The opening of a program, the function's name, the tests and a solution's body."""

    opening: str
    entry: str
    test: str
    solution: str = ""


@dataclass(frozen=True)
class Task(FreeText):
    """HumanEval. One split, 'test'."""

    allow_code: bool = False
    """Must be True: this task runs programs that a model wrote."""
    style: str = "published"
    """'published': d1's format, the program fenced inside <answer>. 'compact': the opening
    alone; the completion continues it or is a fenced program."""
    seconds: float = 5.0
    """Wall-clock time of a program with its tests; near it, verdicts depend on the machine."""
    memory: int = 1 << 30
    """Bytes of address space of a program."""
    confinement: str = "namespaces"
    """See `dmrl.sandbox.Limits`."""
    data_dir: str | None = None
    """Directory holding humaneval/HumanEval.jsonl.gz; default $DMRL_DATA."""

    def __post_init__(self) -> None:
        programs.allow(self.allow_code)
        one_of("style", self.style, ("published", "compact"))
        one_of("confinement", self.confinement, sandbox.CONFINEMENTS)

    def examples(self, split: str) -> Sequence[Example]:
        """The problems.

        Raises:
          ValueError: for a split other than 'test', or without a data directory.
          FileNotFoundError: when the file is not there.
        """
        one_of("split", split, ("test",))
        fields = ("prompt", "entry_point", "test", "canonical_solution")
        found = rows(self.data_dir, "humaneval/HumanEval.jsonl.gz", fields)
        return [Example(*(row[field] for field in fields)) for row in found]

    def prompt(self, example: Example) -> str:
        """The opening, in the published style with the format and what to do."""
        return programs.prompt(self.style, example.opening)

    def template(self, example: Example) -> str | None:
        """None: the model fills every position."""
        return None

    def answer(self, example: Example) -> str:
        """The known solution."""
        return programs.answer(self.style, example.opening + example.solution)

    def score(self, example: Example, completion: str) -> dict[str, float]:
        """See `dmrl.tasks.programs.score`; HumanEval's tests of a problem count as one check."""
        functions = {"candidate": example.entry, example.entry: example.entry}
        setup = f"{example.opening}    pass\n{example.test}"
        tests = sandbox.Tests(setup, functions, ["check(candidate)"])
        limits = sandbox.Limits(self.seconds, self.memory, confinement=self.confinement)
        return programs.score(completion, example.opening, example.entry, tests, limits)
