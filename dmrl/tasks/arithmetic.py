"""Arithmetic expressions: computed exactly and safely, written, and searched for.

Text is parsed into a syntax tree of bounded size; nothing is ever evaluated as code.
"""

import ast
import itertools
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

_LONGEST = 1000
"""Characters of an expression: some 25 for four numbers, the rest for spaces and brackets."""
_POWER_BITS = 4096
_ROUND = 8192
"""Random expressions drawn at a time."""


def literals(text: str) -> list[int]:
    """The numbers of an expression: its runs of digits, in order; [] for an overlong text."""
    return list(map(int, re.findall("[0-9]+", text))) if len(text) <= _LONGEST else []


def evaluate(text: str, powers: bool = False) -> Fraction | float | None:
    """The value of an arithmetic expression, exact; None if it has none.

    Takes + - * /, signs and parentheses, and with `powers` also decimals, // and ** (a
    fractional exponent gives a float). None for anything else, for a division by zero, for
    more than 1000 characters, for powers of powers and for a power of more than 4096 bits.
    """
    if len(text) > _LONGEST or not re.fullmatch(r"[0-9+\-*/().\s]+", text):
        return None
    if text.count("**") > 1 or (not powers and re.search(r"\*\*|//|\.", text)):
        return None
    try:
        value = _value(ast.parse(text, mode="eval").body)
    except (ArithmeticError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
        return None
    return None if isinstance(value, complex) else value


def _power(base: Any, exponent: Any) -> Any:
    """`base ** exponent`, refused before the result could be large."""
    bits = max(abs(base.numerator), base.denominator).bit_length()
    if bits * abs(exponent) > _POWER_BITS:
        raise OverflowError(f"{base} ** {exponent} is too large to compute")
    return base**exponent


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Pow: _power,
}


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() | float() as number):
            return Fraction(number)
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            return _value(inner)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner)
        case ast.BinOp(left, op, right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left), _value(right))
    raise ValueError(f"{type(node).__name__} is no arithmetic")


class Term(NamedTuple):
    """A written expression and its outermost operator (None for a number)."""

    text: str
    op: str | None = None

    def join(self, op: str, other: "Term") -> "Term":
        """`self op other`, with no more parentheses than its value needs."""
        left = f"({self.text})" if self.op in _BRACKETS_LEFT[op] else self.text
        right = f"({other.text})" if other.op in _BRACKETS_RIGHT[op] else other.text
        return Term(left + op + right, op)


_BRACKETS_LEFT = {"+": set(), "-": set(), "*": {"+", "-"}, "/": {"+", "-"}}
_BRACKETS_RIGHT = {"+": set(), "-": {"+", "-"}, "*": {"+", "-"}, "/": {"+", "-", "*", "/"}}


def solve(numbers: Sequence[int], target: int) -> str | None:
    """An expression that reaches `target` with each number once; None if there is none.

    Exhaustive over + - * / with fractions: under a millisecond for three numbers, some tens
    for four.
    """
    return _solve([(Fraction(n), Term(str(n))) for n in numbers], target)


def _solve(terms: list[tuple[Fraction, Term]], target: int) -> str | None:
    if len(terms) == 1:
        value, term = terms[0]
        return term.text if value == target else None
    for i, j in itertools.permutations(range(len(terms)), 2):
        (a, left), (b, right) = terms[i], terms[j]
        rest = [term for k, term in enumerate(terms) if k not in (i, j)]
        results = {"-": a - b}
        if i < j:  # the other order gives the same sums and products
            results |= {"+": a + b, "*": a * b}
        if b != 0:
            results["/"] = a / b
        for op, result in results.items():
            found = _solve([*rest, (result, left.join(op, right))], target)
            if found is not None:
                return found
    return None


def drawn(
    rng: np.random.Generator, count: int, values: Sequence[int], targets: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], int, str]]:
    """(numbers, target, expression) of random expressions over `count` numbers, of one round those
    that hit an allowed target.

    Two terms at random are joined by a random operation until one is left; divisions must
    leave no remainder. The values stay integers far below 2^63 for the options allowed.
    """
    numbers = rng.integers(values[0], values[1] + 1, (_ROUND, count))
    state, valid, steps = numbers, np.ones(_ROUND, bool), []
    while state.shape[1] > 1:
        order = rng.permuted(np.tile(np.arange(state.shape[1]), (_ROUND, 1)), axis=1)
        op = rng.integers(4, size=_ROUND)
        state = np.take_along_axis(state, order, axis=1)
        a, b = state[:, 0], state[:, 1]
        divisor = np.where(b == 0, 1, b)
        valid &= (op < 3) | ((b != 0) & (a % divisor == 0))
        joined = np.choose(op, [a + b, a - b, a * b, a // divisor])
        state = np.column_stack([joined, state[:, 2:]])
        steps.append((order, op))
    reached = state[:, 0]
    valid &= (targets[0] <= reached) & (reached <= targets[1])
    for row in np.flatnonzero(valid):
        terms = [Term(str(number)) for number in numbers[row]]
        for order, op in steps:
            first, second, *rest = (terms[i] for i in order[row])
            terms = [first.join("+-*/"[op[row]], second), *rest]
        yield tuple(numbers[row].tolist()), int(reached[row]), terms[0].text
