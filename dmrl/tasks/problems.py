r"""Easy problems in the form of GSM8K's and MATH's rows, for models too small for the real ones.

One or two operations on numbers of one or two digits. They go through the same prompts, readers
and rewards as the published rows, and say nothing about accuracies on these. Our own.
"""

import math
import random
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

_NAMES = ("Ann", "Ben", "Eve", "Leo", "Tom")
_THINGS = ("cups", "eggs", "nuts", "pens")


def gsm8k() -> Iterator[dict[str, Any]]:
    """Rows `question` and `answer` (worked, its number behind `####`), the same on every call.

    Sums, differences, products and products less a number, each choice of numbers once, so that
    no two questions differ in names alone: 2,887 of at most 51 characters, answers of at most 27.
    """
    rng = random.Random(0)
    steps = [[f"{a}+{b}"] for a in range(1, 31) for b in range(1, 31)]
    steps += [[f"{a}-{b}"] for a in range(2, 41) for b in range(1, a)]
    products = [(a, b) for a in range(2, 11) for b in range(2, 11)]
    steps += [[f"{a}*{b}"] for a, b in products]
    steps += [[f"{a}*{b}", f"{a * b}-{c}"] for a, b in products for c in range(1, min(a * b, 16))]
    for chosen in rng.sample(steps, len(steps)):
        who, what = rng.choice(_NAMES), rng.choice(_THINGS)
        yield {"question": f"{who} {_told(chosen, what)}. How many?", "answer": _worked(chosen)}


def _told(steps: list[str], things: str) -> str:
    first, more = steps[0], steps[1:]
    if "*" in first:
        boxes, each = first.split("*")
        told = f"has {boxes} boxes of {each} {things}"
        return told + (f" and loses {more[0].partition('-')[2]}" if more else "")
    verb = "buys" if "+" in first else "loses"
    has, other = first.replace("+", "-").split("-")
    return f"has {has} {things} and {verb} {other}"


def _worked(steps: list[str]) -> str:
    lines, value = [], 0
    for step in steps:
        sign = next(c for c in step if not c.isdigit())
        a, b = map(int, step.split(sign))
        value = {"+": a + b, "-": a - b, "*": a * b}[sign]
        lines.append(f"{step}={value}")
    return "\n".join([*lines, f"#### {value}"])


def math500() -> Iterator[dict[str, Any]]:
    r"""Rows `problem`, `solution` (with its `\boxed` answer) and `answer`, the same on every call.

    Fractions to reduce, linear equations and products of binomials: 1,611 of at most 25
    characters, solutions of at most 33.
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
                given = rf"\frac{{{factor * a}}}{{{factor * b}}}"
                yield f"Simplify ${given}$.", f"divide by {factor}: ", answer


def _equations() -> Iterator[_Worked]:
    for a in range(2, 10):
        for b in range(1, 13):
            for x in range(1, 13):
                yield f"Solve ${a}x+{b}={a * x + b}$.", f"{a}x={a * x}, x=", f"{x}"


def _binomials() -> Iterator[_Worked]:
    for a in range(1, 10):
        for b in range(a, 10):
            yield f"Expand $(x+{a})(x+{b})$.", "", f"x^2+{a + b}x+{a * b}"
