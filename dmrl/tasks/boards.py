"""Sudoku boards of any box size: solving, and drawing puzzles with one solution.

A board is a string read row by row, '0' for an empty cell.
"""

import functools
import math

import numpy as np


@functools.cache
def units(cells: int) -> list[list[int]]:
    """The rows, columns and boxes of a board of `cells` cells, as lists of cells."""
    size = math.isqrt(cells)
    box = math.isqrt(size)
    rows = np.arange(cells).reshape(size, size)
    boxes = rows.reshape(box, box, box, box).swapaxes(1, 2).reshape(size, size)
    found: list[list[int]] = np.concatenate([rows, rows.T, boxes]).tolist()
    return found


@functools.cache
def _peers(cells: int) -> list[frozenset[int]]:
    return [
        frozenset(c for unit in units(cells) if cell in unit for c in unit) - {cell}
        for cell in range(cells)
    ]


def solve(puzzle: str, most: int = 2, rng: np.random.Generator | None = None) -> list[str]:
    """Solutions of a puzzle, `most` of them at the most, in random order if `rng` is given.

    Fills the cell with the fewest digits left first: under a millisecond for 9x9 puzzles with
    one solution and some fifty empty cells.
    """
    cells, size = len(puzzle), math.isqrt(len(puzzle))
    left = [(1 << size) - 1] * cells
    for cell, digit in enumerate(puzzle):
        if digit != "0" and not _put(left, cell, 1 << (int(digit) - 1)):
            return []
    found: list[str] = []
    _search(left, found, most, rng)
    return found


def _put(left: list[int], cell: int, bit: int) -> bool:
    """Puts a digit into a cell and all that follows from it; False on a contradiction."""
    if not left[cell] & bit:
        return False
    left[cell] = bit
    for peer in _peers(len(left))[cell]:
        if left[peer] & bit:
            rest = left[peer] & ~bit
            if not rest:
                return False
            left[peer] = rest
            if rest & (rest - 1) == 0 and not _put(left, peer, rest):
                return False
    return True


def _search(left: list[int], found: list[str], most: int, rng: np.random.Generator | None) -> None:
    open_cells = [cell for cell, bits in enumerate(left) if bits & (bits - 1)]
    if not open_cells:
        found.append("".join(str(bits.bit_length()) for bits in left))
        return
    cell = min(open_cells, key=lambda c: left[c].bit_count())
    bits = [1 << d for d in range(math.isqrt(len(left))) if left[cell] >> d & 1]
    if rng is not None:
        bits = [bits[i] for i in rng.permutation(len(bits))]
    for bit in bits:
        branch = left.copy()
        if _put(branch, cell, bit):
            _search(branch, found, most, rng)
        if len(found) >= most:
            return


def random_grid(rng: np.random.Generator, cells: int) -> str:
    """A solved board."""
    return solve("0" * cells, 1, rng)[0]


def relabelled(rng: np.random.Generator, grid: str) -> str:
    """The same board with its digits exchanged at random: a solved board again."""
    size = math.isqrt(len(grid))
    new = rng.permutation(size) + 1
    return "".join(str(new[int(digit) - 1]) for digit in grid)


def dig(rng: np.random.Generator, grid: str, blanks: int) -> str:
    """Empties up to `blanks` cells of a solved board in random order, keeping one solution.

    Fewer where every other cell is needed; from 50 of 81 on that is common.
    """
    board = list(grid)
    for cell in rng.permutation(len(grid)):
        if board.count("0") == blanks:
            break
        digit, board[cell] = board[cell], "0"
        if len(solve("".join(board))) > 1:
            board[cell] = digit
    return "".join(board)
