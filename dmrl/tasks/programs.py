"""What the code tasks share: finding the program in a completion, and its reward.

The published reward (KodCode's, as d1 and SPG use it) is 0.5 for a program inside `<answer>`
and the fraction of tests that pass. Their code refuses programs that name modules such as os
or sys; here the sandbox shuts programs in, so that none has to be refused.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from dmrl import sandbox
from dmrl.tasks.answers import FORMAT, finished, last_answer

INSTRUCTION = "You are a coding expert. You will be given a coding problem to solve. Solve it \
step by step. Put your program, in Python, between ```python and ``` in the answer."


class Program(NamedTuple):
    """A program and whether it stood inside `<answer>`."""

    code: str
    answered: bool


def found(completion: str) -> Program | None:
    """The first fenced program of the last closed `<answer>`, or of the whole text.

    A text without any fence is a program itself where it looks like one (it defines or
    returns something); else None.
    """
    text = finished(completion)
    answer = last_answer(text)
    for place, inside in ((answer, True), (text, False)):
        fence = _first_fence(place) if place else None
        if fence is not None:
            return Program(fence, inside)
    bare = text if answer is None else answer
    if "```" not in bare and re.search(r"^\s*(?:def|return|import|from)\b", bare, re.MULTILINE):
        return Program(bare, answer is not None)
    return None


def _first_fence(text: str) -> str | None:
    opening = re.search(r"```(?:python|py)?[ \t]*\n", text)
    if opening is None:
        return None
    code, closing, _ = text[opening.end() :].partition("```")
    return code if closing else None


def prompt(style: str, question: str, shots: Sequence[tuple[str, str]] = ()) -> str:
    """The user's turn: the question, in the published style with d1's format.

    Args:
      shots: worked examples that come before it, (question, program).
    """
    told = "".join(f"{asked}\n{answer(style, code)}\n\n" for asked, code in shots)
    if style == "compact":
        return told + question
    return f"{FORMAT}\n\n{INSTRUCTION}\n\n{told}{question}"


def answer(style: str, code: str) -> str:
    """A completion that holds `code`."""
    fenced = f"```python\n{code}\n```"
    return fenced if style == "compact" else f"<answer>\n{fenced}\n</answer>"


def score(
    completion: str, prefix: str, entry: str, tests: sandbox.Tests, limits: sandbox.Limits
) -> dict[str, float]:
    """The published reward and its parts.

    Args:
      prefix: what goes before a program that does not define `entry` (the prompt's opening).

    Returns:
      reward: 0.5 * answered + passed, at most 1.5.
      answered: 1.0 for a program inside `<answer>`.
      passed: fraction of the checks that pass.
      solved: 1.0 if all pass.
      ended: 1.0 unless the time was up or the tests broke off.
    """
    program = found(completion)
    passed, ended = 0.0, 1.0
    if program is not None:
        whole = re.search(rf"^\s*(?:async\s+)?def\s+{re.escape(entry)}\b", program.code, re.M)
        code = program.code if whole else prefix + program.code
        verdict = sandbox.run(_clean(code), tests, limits)
        passed, ended = verdict.passed / verdict.total, float(not verdict.reason)
    answered = float(program is not None and program.answered)
    return {
        "reward": 0.5 * answered + passed,
        "answered": answered,
        "passed": passed,
        "solved": float(passed == 1.0),
        "ended": ended,
    }


def _clean(code: str) -> str:
    """Without what cannot be sent or compiled: lone surrogates."""
    return code.encode(errors="replace").decode()


def allow(value: bool) -> None:
    """Raises ValueError unless running programs of a model was allowed in the config."""
    if not value:
        raise ValueError(
            "allow_code=False: this task runs programs that a model wrote; set allow_code=True "
            "to run them in the sandbox (see docs/protocol.md)"
        )
