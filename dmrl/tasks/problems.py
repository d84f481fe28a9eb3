r"""Easy problems in the form of GSM8K's and MATH's rows, for models too small for the real ones.

One operation on numbers of one or two digits. They go through the same prompts, readers and
rewards as the published rows, and say nothing about accuracies on these. Our own.
"""

import math
import random
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

_THINGS = ("cups", "eggs", "nuts", "pens")


def gsm8k() -> Iterator[dict[str, Any]]:
    """Rows `question` and `answer` (worked, its number behind `####`), the same on every call.

    Sums, differences and products, each pair of numbers once, so that no two questions differ in
    a word alone: 4,235 of at most 30 characters, answers of at most 16.
    """
    rng = random.Random(0)
    pairs = [(a, "+", b) for a in range(1, 50) for b in range(1, 50)]
    pairs += [(a, "-", b) for a in range(2, 61) for b in range(1, a)]
    pairs += [(a, "*", b) for a in range(2, 10) for b in range(2, 10)]
    for a, sign, b in rng.sample(pairs, len(pairs)):
        what = rng.choice(_THINGS)
        told = {
            "+": f"{a} {what} and {b} more",
            "-": f"{a} {what} without {b}",
            "*": f"{a} boxes of {b} {what}",
        }[sign]
        value = {"+": a + b, "-": a - b, "*": a * b}[sign]
        yield {
            "question": f"{told}. How many?",
            "answer": f"{a}{sign}{b}={value}\n#### {value}",
        }


def math500() -> Iterator[dict[str, Any]]:
    r"""Rows `problem`, `solution` (with its `\boxed` answer) and `answer`, the same on every call.

    Fractions to reduce, linear equations and products of binomials: 1,611 of at most 23
    characters, solutions of at most 20.
    """
    rows = [*_fractions(), *_equations(), *_binomials()]
    for problem, before, answer in random.Random(0).sample(rows, len(rows)):
        solution = f"{before}\\boxed{{{answer}}}"
        yield {"problem": problem, "solution": solution, "answer": answer}


_Worked = tuple[str, str, str]
"""A problem, what is worked out before the answer, and the answer."""


def _fractions() -> Iterator[_Worked]:
    for a in range(1, 10):
        for b in range(2, 10):
            if a == b or math.gcd(a, b) > 1:
                continue
            for factor in range(2, 11):
                value = Fraction(a, b)
                answer = rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
                yield rf"Reduce $\frac{{{factor * a}}}{{{factor * b}}}$.", "", answer


def _equations() -> Iterator[_Worked]:
    for a in range(2, 10):
        for b in range(1, 13):
            for x in range(1, 13):
                yield f"Solve ${a}x+{b}={a * x + b}$.", f"{a}x={a * x}, x=", f"{x}"


def _binomials() -> Iterator[_Worked]:
    for a in range(1, 10):
        for b in range(a, 10):
            yield f"Expand $(x+{a})(x+{b})$.", "", f"x^2+{a + b}x+{a * b}"
