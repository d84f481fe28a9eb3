"""Countdown: reach a target with + - * / and each given number exactly once.

The published reward (d1, shared by SPG, wd1, EOSER and DTM) is 0 without an answer, 0.1 for a
wrong one and 1 for a right one.
"""

import ast
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dmrl.tasks import latex, parsers, traces
from dmrl.tasks.answers import (
    BOXED_FORMAT,
    FORMAT,
    PROTOCOLS,
    TEXT,
    answer_or_box,
    finished,
    last_answer,
)
from dmrl.tasks.arithmetic import drawn, evaluate, literals, solve
from dmrl.tasks.options import at_least, divided, one_of, rows, shots_of, source_of_rows, span

_BUCKETS = {"train": range(2, 8), "validation": range(1, 2), "test": range(1)}
"""The hash values, of 8, that belong to each split."""
_SPLITS = (*_BUCKETS, "published")

_SYMBOLS: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
}


_PROMPT = """Using only the numbers {numbers}, write an arithmetic expression whose value is \
exactly {target}. Use every number of the list exactly once. The operations +, -, * and / are \
allowed.

Put nothing but the final expression, without an equals sign or the target, between <answer> \
and </answer>.

Example: for the numbers [2, 3, 4] and the target 5 the answer is
<answer>
2*4-3
</answer>
"""


_EVALUATION = """Using only the provided numbers, create an arithmetic expression that evaluates \
to exactly the provided target number. You may use the operations +, -, *, and / as needed, but \
each number must be used exactly once. Think step-by-step. After reasoning, provide only your \
final expression inside \\boxed{} tags without including an equals sign or the target number. \
For example: \\boxed{a + b * c}"""
"""With which d1's evaluation prompt begins; its format block follows without a line break."""

_LATEX = {r"\times": "*", r"\cdot": "*", r"\div": "/", "\u2212": "-", "\u00d7": "*", "\u00f7": "/"}


class Example(NamedTuple):
    """Numbers, the target, and an expression that reaches it ('' where none does)."""

    numbers: tuple[int, ...]
    target: int
    solution: str = ""


@dataclass(frozen=True)
class Task:
    """Countdown.

    Splits:
      train, validation, test: generated. A hash of a puzzle's sorted numbers and target says
        which split it belongs to, so the splits are disjoint whatever their sizes.
      published: the 256 puzzles of three numbers on which d1, SPG and MDPO report. They are
        not kept out of `train` (measured: the default one holds 3 of them).

    All puzzles of a generated split differ in target or in numbers (not in their order
    alone), and each has a solution by construction. A split has fewer than asked for when a
    whole round of draws brings nothing new.
    """

    style: str = "compact"
    """'compact': the prompt is "30,100,93=23:", the completion is the expression itself.
    'published': d1's training prompt, free text with the expression in an <answer>.
    'evaluation': d1's evaluation prompt, which asks for a box within the answer."""
    protocol: str = "paper"
    """'paper': only + - * / count, and the value must be exact. 'd1', 'spg': as in the
    authors' code ** and // count too, and values within 1e-5, which rewards expressions that
    the prompt forbids ("23+2//100"); and outside the compact style `solved` is what their
    evaluation script finds, which reads other answers than the reward (docs/protocol.md).
    None computes powers of powers or huge ones."""
    numbers: Sequence[int] = (3, 4)
    """Fewest and most numbers of a generated puzzle, all equally frequent."""
    values: Sequence[int] = (1, 100)
    """Smallest and largest number of a generated puzzle."""
    targets: Sequence[int] = (1, 100)
    """Smallest and largest target of a generated puzzle."""
    split_seed: int = 0
    """Divides the puzzles between the splits and draws them."""
    train_size: int = 10_000
    """Puzzles in 'train'."""
    held_out_size: int = 1024
    """Puzzles in 'validation' and in 'test'."""
    shots: int = 0
    """Worked examples from train in the prompts of free text, drawn by `split_seed`. The
    published prompts have none, but the training prompt shows an answer's form."""
    source: str = "generated"
    """'generated', or rows of a data set with the fields of `Example`: `jsonl:PATH`,
    `hf:NAME[/CONFIG][:SPLIT]`, `tfds:NAME` (see `dmrl.sources`), which launch/data.py writes."""
    data_dir: str | None = None
    """Directory holding countdown/cd3_test.jsonl for 'published'; default $DMRL_DATA."""

    def __post_init__(self) -> None:
        one_of("style", self.style, ("compact", "published", "evaluation"))
        one_of("protocol", self.protocol, PROTOCOLS)
        for name, low, high in (("numbers", 2, 6), ("values", 1, 1000), ("targets", 1, 10_000)):
            object.__setattr__(self, name, span(name, getattr(self, name), low, high))
        source_of_rows(self.source, "generated")
        at_least("split_seed", self.split_seed, 0)
        at_least("train_size", self.train_size, 1)
        at_least("held_out_size", self.held_out_size, 1)
        at_least("shots", self.shots, 0)
        if self.shots and self.style == "compact":
            raise ValueError(f"shots={self.shots}: prompts in style='compact' have no examples")

    @property
    def alphabet(self) -> str:
        """Digits, operators and separators, or printable ASCII for the published prompts."""
        return "0123456789+-*/(),=:" if self.style == "compact" else TEXT

    @property
    def grid(self) -> list[list[int]] | None:
        """None: an expression is no board."""
        return None

    def examples(self, split: str) -> Sequence[Example]:
        """The puzzles of a split, shuffled; the same on every call.

        Raises:
          ValueError: for an unknown split, for 'published' without a data directory, or when
            `numbers`, `values` and `targets` leave no puzzle.
          FileNotFoundError: when the published file is not there.
        """
        one_of("split", split, _SPLITS)
        if split == "published":
            return _published(self.data_dir)
        if self.source != "generated":
            return divided(self, split, _example)
        rng = np.random.default_rng([self.split_seed, _SPLITS.index(split)])
        size = self.train_size if split == "train" else self.held_out_size
        found = []
        counts = range(self.numbers[0], self.numbers[1] + 1)
        for i, count in enumerate(counts):
            found += self._generate(rng, split, count, (size + i) // len(counts))
        if not found:
            raise ValueError(
                f"no puzzle for {split!r} with numbers={self.numbers}, values={self.values}, "
                f"targets={self.targets}: widen a range"
            )
        return [found[i] for i in rng.permutation(len(found))]

    def _generate(
        self, rng: np.random.Generator, split: str, count: int, size: int
    ) -> list[Example]:
        found: dict[tuple[tuple[int, ...], int], Example] = {}
        before = -1
        while before < len(found) < size:
            before = len(found)
            for numbers, target, solution in drawn(rng, count, self.values, self.targets):
                key = tuple(sorted(numbers)), target
                if zlib.crc32(f"{self.split_seed} {key}".encode()) % 8 in _BUCKETS[split]:
                    found.setdefault(key, Example(numbers, target, solution))
                if len(found) == size:
                    break
        return list(found.values())

    def prompt(self, example: Example) -> str:
        """Numbers and target, with d1's format and instructions in the published style."""
        if self.style == "compact":
            return f"{','.join(map(str, example.numbers))}={example.target}:"
        shots = "".join(
            f"Question:\n{_asked(shot)}\nAnswer:\n{self._told(shot)}\n\n"
            for shot in shots_of(self, self.shots, self.split_seed)
        )
        if self.style == "evaluation":
            return f"{_EVALUATION}{BOXED_FORMAT}\n\n{shots}{_asked(example)}"
        text = _PROMPT.format(numbers=list(example.numbers), target=example.target)
        return f"{FORMAT}\n{shots}{text}"

    def _told(self, example: Example) -> str:
        return "".join(text for text, _ in self.trace(example) or [])

    def template(self, example: Example) -> str | None:
        """None: the model fills every position and chooses the expression's length."""
        return None

    def answer(self, example: Example) -> str | None:
        """The known expression, in <answer> tags in the published style; None if unknown."""
        if not example.solution or self.style == "compact":
            return example.solution or None
        if self.style == "evaluation":
            return f"<answer>\n\\boxed{{{example.solution}}}\n</answer>"
        return f"<answer>\n{example.solution}\n</answer>"

    def trace(self, example: Example) -> traces.Pieces | None:
        """Reasoning that works the known expression out, which may be given away, and the answer.

        A line that holds the whole expression may not (that of a puzzle of two numbers). None
        if no expression is known, and in the compact style, where the completion is the answer.
        """
        answer = self.answer(example)
        if answer is None or self.style == "compact":
            return None
        lines = [("<reasoning>\n", True)]
        lines += [(f"{line}\n", example.solution not in line) for line in _worked(example.solution)]
        lines.append(("</reasoning>\n", True))
        return [*traces.merged(lines), (answer, False)]

    def score(self, example: Example, completion: str) -> dict[str, float]:
        """The published reward and its parts.

        Returns:
          reward: 1.0 if solved, 0.1 for any other answer, 0.0 without one.
          solved: 1.0 if the answer uses each number once and its value is the target; outside
            the compact style under 'd1' and 'spg' as their evaluation script finds.
          numbers: 1.0 if it uses each number once, whatever its value.
          answered: 1.0 if there is an answer: in the published style an <answer> pair, even
            an empty one (as in d1's code), in the compact style any text.
        """
        answer = self._written(completion)
        text = (answer or "").strip()
        numbers = sorted(literals(text)) == sorted(example.numbers)
        right = solved = self._reaches(text, example)
        if self.protocol != "paper" and self.style != "compact":
            solved = self._reaches(parsers.countdown(completion), example)
        return {
            "reward": 1.0 if right else 0.0 if answer is None else 0.1,
            "solved": float(solved),
            "numbers": float(numbers),
            "answered": float(answer is not None),
        }

    def truth(self, example: Example) -> Any:
        """What `recorded` makes the example of again, beside its prompt: [numbers, target]."""
        return [list(example.numbers), example.target]

    def recorded(self, question: str, truth: Any) -> Example:
        """The example of a saved generation, whose truth is [numbers, target]."""
        numbers, target = truth
        return Example(tuple(map(int, numbers)), int(target))

    def _written(self, completion: str) -> str | None:
        """The part of a completion that is the answer; None without one."""
        if self.style == "compact":
            return completion.strip() or None
        if self.protocol != "paper":
            return last_answer(completion)
        text = finished(completion)
        if self.style == "published":
            return last_answer(text)
        written = answer_or_box(text)
        return None if written is None else _opened(written)

    def _reaches(self, text: str, example: Example) -> bool:
        if sorted(literals(text)) != sorted(example.numbers):
            return False
        if self.protocol == "paper":
            return evaluate(text) == example.target
        value = evaluate(text, powers=True)
        return value is not None and -1e-5 < value - example.target < 1e-5


def _asked(example: Example) -> str:
    return f"Numbers: {list(example.numbers)}\nTarget: {example.target}"


def _opened(answer: str) -> str:
    """The expression in a box, in plain operators, without what follows an equals sign."""
    inside = latex.opened(answer) or ""
    for command, operator in _LATEX.items():
        inside = inside.replace(command, operator)
    return inside.partition("=")[0].strip(" $\n")


def _worked(solution: str) -> list[str]:
    """ "5*4=20" for every operation of an expression, innermost first."""
    lines: list[str] = []

    def value(node: ast.expr) -> str:
        if isinstance(node, ast.BinOp):
            step = f"{value(node.left)}{_SYMBOLS[type(node.op)]}{value(node.right)}"
            lines.append(f"{step}={evaluate(ast.unparse(node))}")
        text = str(evaluate(ast.unparse(node)))
        return f"({text})" if re.search("[-/]", text) else text

    value(ast.parse(solution, mode="eval").body)
    return lines


def _example(row: dict[str, Any]) -> Example:
    """A row: `numbers` (or `nums`, as some collections call them), `target`, perhaps `solution`."""
    numbers = row["nums"] if "nums" in row else row["numbers"]
    example = Example(tuple(map(int, numbers)), int(row["target"]), row.get("solution") or "")
    if example.solution and evaluate(example.solution) != example.target:
        raise ValueError(f"solution {example.solution!r} does not reach {example.target}")
    return example


def _published(data_dir: str | None) -> list[Example]:
    found = []
    for row in rows(data_dir, "countdown/cd3_test.jsonl", ("input", "output")):
        numbers, target = tuple(map(int, row["input"].split(","))), int(row["output"])
        found.append(Example(numbers, target, solve(numbers, target) or ""))
    return found
