r"""GSM8K: grade-school word problems whose answers are whole numbers (arXiv 2110.14168).

The published reward (d1, shared by SPG, wd1 and EOSER) is 2 for the right number and up to 2
more for the format.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from dmrl.tasks import equality, latex, parsers, problems, tags, traces
from dmrl.tasks.answers import answer_or_box, finished, rendered
from dmrl.tasks.mathematics import Mathematics
from dmrl.tasks.options import divided, rows, shots_of

_INSTRUCTION = "You are a math expert. You will be given a question to solve. Solve it step by \
step. Wrap the final answer in a \\boxed{}. "
"""With which d1's evaluation prompt begins; the training prompt has none."""

_WHOLE = re.compile(r"-?[0-9]+")
_DECIMAL = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?:\\!|\s)?(?=[0-9]{3}(?![0-9]))")
_FORMULA = re.compile(r"\\[dt]?frac|\\sqrt|\\times|\\cdot|\\div|\^|[0-9)}] *[-*/+] *[0-9({\\]")
_WORDS = re.compile(r"\\text\{([^{}]*)\}")
_DIGITS = 40
"""More digits than this are no answer to a word problem."""


_FIELDS = ("question", "answer")


class Example(NamedTuple):
    """A question, its answer (digits, perhaps a sign) and a worked solution ('' if unknown)."""

    question: str
    answer: str
    solution: str = ""


@dataclass(frozen=True)
class Task(Mathematics):
    """GSM8K; files gsm8k/train.jsonl and test.jsonl, with fields question and answer.

    Splits:
      train, validation: the published training questions; `held_out_size` of them, drawn by
        `split_seed`, are validation and the rest is train.
      test: the published test questions, all 1,319.
    """

    @property
    def published(self) -> str:
        """The folder of the published files."""
        return "gsm8k"

    def easy(self) -> Iterable[dict[str, Any]]:
        """The rows of the source of that name."""
        return problems.gsm8k()

    def examples(self, split: str) -> Sequence[Example]:
        """The questions of a split; the same on every call.

        Raises:
          ValueError: for an unknown split, without a data directory, or for a malformed line.
          FileNotFoundError: when the file is not there.
        """
        return divided(self, split, lambda r: _example(r["question"], r["answer"]), _FIELDS)

    def truth(self, example: Example) -> Any:
        """What `recorded` makes the example of again, beside its prompt: its answer as a number."""
        return example.answer or None

    def recorded(self, question: str, truth: Any) -> Example:
        """The example of a saved generation: its question, and its answer as a number.

        d1's files lack the truth (None) where it is negative, and their scorer then counts
        every answer wrong. Under 'paper' it is looked up in the published test file; without
        that file the answer stays '' and nothing equals it.
        """
        if truth is not None:
            return Example(question, f"{Fraction(str(truth).replace(',', ''))}")
        published = _answers(self.data_dir) if self.protocol == "paper" else {}
        return Example(question, published.get(question, ""))

    def prompt(self, example: Example) -> str:
        """The question in the task's style, after worked examples."""
        shots = [(e.question, self.answer(e)) for e in shots_of(self, self.shots, self.split_seed)]
        instruction = _INSTRUCTION if self.style == "evaluation" else ""
        return rendered(self.style, instruction, example.question, shots)

    def answer(self, example: Example) -> str:
        """The worked solution and the answer, as the style asks for them."""
        if self.style == "compact":
            return f"{example.solution}\n#### {example.answer}".lstrip()
        told = rf"\boxed{{{example.answer}}}" if self.style == "evaluation" else example.answer
        reasoning = f"<reasoning>\n{example.solution}\n</reasoning>\n"
        return f"{reasoning}<answer>\n{told}\n</answer>\n"

    def trace(self, example: Example) -> traces.Pieces | None:
        """The answer in pieces; what reasons up to the number may be given away."""
        return traces.around(self.answer(example), example.solution, example.answer)

    def score(self, example: Example, completion: str) -> dict[str, float]:
        """The published reward, its parts and both verdicts.

        Returns:
          reward: correct + xml + soft + strict + integer, at most 4, or `solved`.
          correct: 2.0 for the right answer: under 'paper' if solved, else if the text of the
            answer is the digits of the true one.
          xml: at most 0.5 for tags on lines of their own, less for text behind them.
          soft, strict: 0.5 each for the whole format.
          integer: 0.5 if the answer is a whole number in digits.
          solved: 1.0 for the right number; under 'd1' and 'spg' as the authors' evaluation
            script finds it, which is what they report.
          string: 1.0 if the answer's text, out of its box, is the digits of the true one.
          answered: 1.0 if there is an answer to read.
        """
        text = finished(completion) if self.protocol == "paper" else completion
        written = self._written(text)
        plain = latex.opened(written) if written else None
        if self.protocol == "paper":
            found, number = plain, plain is not None and self._right(example.answer, plain)
        else:
            found = text.rpartition("<answer>")[2].partition("</answer>")[0].strip()
            read = parsers.gsm8k(completion, self.protocol)
            number = bool(example.answer) and read == float(Fraction(example.answer))
        string = (plain if self.protocol == "paper" else found) == (example.answer or None)
        parts = self._format(text, found or "")
        right = number if self.protocol == "paper" else string
        reward = 2.0 * right + sum(parts.values())
        return {
            "reward": self.chosen(reward, float(number)),
            "correct": 2.0 * right,
            **parts,
            "solved": float(number),
            "string": float(string),
            "answered": float(bool(found)),
        }

    def _format(self, text: str, found: str) -> dict[str, float]:
        fixed = self.protocol == "paper"
        whole = _WHOLE.fullmatch(found) if fixed else found.isdigit()
        return {
            "xml": tags.xml_count(text, self.protocol),
            "soft": 0.5 * tags.soft(text, multiline=fixed),
            "strict": 0.5 * tags.strict(text, multiline=fixed),
            "integer": 0.5 * bool(whole),
        }

    def _written(self, text: str) -> str | None:
        """The part of a completion that is the answer; None without one."""
        if self.style == "compact":
            return text.rpartition("####")[2].strip() if "####" in text else None
        return answer_or_box(text)

    def _right(self, truth: str, answer: str) -> bool:
        if not truth:
            return False
        number = _number(answer)
        if number is None:
            right_side = _plain(answer[-1000:].rpartition("=")[2])
            if self.equality == "verify" and _FORMULA.search(right_side):
                return equality.equal(truth, right_side)
            number = _last(right_side)
        return number == Fraction(truth)


def _example(question: str, worked: str) -> Example:
    """A published row: calculator marks `<<...>>` leave the solution."""
    solution, mark, answer = worked.rpartition("####")
    answer = answer.strip().replace(",", "")
    if not mark or not _WHOLE.fullmatch(answer):
        raise ValueError(f"answer {worked[-40:]!r} does not end in #### and a whole number")
    return Example(question, answer, re.sub("<<[^>]*>>", "", solution).strip())


@functools.lru_cache(maxsize=4)
def _answers(data_dir: str | None) -> dict[str, str]:
    """The answer of every published test question; {} where the file is not there."""
    try:
        found = rows(data_dir, "gsm8k/test.jsonl", _FIELDS)
    except (ValueError, FileNotFoundError):
        return {}
    return {row["question"]: _example(row["question"], row["answer"]).answer for row in found}


def _plain(text: str) -> str:
    r"""Without currency, thousands separators, `\text` and typographic minus signs."""
    text = text.replace("\u2212", "-").replace(r"\$", "").replace("$", "").replace("\u20ac", "")
    return _THOUSANDS.sub("", _WORDS.sub(r"\1", text)).strip()


def _number(text: str) -> Fraction | None:
    """The value of a text that is one decimal number, perhaps of money or per cent."""
    text = _plain(text[:200]).removesuffix("%").removesuffix("\\").strip()
    return Fraction(text) if len(text) <= _DIGITS and _DECIMAL.fullmatch(text) else None


def _last(text: str) -> Fraction | None:
    """The last number of a text."""
    found = re.findall(r"(?<![0-9])-?[0-9]+(?:\.[0-9]+)?", text)
    return Fraction(found[-1]) if found and len(found[-1]) <= _DIGITS else None
