"""Zebra puzzles: who lives where, from clues (houses in a row, one value an attribute each).

Every puzzle is generated with exactly one solution and no clue that could be left out. The
reward is the share of cells that are right, which is what UPO (arXiv 2510.05725) calls hit
rate, or 1 for a whole grid.

Longer than other files: the clues, the search that proves a puzzle unique and the wording of
each kind of clue are one table of kinds read three ways.
"""

import dataclasses
import functools
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dmrl.tasks import BLANK
from dmrl.tasks.answers import FORMAT, TEXT, finished, last_answer
from dmrl.tasks.options import at_least, divided, one_of, shots_of, source_of_rows, span

ATTRIBUTES = {
    "color": ("red", "green", "blue", "white", "yellow", "black"),
    "pet": ("dog", "cat", "fish", "bird", "horse", "zebra"),
    "drink": ("tea", "milk", "water", "coffee", "juice", "wine"),
    "person": ("Ann", "Ben", "Eve", "Ida", "Leo", "Tom"),
    "job": ("baker", "doctor", "farmer", "nurse", "pilot", "teacher"),
}
"""The first values of each are used; an attribute's letter is its place in this table."""

_NAMES = list(ATTRIBUTES)
_SPLITS = ("train", "validation", "test")
_BUCKETS = {"train": range(2, 8), "validation": range(1, 2), "test": range(1)}

_PROMPT = """There are {houses} houses in a row, numbered 1 to {houses} from left to right. \
Each house has one value of every attribute, and no two houses share one.

{attributes}

Clues:
{clues}

Give the whole solution between <answer> and </answer>: a line for each attribute with its name, \
a colon and its {houses} values from house 1 to house {houses}, separated by commas.
"""


class Clue(NamedTuple):
    """A relation between two values, each (attribute, value); of one value and a house."""

    kind: str
    """'=' same house, '<' somewhere left of, '-' directly left of, '~' neighbours, '@' in
    house b[1] + 1 (b[0] is -1), '!' not in it."""
    a: tuple[int, int]
    b: tuple[int, int]


class Example(NamedTuple):
    """Houses, clues and the solution: `grid[attribute][house]` is a value's number."""

    houses: int
    clues: tuple[Clue, ...]
    grid: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """Zebra puzzles.

    Splits: train, validation and test. A hash of a puzzle's solution says which split it
    belongs to, so that no two splits share one. All puzzles of a split are distinct.
    """

    style: str = "compact"
    """'compact': clues in letters, and the grid as a template, a row of digits for each
    attribute. 'published': clues in sentences and d1's format, free text with an <answer>."""
    reward: str = "cells"
    """'cells': the share of right cells (hit rate). 'grid': 1 for a whole solution."""
    houses: Sequence[int] = (4, 4)
    """Fewest and most houses, 3 to 6, all numbers equally frequent; one size if compact."""
    attributes: Sequence[int] = (3, 3)
    """Fewest and most attributes, 3 to 5, likewise."""
    shots: int = 0
    """Worked puzzles in the published prompt, of the same sizes and of train."""
    split_seed: int = 0
    """Divides the puzzles between the splits and draws them."""
    train_size: int = 1000
    """Puzzles in 'train'."""
    held_out_size: int = 256
    """Puzzles in 'validation' and in 'test'."""
    source: str = "generated"
    """'generated', or rows of a data set with the fields of `Example`: `jsonl:PATH`,
    `hf:NAME[/CONFIG][:SPLIT]`, `tfds:NAME` (see `dmrl.sources`), which launch/data.py writes."""

    def __post_init__(self) -> None:
        one_of("style", self.style, ("compact", "published"))
        one_of("reward", self.reward, ("cells", "grid"))
        object.__setattr__(self, "houses", span("houses", self.houses, 3, 6))
        object.__setattr__(self, "attributes", span("attributes", self.attributes, 3, 5))
        for name in ("houses", "attributes"):
            first, last = getattr(self, name)
            if self.style == "compact" and first != last:
                raise ValueError(
                    f"{name}=({first}, {last}): templates have one length, so style='compact' "
                    f"needs one size, e.g. {name}=({last}, {last})"
                )
        source_of_rows(self.source, "generated")
        at_least("shots", self.shots, 0)
        if self.shots and self.style == "compact":
            raise ValueError(f"shots={self.shots}: prompts in style='compact' have no examples")
        at_least("split_seed", self.split_seed, 0)
        at_least("train_size", self.train_size, 1)
        at_least("held_out_size", self.held_out_size, 1)

    @property
    def alphabet(self) -> str:
        """What clues and grids are written in, or printable ASCII."""
        return "\nabcde123456=<-~@!;:" if self.style == "compact" else TEXT

    @property
    def grid(self) -> list[list[int]] | None:
        """Positions of the cells, a row for each attribute; None if it is free text."""
        if self.style == "published":
            return None
        houses, rows = self.houses[0], self.attributes[0]
        return [[row * (houses + 1) + c for c in range(houses)] for row in range(rows)]

    @property
    def units(self) -> list[list[int]]:
        """The rows of `grid`, in cells counted along it: no two houses share a value."""
        houses = self.houses[0]
        return [list(range(a * houses, (a + 1) * houses)) for a in range(self.attributes[0])]

    def examples(self, split: str) -> Sequence[Example]:
        """The puzzles of a split; the same on every call.

        Some 0.03 s each for the default size, seconds for six houses and five attributes.

        Raises:
          ValueError: for an unknown split.
        """
        one_of("split", split, _SPLITS)
        if self.source != "generated":
            return divided(self, split, _example)
        rng = np.random.default_rng([self.split_seed, _SPLITS.index(split)])
        size = self.train_size if split == "train" else self.held_out_size
        shapes = list(
            itertools.product(
                range(self.houses[0], self.houses[1] + 1),
                range(self.attributes[0], self.attributes[1] + 1),
            )
        )
        found: dict[tuple[Clue, ...], Example] = {}
        while len(found) < size:
            houses, rows = shapes[len(found) % len(shapes)]
            grid = tuple(tuple(rng.permutation(houses).tolist()) for _ in range(rows))
            if zlib.crc32(f"{self.split_seed} {grid}".encode()) % 8 in _BUCKETS[split]:
                example = _generate(rng, grid)
                found.setdefault(tuple(sorted(example.clues)), example)
        return list(found.values())

    def prompt(self, example: Example) -> str:
        """The clues, in letters or in sentences, after worked puzzles."""
        if self.style == "compact":
            return f"{example.houses}{''.join(';' + _letters(c) for c in example.clues)}:"
        shots = "".join(
            f"Question:\n{_asked(shot)}\nAnswer:\n{self.answer(shot)}\n\n" for shot in self._shots()
        )
        return f"{FORMAT}\n{shots}{_asked(example)}"

    def _shots(self) -> list[Example]:
        if not self.shots:
            return []
        drawn = self.source == "generated"  # the first ones, without drawing the others
        task = dataclasses.replace(self, train_size=self.shots) if drawn else self
        return shots_of(task, self.shots, self.split_seed)

    def template(self, example: Example) -> str | None:
        """The empty grid; None in the published style."""
        if self.style == "published":
            return None
        return "\n".join(BLANK * example.houses for _ in example.grid)

    def answer(self, example: Example) -> str:
        """The solved grid: digits, or values by name in <answer> tags."""
        if self.style == "compact":
            return "\n".join("".join(str(v + 1) for v in row) for row in example.grid)
        lines = [
            f"{name}: {', '.join(ATTRIBUTES[name][v] for v in row)}"
            for name, row in zip(_NAMES, example.grid, strict=False)
        ]
        return "<answer>\n" + "\n".join(lines) + "\n</answer>"

    def score(self, example: Example, completion: str) -> dict[str, float]:
        """Reward and both metrics.

        Returns:
          reward: as the option `reward` says.
          solved: 1.0 for the whole solution, else 0.0.
          cells: share of the cells that are right.
        """
        rows = self._read(example, completion)
        right = sum(
            found == told
            for row, answer in zip(example.grid, rows, strict=True)
            for found, told in zip(row, answer, strict=False)
        )
        cells = right / (len(example.grid) * example.houses)
        solved = float(cells == 1.0)
        return {
            "reward": solved if self.reward == "grid" else cells,
            "solved": solved,
            "cells": cells,
        }

    def empty(self, example: Example) -> int:
        """The number of cells."""
        return len(example.grid) * example.houses

    def _read(self, example: Example, completion: str) -> list[list[int | None]]:
        """For every attribute the values that the completion gives, house by house."""
        count = len(example.grid)
        if self.style == "compact":
            lines = completion.split("\n", count)
            if len(lines) != count or any(len(line) != example.houses for line in lines):
                return [[] for _ in range(count)]
            return [[ord(c) - ord("1") for c in line] for line in lines]
        told = {}
        for line in (last_answer(finished(completion)) or "").split("\n")[:100]:
            name, colon, values = line.partition(":")
            if colon:
                told[name.strip().lower()] = values.split(",", example.houses)
        return [
            [_value(name, value) for value in told.get(name, [])[: example.houses]]
            for name in _NAMES[:count]
        ]


def _asked(example: Example) -> str:
    """The published wording."""
    attributes = "\n".join(
        f"- {name}: {', '.join(ATTRIBUTES[name][: example.houses])}"
        for name in _NAMES[: len(example.grid)]
    )
    clues = "\n".join(f"{i}. {_sentence(c)}" for i, c in enumerate(example.clues, 1))
    return _PROMPT.format(houses=example.houses, attributes=attributes, clues=clues)


def _example(row: dict[str, Any]) -> Example:
    """A row with the fields of Example; lists that TFDS cannot type are JSON in text."""
    clues, grid = (json.loads(v) if isinstance(v, str) else v for v in (row["clues"], row["grid"]))
    read = tuple(Clue(kind, (a[0], a[1]), (b[0], b[1])) for kind, a, b in clues)
    return Example(int(row["houses"]), read, tuple(tuple(map(int, line)) for line in grid))


def solutions(
    houses: int, attributes: int, clues: Sequence[Clue], most: int = 2
) -> list[tuple[tuple[int, ...], ...]]:
    """The grids that agree with all clues, `most` of them at the most."""
    count = len(_orders(houses))
    alive = np.ones((attributes, count), bool)
    between: dict[tuple[int, int], NDArray[np.bool_]] = {}
    for kind, a, b in clues:
        if b[0] in (-1, a[0]):
            alive[a[0]] &= _alone(houses, kind, a[1], b)
            continue
        # Both directions, so that either may narrow the other.
        pairs = _pairs(houses, kind, a[1], b[1])
        for ends, matrix in (((a[0], b[0]), pairs), ((b[0], a[0]), pairs.T)):
            between[ends] = between[ends] & matrix if ends in between else matrix
    found: list[tuple[tuple[int, ...], ...]] = []
    for chosen in _search(alive, between):
        found.append(tuple(tuple(_orders(houses)[i].tolist()) for i in chosen))
        if len(found) == most:
            break
    return found


def _search(
    alive: NDArray[np.bool_], between: dict[tuple[int, int], NDArray[np.bool_]]
) -> Iterator[list[int]]:
    """One order an attribute, all that fit together."""
    alive = alive.copy()
    before = -1
    while before != (before := int(alive.sum())):
        for (a, b), matrix in between.items():
            alive[a] &= matrix[:, alive[b]].any(axis=1)
    left = alive.sum(axis=1)
    if not left.all():
        return
    if (left == 1).all():
        yield alive.argmax(axis=1).tolist()
        return
    attribute = int(np.where(left > 1, left, left.max() + 1).argmin())
    for order in np.flatnonzero(alive[attribute]):
        alive[attribute] = False
        alive[attribute, order] = True
        yield from _search(alive, between)


@functools.cache
def _orders(houses: int) -> NDArray[np.int64]:
    """[houses!, houses] every way to put values in houses: the value in each house."""
    return np.array(list(itertools.permutations(range(houses))))


@functools.cache
def _places(houses: int) -> NDArray[np.int64]:
    """[houses!, houses] the house of each value."""
    return np.argsort(_orders(houses), axis=1)


_HOLDS: dict[str, Callable[..., NDArray[np.bool_]]] = {
    "=": lambda a, b: a == b,
    "<": lambda a, b: a < b,
    "-": lambda a, b: a + 1 == b,
    "~": lambda a, b: abs(a - b) == 1,
    "@": lambda a, b: a == b,
    "!": lambda a, b: a != b,
}


@functools.cache
def _pairs(houses: int, kind: str, a: int, b: int) -> NDArray[np.bool_]:
    places = _places(houses)
    return _HOLDS[kind](places[:, a, None], places[None, :, b])


def _alone(houses: int, kind: str, a: int, b: tuple[int, int]) -> NDArray[np.bool_]:
    places = _places(houses)
    return _HOLDS[kind](places[:, a], b[1] if b[0] < 0 else places[:, b[1]])


def _generate(rng: np.random.Generator, grid: tuple[tuple[int, ...], ...]) -> Example:
    """A puzzle: true clues until one grid is left, then none that is not needed."""
    houses, attributes = len(grid[0]), len(grid)
    clues: list[Clue] = []
    while not clues or len(solutions(houses, attributes, clues)) > 1:
        clues += [_clue(rng, grid) for _ in range(houses)]
    clues = list(dict.fromkeys(clues))
    for clue in list(clues):
        rest = [c for c in clues if c != clue]
        if len(solutions(houses, attributes, rest)) == 1:
            clues = rest
    return Example(houses, tuple(clues), grid)


def _clue(rng: np.random.Generator, grid: tuple[tuple[int, ...], ...]) -> Clue:
    """A random clue that is true of the grid."""
    houses = len(grid[0])
    while True:
        kind = str(rng.choice(list(_HOLDS), p=(0.3, 0.2, 0.15, 0.2, 0.05, 0.1)))
        a, b = ((int(rng.integers(len(grid))), int(rng.integers(houses))) for _ in range(2))
        place = grid[a[0]].index(a[1])
        if kind in "@!":
            b = (-1, b[1])
            held = bool(_HOLDS[kind](place, b[1]))
        else:
            held = a != b and bool(_HOLDS[kind](place, grid[b[0]].index(b[1])))
        if held and (kind != "=" or a[0] != b[0]):
            return Clue(kind, a, b)


def _letters(clue: Clue) -> str:
    first = f"{'abcde'[clue.a[0]]}{clue.a[1] + 1}{clue.kind}"
    return first + (f"{clue.b[1] + 1}" if clue.b[0] < 0 else f"{'abcde'[clue.b[0]]}{clue.b[1] + 1}")


_WORDS = {
    "=": "is also",
    "<": "is somewhere to the left of",
    "-": "is directly to the left of",
    "~": "is next to",
    "@": "is house",
    "!": "is not house",
}


def _sentence(clue: Clue) -> str:
    second = f"{clue.b[1] + 1}" if clue.b[0] < 0 else _house(clue.b)
    return f"The {_house(clue.a)} {_WORDS[clue.kind]} {'' if clue.b[0] < 0 else 'the '}{second}."


def _house(value: tuple[int, int]) -> str:
    name = _NAMES[value[0]]
    return f"house with {name} {ATTRIBUTES[name][value[1]]}"


def _value(attribute: str, text: str) -> int | None:
    """A value's number; None for what is no value of the attribute."""
    names = [name.lower() for name in ATTRIBUTES[attribute]]
    text = text.strip().lower() if len(text) < 40 else ""
    return names.index(text) if text in names else None
