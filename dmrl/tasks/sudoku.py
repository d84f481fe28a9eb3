"""Sudoku, 4x4 and 9x9: generated so that no two splits share a solution.

The 4x4 puzzles are drawn from every puzzle of all 288 grids. A puzzle is 16 or 81 characters
read row by row, '0' for an empty cell. Two published prompt and
scoring conventions meet here: d1 scores empty cells against one given solution, which
penalises other valid answers of a puzzle with several; the default reward checks the rules.

Longer than other files (two board sizes, three styles): the rules, the tables of all 288 grids
and the scoring of one puzzle are read together; the 9x9 solver is in `boards`.
"""

import csv
import functools
import itertools
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dmrl.tasks import BLANK, boards, parsers
from dmrl.tasks.answers import FORMAT, PROTOCOLS, TEXT, finished, last_answer
from dmrl.tasks.options import at_least, data_file, divided, one_of, source_of_rows, span
from dmrl.tasks.sudoku_shots import SHOTS, asking, shown

CELLS = 16
TRAIN_GRIDS, HELD_OUT_GRIDS = 200, 44

_GENERATED = ("train", "validation", "test")
_PUBLISHED = {"d1": "sudoku/d1_4x4_test.csv", "spg": "sudoku/spg_4x4_test.csv"}
_BUCKETS = {"train": range(2, 8), "validation": range(1, 2), "test": range(1)}
"""The hash values, of 8, that belong to each split of 9x9 puzzles."""
_SPLITS = (*_GENERATED, "validation_multi", "test_multi", *_PUBLISHED)

_ROWS = np.arange(CELLS).reshape(4, 4)
_BOXES = _ROWS.reshape(2, 2, 2, 2).swapaxes(1, 2).reshape(4, 4)


@functools.cache
def _drawing(cells: int) -> str:
    """The board of the grid style, "{}" for a cell."""
    box = math.isqrt(math.isqrt(cells))
    band = "\n".join(["|".join(["{}" * box] * box)] * box)
    return f"\n{'+'.join(['-' * box] * box)}\n".join([band] * box)


@functools.cache
def _lines(cells: int) -> dict[int, str]:
    """Where the drawing has lines and line breaks."""
    drawn = _drawing(cells).replace("{}", "0")
    return {i: c for i, c in enumerate(drawn) if c != "0"}


_BLANKS = (np.arange(1 << CELLS)[:, None] >> np.arange(CELLS) & 1).astype(bool)
"""[65536, 16] the empty cells of every blank mask; bit c stands for cell c."""

_PROMPT = """Solve a {size}x{size} Sudoku puzzle. It is given as {cells} characters, row by row \
from the top left, and 0 marks an empty cell.

Rules:
- Every empty cell takes a digit from 1 to {size}.
- Each row, each column and each {box}x{box} box holds the digits {digits} exactly once.

Give the whole solved grid as one string of {cells} digits from 1 to {size}, without spaces or \
separators, between <answer> and </answer>.

"""


class Example(NamedTuple):
    """A puzzle ('0' for an empty cell) and one of its solutions, 16 or 81 characters each."""

    puzzle: str
    solution: str


@dataclass(frozen=True)
class Task:
    """Sudoku.

    Splits:
      train, validation, test: puzzles with exactly one solution, among 200, 44 and 44 grids
        that no two splits share.
      validation_multi, test_multi: puzzles with two or more solutions, all of them among the
        44 grids of that split; `Example.solution` is one of them.
        These two are for 4x4 alone. 9x9 puzzles have one solution; a hash of it says which
        split they belong to.
      d1, spg: the published 4x4 test files of d1 (500 puzzles, 124 of them with several
        solutions) and SPG (256). Their solutions are not kept out of `train`.

    All puzzles of a split are distinct. A split has fewer than asked for when no more exist.
    """

    size: int = 4
    """4 or 9."""
    style: str = "compact"
    """'compact': no prompt, the board's characters are the template. 'grid': the same with
    lines drawn between rows and boxes, 29 characters for 4x4; a small model learns the rules
    from it far sooner. 'template': rules and puzzle in the prompt, the <answer> given but for its
    empty cells (UPO). 'published': d1's format, rules and puzzle in the prompt, free text with an
    <answer> in the completion."""
    reward: str = "board"
    """'board': 1 for a board that keeps the givens and obeys the rules, else 0.
    'cells': d1's, the fraction of empty cells that equal the given solution."""
    protocol: str = "paper"
    """How the metrics of the published style read a completion. 'paper': the digits of the
    last <answer>. 'd1', 'spg': as by the authors' evaluation script, which takes the first
    answer, keeps words and separators, and calls a board solved if its empty cells are those
    of the given solution. The reward is not touched."""
    shots: int = 0
    """Worked examples in a published 4x4 prompt, at most 3: SPG trains and evaluates with all
    three of its puzzles, d1 with none. Their grids are then in the generated `train` and their
    puzzles in no generated split, as in SPG's."""
    blanks: Sequence[int] = (4, 12)
    """Fewest and most empty cells of a generated puzzle; all numbers are equally frequent as
    far as puzzles exist. No 4x4 puzzle with more than 12 has one solution; in a 9x9 puzzle
    there are fewer than asked for where all others are needed (common from 50 on)."""
    split_seed: int = 0
    """Divides the grids between the splits and draws the puzzles."""
    train_size: int = 10_000
    """Puzzles in 'train'."""
    held_out_size: int = 1024
    """Puzzles in each other generated split."""
    source: str = "generated"
    """'generated', or rows of a data set with the fields of `Example`: `jsonl:PATH`,
    `hf:NAME[/CONFIG][:SPLIT]`, `tfds:NAME` (see `dmrl.sources`), which launch/data.py writes."""
    data_dir: str | None = None
    """Directory holding sudoku/*.csv for the published splits; default $DMRL_DATA."""

    def __post_init__(self) -> None:
        one_of("style", self.style, ("compact", "grid", "template", "published"))
        one_of("reward", self.reward, ("board", "cells"))
        one_of("protocol", self.protocol, PROTOCOLS)
        if self.size not in (4, 9):
            raise ValueError(f"size={self.size!r} is not one of 4, 9")
        at_least("shots", self.shots, 0)
        there = len(SHOTS) if (self.size, self.style) == (4, "published") else 0
        if self.shots > there:
            raise ValueError(
                f"shots={self.shots}: for size={self.size} and style={self.style!r} there are "
                f"{there} worked examples, for size=4 and style='published' {len(SHOTS)}"
            )
        most = 12 if self.size == 4 else 60
        object.__setattr__(self, "blanks", span("blanks", self.blanks, 1, most))
        source_of_rows(self.source, "generated")
        at_least("split_seed", self.split_seed, 0)
        at_least("train_size", self.train_size, 1)
        at_least("held_out_size", self.held_out_size, 1)

    @property
    def alphabet(self) -> str:
        """Digits and lines of the board, or printable ASCII for the published prompts."""
        lines, digits = "".join(sorted(set(_lines(self._cells).values()))), _digits(self.size)
        return {"compact": digits, "grid": digits + lines}.get(self.style, TEXT)

    @property
    def _cells(self) -> int:
        return self.size * self.size

    @property
    def grid(self) -> list[list[int]] | None:
        """Which positions of a completion are the cells, row by row; None if it is free text."""
        if self.style == "published":
            return None
        lines = _lines(self._cells) if self.style == "grid" else {}
        cells = [i for i in range(self._cells + len(lines)) if i not in lines]
        return [cells[i : i + self.size] for i in range(0, self._cells, self.size)]

    @property
    def units(self) -> list[list[int]]:
        """The rows, columns and boxes, in cells counted along `grid`: no digit twice in any."""
        return boards.units(self._cells)

    def examples(self, split: str) -> Sequence[Example]:
        """The puzzles of a split, shuffled; the same on every call.

        Raises:
          ValueError: for an unknown split, or a published one without a data directory.
          FileNotFoundError: when the published file is not there.
        """
        one_of("split", split, _SPLITS if self.size == 4 else _GENERATED)
        if self.source != "generated" and split not in _PUBLISHED:
            return divided(self, split, self._example)
        if self.size == 9:
            return self._nine(split)
        if split in _PUBLISHED:
            with data_file(self.data_dir, _PUBLISHED[split]).open(newline="") as file:
                return [Example(row["Puzzle"], row["Solution"]) for row in csv.DictReader(file)]
        part, _, multi = split.partition("_")
        size = self.train_size if split == "train" else self.held_out_size
        told = SHOTS[: self.shots]
        inside = _division(self.split_seed, told)[_GENERATED.index(part)]
        pool = _several_solutions(inside) if multi else _one_solution(inside)
        for puzzle, solution in told:
            pool[inside == _number(solution), _mask(puzzle)] = False
        rng = np.random.default_rng([self.split_seed, _SPLITS.index(split)])
        row, mask = _draw(pool, self.blanks, size, rng)
        solved = grids()[inside[row]]
        puzzles = np.where(_BLANKS[mask], 0, solved)
        return [Example(p, s) for p, s in zip(_texts(puzzles), _texts(solved), strict=True)]

    def _example(self, row: dict[str, Any]) -> Example:
        puzzle, solution = str(row["puzzle"]), str(row["solution"])
        if not is_solution(puzzle, solution) or len(puzzle) != self._cells:
            raise ValueError(f"{solution!r} does not solve the {self.size}x{self.size} {puzzle!r}")
        return Example(puzzle, solution)

    def prompt(self, example: Example) -> str:
        """Empty where the template says it all."""
        if self.style not in ("published", "template"):
            return ""
        digits, box = ", ".join(_digits(self.size)), math.isqrt(self.size)
        digits = " and ".join(digits.rsplit(", ", 1))
        values = {"size": self.size, "cells": self._cells, "box": box, "digits": digits}
        asked = asking(example.puzzle)
        if self.shots:
            shots = "\n".join(map(shown, SHOTS[: self.shots]))
            asked = f"{shots}\nQuestion:\n{asked}Answer:\n"
        asked = f"{_PROMPT.format(**values)}{asked}"
        return f"{FORMAT}\n{asked}" if self.style == "published" else asked

    def _nine(self, split: str) -> list[Example]:
        """9x9 puzzles, some 0.05 s each."""
        rng = np.random.default_rng([self.split_seed, 9, _GENERATED.index(split)])
        size = self.train_size if split == "train" else self.held_out_size
        wanted = range(self.blanks[0], self.blanks[1] + 1)
        found: dict[str, Example] = {}
        while len(found) < size:
            grid = boards.random_grid(rng, self._cells)
            while zlib.crc32(f"{self.split_seed} {grid}".encode()) % 8 not in _BUCKETS[split]:
                grid = boards.relabelled(rng, grid)
            puzzle = boards.dig(rng, grid, wanted[len(found) % len(wanted)])
            found.setdefault(puzzle, Example(puzzle, grid))
        return [list(found.values())[i] for i in rng.permutation(len(found))]

    def template(self, example: Example) -> str | None:
        """The board with BLANK in its empty cells; None in the published style."""
        if self.style == "published":
            return None
        return self._drawn(example.puzzle.replace("0", BLANK))

    def answer(self, example: Example) -> str:
        """The solved board, in <answer> tags in the published style."""
        return self._drawn(example.solution)

    def trace(self, example: Example) -> list[tuple[str, bool]]:
        """The answer in pieces; the empty cells, one a piece, may be given away (not all)."""
        unsolved = example._replace(solution=example.puzzle.replace("0", BLANK))
        pairs = zip(self.answer(example), self.answer(unsolved), strict=True)
        pieces: list[tuple[str, bool]] = []
        for empty, run in itertools.groupby(pairs, key=lambda pair: pair[1] == BLANK):
            characters = [character for character, _ in run]
            if empty:
                pieces += [(cell, True) for cell in characters]
            else:
                pieces.append(("".join(characters), False))
        return pieces

    def score(self, example: Example, completion: str) -> dict[str, float]:
        """Reward and both metrics, never to be mixed.

        Returns:
          reward: as the option `reward` says.
          solved: 1.0 if the board keeps the givens and obeys the rules, else 0.0. In the
            published style under 'd1' and 'spg': if all empty cells are as in the solution.
          cells: fraction of the empty cells that equal `example.solution` (0.0 if none is
            empty). Givens that were overwritten cost nothing here, as published.
        """
        board = self._board(completion)
        solved = float(is_solution(example.puzzle, board))
        cells = _right_cells(example, board)
        reward = solved if self.reward == "board" else cells
        if self.style == "published" and self.protocol != "paper":
            cells = _right_cells(example, parsers.sudoku(completion).ljust(self._cells, "0"))
            solved = float(cells == 1.0)
        return {"reward": reward, "solved": solved, "cells": cells}

    def empty(self, example: Example) -> int:
        """The number of empty cells, over which the authors average."""
        return example.puzzle.count("0")

    def truth(self, example: Example) -> Any:
        """What `recorded` makes the example of again, beside its prompt: the given solution."""
        return example.solution

    def recorded(self, question: str, truth: Any) -> Example:
        """The example of a saved generation: the last puzzle in its question, and its solution.

        Raises:
          ValueError: no puzzle of 16 (or 81) digits stands in the question.
        """
        found = re.findall(f"[0-{self.size}]{{{self._cells}}}", question)
        if not found:
            raise ValueError(
                f"no puzzle of {self._cells} digits from 0 to {self.size} in {question!r}"
            )
        return Example(found[-1], str(truth))

    def _drawn(self, board: str) -> str:
        if self.style in ("published", "template"):
            return f"<answer>\n{board}\n</answer>"
        return _drawing(self._cells).format(*board) if self.style == "grid" else board

    def _board(self, completion: str) -> str:
        """The cells of a completion in order; "" where the lines are not as drawn."""
        if self.style in ("published", "template"):
            paper = self.protocol == "paper"
            return _published_board(finished(completion) if paper else completion, self._cells)
        if self.style == "compact":
            return completion
        lines = _lines(self._cells)
        intact = all(completion[i : i + 1] == line for i, line in lines.items())
        if not intact or len(completion) != self._cells + len(lines):
            return ""
        return "".join(c for i, c in enumerate(completion) if i not in lines)


def _right_cells(example: Example, board: str) -> float:
    """Fraction of the empty cells that agree with the given solution."""
    wanted = [c for c, given in enumerate(example.puzzle) if given == "0"]
    right = sum(board[c : c + 1] == example.solution[c] for c in wanted)
    return right / len(wanted) if wanted else 0.0


def is_solution(puzzle: str, board: str) -> bool:
    """Whether `board` keeps the puzzle's givens and obeys the rules."""
    if len(board) != len(puzzle):
        return False
    digits = set(_digits(math.isqrt(len(puzzle))))
    keeps = all(given in ("0", cell) for given, cell in zip(puzzle, board, strict=True))
    return keeps and all({board[c] for c in unit} == digits for unit in boards.units(len(puzzle)))


def solutions(puzzle: str) -> list[str]:
    """All solutions of a 4x4 puzzle, sorted.

    Raises:
      ValueError: unless the puzzle is 16 characters from 0 to 4.
    """
    if len(puzzle) != CELLS or not set(puzzle) <= set("01234"):
        raise ValueError(f"puzzle={puzzle!r} is not {CELLS} characters from 0 to 4")
    givens = np.array(list(puzzle), np.uint8)
    agrees = (givens == 0) | (grids() == givens)
    return _texts(grids()[agrees.all(axis=1)])


@functools.cache
def grids() -> NDArray[np.uint8]:
    """[288, 16] every solved grid, digits 1..4, in lexicographic order. Read only."""
    rows = np.array(list(itertools.permutations(range(1, 5))), np.uint8)
    band = np.concatenate([np.repeat(rows, 24, axis=0), np.tile(rows, (24, 1))], axis=1)
    band = band[_complete(band[:, _BOXES[:2]])]
    n = len(band)
    grid = np.concatenate([np.repeat(band, n, axis=0), np.tile(band, (n, 1))], axis=1)
    grid = grid[_complete(grid[:, _ROWS.T])]
    grid.setflags(write=False)
    return grid


def _complete(units: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """[n, units, 4] digits -> [n] whether every unit holds all four."""
    found: NDArray[np.bool_] = (np.sort(units, axis=2) == np.arange(1, 5)).all(axis=(1, 2))
    return found


def _number(board: str) -> int:
    """The index of a solved 4x4 board in `grids()`."""
    return int(np.flatnonzero((grids() == np.array(list(board), np.uint8)).all(axis=1))[0])


def _mask(puzzle: str) -> int:
    """The blank mask of a puzzle."""
    return sum(1 << c for c, digit in enumerate(puzzle) if digit == "0")


def _division(seed: int, told: Sequence[tuple[str, str]]) -> list[NDArray[np.int64]]:
    """The grids of train, validation and test, as indices into `grids()`; those of worked
    examples in train."""
    order = np.random.default_rng(seed).permutation(len(grids()))
    first = np.array([_number(solution) for _, solution in told], np.int64)
    order = np.concatenate([first, order[~np.isin(order, first)]])
    return np.split(order, [TRAIN_GRIDS, TRAIN_GRIDS + HELD_OUT_GRIDS])


def _solution_counts(inside: NDArray[np.int64], counted: NDArray[np.bool_]) -> NDArray[np.uint16]:
    """How many counted grids solve each puzzle: [n] grids, [n, 288] counted -> [n, 65536].

    Grid k solves the puzzle that blanks the cells `mask` of grid g exactly when g and k
    differ only within `mask`, so the count is a sum over subsets of the mask: one pass a bit.
    """
    differ = (grids()[inside, None] != grids()) @ (1 << np.arange(CELLS))
    count = np.zeros((len(inside), 1 << CELLS), np.uint16)
    np.add.at(count, (np.arange(len(inside))[:, None], differ), counted)
    for bit in range(CELLS):
        halves = count.reshape(len(inside), -1, 2, 1 << bit)
        halves[:, :, 1] += halves[:, :, 0]
    return count


def _one_solution(inside: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[n, 65536] whether the puzzle of grid `inside[i]` with that blank mask is unique."""
    return _solution_counts(inside, np.ones((len(inside), len(grids())), bool)) == 1


def _several_solutions(inside: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[n, 65536] puzzles with two or more solutions, all of them inside, each puzzle once."""
    every = np.ones((len(inside), len(grids())), bool)
    member = np.isin(np.arange(len(grids())), inside)
    earlier = member & (np.arange(len(grids())) < inside[:, None])
    count = _solution_counts(inside, every)
    closed = count == _solution_counts(inside, every & member)
    return (count >= 2) & closed & (_solution_counts(inside, earlier) == 0)


def _draw(
    pool: NDArray[np.bool_], blanks: Sequence[int], size: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draws (row, blank mask) pairs without repeats, spread evenly over the numbers of blanks.

    Numbers of blanks with few puzzles come first, so that the others make up for them.
    """
    number = _BLANKS.sum(axis=1)
    kinds = []
    for blank in range(blanks[0], blanks[1] + 1):
        masks = np.flatnonzero(number == blank)
        kinds.append((masks, np.flatnonzero(pool[:, masks])))
    kinds.sort(key=lambda kind: len(kind[1]))
    drawn = []
    for i, (masks, places) in enumerate(kinds):
        share = min(len(places), size // (len(kinds) - i))
        size -= share
        row, column = np.divmod(rng.choice(places, share, replace=False), len(masks))
        drawn.append(np.stack([row, masks[column]]))
    shuffled = rng.permutation(np.concatenate(drawn, axis=1), axis=1)
    return shuffled[0], shuffled[1]


def _texts(boards: NDArray[np.uint8]) -> list[str]:
    text = (boards.astype(np.uint8) + ord("0")).tobytes().decode()
    return [text[i : i + CELLS] for i in range(0, len(text), CELLS)]


def _digits(size: int) -> str:
    return "123456789"[:size]


def _published_board(completion: str, cells: int) -> str:
    """d1's reading of an answer: its digits, cut or filled up with '0'."""
    digits = filter(str.isdigit, last_answer(completion) or "")
    return "".join(itertools.islice(digits, cells)).ljust(cells, "0")
