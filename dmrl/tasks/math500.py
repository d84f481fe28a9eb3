r"""MATH: competition problems with answers in LaTeX (arXiv 2103.03874), tested on MATH-500.

The published reward (d1, shared by SPG, wd1 and EOSER) is 2 for the right answer and up to 1
for a box in an answer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dmrl.tasks import equality, latex, parsers, problems, traces
from dmrl.tasks.answers import answer_or_box, finished, open_answer, rendered
from dmrl.tasks.mathematics import Mathematics
from dmrl.tasks.options import divided, shots_of

_INSTRUCTION = "You are a math expert. You will be given a question to solve. Solve it step by \
step. Wrap the final answer in a \\boxed{}. "

_APPENDED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
"""What some copies of the data append to every problem."""


class Example(NamedTuple):
    """A problem, its answer in LaTeX, and a worked solution ('' if unknown)."""

    question: str
    answer: str
    solution: str = ""


@dataclass(frozen=True)
class Task(Mathematics):
    """MATH; files math500/train.jsonl and test.jsonl, with fields problem (or prompt), answer and
    solution (one of these two may be missing).

    Splits:
      train, validation: the rows of math500/train.jsonl; `held_out_size` of them, drawn by
        `split_seed`, are validation and the rest is train.
      test: the 500 problems of MATH-500.
    """

    @property
    def published(self) -> str:
        """The folder of the published files."""
        return "math500"

    def easy(self) -> Iterable[dict[str, Any]]:
        """The rows of the source of that name."""
        return problems.math500()

    def examples(self, split: str) -> Sequence[Example]:
        """The problems of a split; the same on every call.

        Raises:
          ValueError: for an unknown split, without a data directory, or for a malformed line.
          FileNotFoundError: when the file is not there.
        """
        return divided(self, split, _example)

    def truth(self, example: Example) -> Any:
        """What `recorded` makes the example of again, beside its prompt: its answer in LaTeX."""
        return example.answer

    def recorded(self, question: str, truth: Any) -> Example:
        """The example of a saved generation: its question and its answer in LaTeX."""
        return Example(question, str(truth))

    def prompt(self, example: Example) -> str:
        """The problem in the task's style, after worked examples."""
        shots = [(e.question, self.answer(e)) for e in shots_of(self, self.shots, self.split_seed)]
        return rendered(self.style, _INSTRUCTION, example.question, shots)

    def answer(self, example: Example) -> str:
        """The worked solution and the boxed answer, as the style asks for them."""
        box = rf"\boxed{{{example.answer}}}"
        if self.style == "compact":
            return example.solution if latex.has_box(example.solution) else box
        return f"<reasoning>\n{example.solution}\n</reasoning>\n<answer>\n{box}\n</answer>\n"

    def trace(self, example: Example) -> traces.Pieces | None:
        """The answer in pieces; what reasons up to the box may be given away."""
        return traces.around(self.answer(example), example.solution, example.answer)

    def score(self, example: Example, completion: str) -> dict[str, float]:
        r"""The published reward, its parts and both verdicts.

        Returns:
          reward: correct + format, at most 3, or `solved`.
          correct: 2.0 for the right answer: under 'paper' if solved, else by the string rule
            on the last box.
          format: 0.5 for an `<answer>`, and 0.5 for a box in it (0.25 without).
          solved: 1.0 for an equal answer; under 'd1' and 'spg' as the authors' evaluation
            script finds it, which is what they report.
          string: the same by the string rule alone.
          answered: 1.0 if there is an answer to read.
        """
        if self.protocol == "paper":
            text = finished(completion)
            found, form = self._written(text), self._format(text)
            string = found is not None and latex.same(found, example.answer)
            solved = string or (found is not None and self._equal(example.answer, found))
            right = solved
        else:
            found = parsers.math(completion)
            form = _slipped_format(completion)
            string = solved = found is not None and latex.same(found, example.answer)
            rewarded = latex.boxed(completion)
            right = latex.same(completion if rewarded is None else rewarded, example.answer)
        reward = 2.0 * right + form
        return {
            "reward": self.chosen(reward, float(solved)),
            "correct": 2.0 * right,
            "format": form,
            "solved": float(solved),
            "string": float(string),
            "answered": float(bool(found)),
        }

    def _written(self, text: str) -> str | None:
        """The answer: the last box in the last `<answer>`, that answer, or the last box."""
        if self.style == "compact":
            return latex.opened(text) if latex.has_box(text) else None
        written = answer_or_box(text)
        return latex.opened(written) if written else None

    def _format(self, text: str) -> float:
        answer = open_answer(text)
        box = r"\boxed" in (text if answer is None else answer)
        return 0.5 * (answer is not None) + (0.5 if box else 0.25)

    def _equal(self, truth: str, answer: str) -> bool:
        return self.equality == "verify" and equality.equal(truth, answer)


def _slipped_format(completion: str) -> float:
    r"""As coded: `"\boxed"` without a raw string is a backspace and `oxed`."""
    _, tag, rest = completion.partition("<answer>")
    inside = rest.partition("<answer>")[0].partition("</answer>")[0] if tag else completion
    return 0.5 * bool(tag) + (0.5 if "\boxed" in inside else 0.25)


def _example(row: dict[str, Any]) -> Example:
    question = row.get("problem", row.get("prompt", "")).removesuffix(_APPENDED)
    solution = row.get("solution", "")
    answer = row.get("answer") or latex.boxed(solution)
    if not question or not answer:
        raise ValueError(
            f"row {str(row)[:80]!r} lacks a problem (or prompt), or both an answer and a solution"
        )
    return Example(question, answer, solution)
