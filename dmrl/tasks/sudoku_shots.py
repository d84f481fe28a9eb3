"""SPG's three worked examples of a 4x4 Sudoku (arXiv 2510.09541, appendix G.3).

Puzzles, order and form are the paper's: the rows, the cells one after the other, the solved rows,
the answer. The lines that say why a cell has its digit are our solver's.
"""

import math

from dmrl.tasks import boards

SHOTS = (
    ("3014002020004130", "3214142323414132"),
    ("0000100420013142", "4213132424313142"),
    ("2001403002001420", "2341413232141423"),
)
"""Puzzles and their solutions."""


def asking(puzzle: str) -> str:
    """The line that asks."""
    return f"Solve the following Sudoku puzzle: {puzzle}\n"


def shown(shot: tuple[str, str]) -> str:
    """A worked example as it stands in the prompt."""
    puzzle, solution = shot
    lines = [*_rows(puzzle), "", *forced(puzzle), "", *_rows(solution)]
    reasoning = "\n".join(lines)
    answer = f"<answer>\n{solution}\n</answer>\n"
    return f"Question:\n{asking(puzzle)}Answer:\n<reasoning>\n{reasoning}\n</reasoning>\n{answer}"


def _rows(board: str) -> list[str]:
    size = math.isqrt(len(board))
    return [f"R{i + 1}: {' '.join(board[i * size : (i + 1) * size])}" for i in range(size)]


def forced(puzzle: str) -> list[str]:
    """A line for every empty cell: which digits it sees, and which is left.

    Raises:
      ValueError: a guess is needed.
    """
    board, lines = puzzle, []
    size, units = math.isqrt(len(puzzle)), boards.units(len(puzzle))
    while "0" in board:
        for cell in (c for c, digit in enumerate(board) if digit == "0"):
            seen = {board[c] for unit in units if cell in unit for c in unit} - {"0"}
            if len(seen) == size - 1:
                break
        else:
            raise ValueError(f"{puzzle} needs a guess at {board}")
        (digit,) = set("123456789"[:size]) - seen
        place = f"R{cell // size + 1}C{cell % size + 1}"
        lines.append(f"{place} sees {', '.join(sorted(seen))}: {place}={digit}.")
        board = board[:cell] + digit + board[cell + 1 :]
    return lines
