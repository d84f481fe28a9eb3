"""4x4 Sudoku: rules, rewards, and splits that share no solution."""

import collections
import itertools
import re

import pytest

from dmrl import tasks
from dmrl.tasks import BLANK, boards, sudoku, sudoku_shots

PUZZLE = sudoku.Example("4320004330100004", "4321124334122134")


def obeys_rules(board):
    units = [[4 * i + j for j in range(4)] for i in range(4)]
    units += [[4 * j + i for j in range(4)] for i in range(4)]
    units += [[8 * i + 2 * j + k for k in (0, 1, 4, 5)] for i in (0, 1) for j in (0, 1)]
    return all(sorted(board[c] for c in unit) == list("1234") for unit in units)


def test_all_288_grids_are_enumerated():
    texts = {"".join(map(str, grid)) for grid in sudoku.grids().tolist()}
    assert sudoku.grids().shape == (288, 16)
    assert len(texts) == 288
    assert all(obeys_rules(text) for text in texts)


def test_solutions_of_a_puzzle():
    assert sudoku.solutions(PUZZLE.solution) == [PUZZLE.solution]
    assert len(sudoku.solutions("0" * 16)) == 288
    # The empty pairs, 1 and 2 in the first row against 2 and 1 in the third, fit both ways.
    two = ["1234341221434321", "2134341212434321"]
    assert sudoku.solutions("0034341200434321") == two
    assert sudoku.solutions("1100000000000000") == []


@pytest.mark.parametrize("puzzle", ["", "123", "5" * 16, "." * 16])
def test_solutions_rejects_what_is_no_puzzle(puzzle):
    with pytest.raises(ValueError, match="16 characters from 0 to 4"):
        sudoku.solutions(puzzle)


@pytest.mark.parametrize(
    "board",
    [
        "1234234134124123",  # boxes repeat digits
        "1234341212343412",  # columns do
        "1133224433114422",  # rows do
        "1234341221434325",  # 5 is no digit here
        "123434122143432",
        "12343412214343211",
        "",
    ],
)
def test_is_solution_refuses(board):
    assert not sudoku.is_solution("0" * 16, board)
    assert sudoku.is_solution("0" * 16, "1234341221434321")


def test_board_reward_wants_rules_and_givens():
    task = tasks.load("sudoku")
    right = dict.fromkeys(("reward", "solved", "cells"), 1.0)
    assert task.score(PUZZLE, PUZZLE.solution) == right
    # Another valid grid breaks the givens: the columns of the solution, reversed.
    other = "".join(PUZZLE.solution[4 * r : 4 * r + 4][::-1] for r in range(4))
    assert obeys_rules(other)
    assert task.score(PUZZLE, other)["reward"] == 0.0
    # An overwritten given costs the board but, as published, no cell (the last cell is given).
    broken = PUZZLE.solution[:-1] + "1"
    assert task.score(PUZZLE, broken) == {"reward": 0.0, "solved": 0.0, "cells": 1.0}


def test_board_reward_accepts_every_solution_of_a_puzzle():
    task = tasks.load("sudoku")
    example = task.examples("test_multi")[0]
    found = sudoku.solutions(example.puzzle)
    scores = {board: task.score(example, board) for board in found}
    assert len(found) > 1
    assert all(score["solved"] == 1.0 for score in scores.values())
    assert [b for b, score in scores.items() if score["cells"] == 1.0] == [example.solution]


def test_cells_reward_is_the_fraction_of_empty_cells():
    task = tasks.load("sudoku", reward="cells")
    # Empty cells 3, 4, 5, 9, 11, 12, 13, 14; right in cell 3 alone, then in the first three.
    assert task.score(PUZZLE, "4321" + "0" * 12)["reward"] == 1 / 8
    assert task.score(PUZZLE, "432112" + "0" * 10)["reward"] == 3 / 8


def test_compact_boards_are_read_by_position():
    task = tasks.load("sudoku", reward="cells")
    shifted = PUZZLE.solution[0] + "x" + PUZZLE.solution[1:15]
    assert task.score(PUZZLE, PUZZLE.solution[:3] + "x" + PUZZLE.solution[4:])["cells"] == 7 / 8
    assert task.score(PUZZLE, shifted)["cells"] < 7 / 8
    assert task.score(PUZZLE, PUZZLE.solution[:3])["cells"] == 0.0
    assert task.score(PUZZLE, PUZZLE.solution + "1")["solved"] == 0.0


def test_compact_template_is_the_board():
    task = tasks.load("sudoku")
    assert task.prompt(PUZZLE) == ""
    assert task.template(PUZZLE) == f"432{BLANK * 3}433{BLANK}1{BLANK * 4}4"
    assert set(task.template(PUZZLE)) - {BLANK} <= set(task.alphabet)


def test_drawn_board_has_lines_between_rows_and_boxes():
    task = tasks.load("sudoku", style="grid")
    drawn = task.template(PUZZLE)
    assert drawn == "43|2_\n__|43\n--+--\n3_|1_\n__|_4"
    assert task.prompt(PUZZLE) == ""
    assert set(drawn) - {BLANK} | set("1234") == set(task.alphabet)
    assert "".join(drawn[c] for row in task.grid for c in row) == PUZZLE.puzzle.replace("0", BLANK)


def test_drawn_board_is_scored_cell_by_cell_and_only_as_drawn():
    task = tasks.load("sudoku", style="grid")
    answer = task.answer(PUZZLE)
    assert task.score(PUZZLE, answer) == {"reward": 1.0, "solved": 1.0, "cells": 1.0}
    one_wrong = answer[:4] + "4" + answer[5:]
    assert answer[4] != "4"
    assert task.score(PUZZLE, one_wrong) == {"reward": 0.0, "solved": 0.0, "cells": 7 / 8}
    for spoiled in (answer[:-1], answer + "4", answer.replace("+", "-"), answer[1:] + "1"):
        assert task.score(PUZZLE, spoiled)["solved"] == 0.0, spoiled


def test_the_template_style_asks_and_gives_the_answer_but_for_its_empty_cells():
    task = tasks.load("sudoku", style="template", held_out_size=1)
    example = task.examples("test")[0]
    assert example.puzzle in task.prompt(example)
    template = task.template(example)
    assert template == f"<answer>\n{example.puzzle.replace('0', tasks.BLANK)}\n</answer>"
    assert template.count(tasks.BLANK) == task.empty(example)
    assert task.score(example, template.replace(tasks.BLANK, "1"))["solved"] == 0


@pytest.mark.parametrize("style", ["compact", "grid", "template", "published"])
def test_reference_answers_solve_the_board(style):
    task = tasks.load("sudoku", style=style, held_out_size=20)
    for example in task.examples("validation"):
        assert task.score(example, task.answer(example))["solved"] == 1.0


def test_sudoku_splits_share_no_solution():
    task = tasks.load("sudoku")
    splits = {name: task.examples(name) for name in ("train", "validation", "test")}
    grids = {name: {e.solution for e in found} for name, found in splits.items()}
    assert {name: len(found) for name, found in splits.items()} == {
        "train": 10_000,
        "validation": 1024,
        "test": 1024,
    }
    assert {name: len(found) for name, found in grids.items()} == {
        "train": 200,
        "validation": 44,
        "test": 44,
    }
    for a, b in itertools.combinations(grids.values(), 2):
        assert not a & b


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_sudoku_puzzles_have_one_solution(split):
    found = tasks.load("sudoku", train_size=1024).examples(split)
    assert len({e.puzzle for e in found}) == len(found) == 1024
    for example in found[:300]:
        assert sudoku.solutions(example.puzzle) == [example.solution]
    blanks = collections.Counter(e.puzzle.count("0") for e in found)
    assert sorted(blanks) == list(range(4, 13))
    assert max(blanks.values()) - min(blanks.values()) <= 1


@pytest.mark.parametrize("split", ["validation", "test"])
def test_multi_puzzles_keep_all_solutions_in_their_split(split):
    task = tasks.load("sudoku")
    grids = {e.solution for e in task.examples(split)}
    found = task.examples(f"{split}_multi")
    assert len({e.puzzle for e in found}) == len(found) == 1024
    for example in found[:300]:
        every = sudoku.solutions(example.puzzle)
        assert len(every) >= 2
        assert example.solution in every
        assert set(every) <= grids


def test_blanks_limit_the_empty_cells_and_the_supply():
    # 12 empty cells: 25,728 unique puzzles over 288 grids, 17,828 of them in these 200.
    found = tasks.load("sudoku", blanks=[12, 12], train_size=100_000).examples("train")
    assert {e.puzzle.count("0") for e in found} == {12}
    assert len({e.puzzle for e in found}) == len(found) == 17_828


def test_sudoku_seed_changes_the_division():
    solutions = [{e.solution for e in sudoku.Task(split_seed=s).examples("test")} for s in (0, 1)]
    assert solutions[0] != solutions[1]


@pytest.mark.parametrize(("split", "size"), [("d1", 500), ("spg", 256)])
def test_published_sudoku_files(data_dir, split, size):
    found = tasks.load("sudoku", data_dir=str(data_dir)).examples(split)
    assert len(found) == size
    assert all(sudoku.is_solution(e.puzzle, e.solution) for e in found)
    unique = sum(len(sudoku.solutions(e.puzzle)) == 1 for e in found)
    assert unique == {"d1": 376, "spg": 256}[split]  # published


def test_boards_are_solved_like_by_enumeration():
    for example in tasks.load("sudoku").examples("test_multi")[:50]:
        every = sudoku.solutions(example.puzzle)
        assert sorted(boards.solve(example.puzzle, most=300)) == every
        assert len(boards.solve(example.puzzle)) == 2
    assert len(boards.solve("0" * 16, most=300)) == 288
    assert boards.solve("11" + "0" * 79) == []


@pytest.fixture(scope="module")
def nine():
    return tasks.load("sudoku", size=9, blanks=(30, 50), train_size=3, held_out_size=3)


def test_nine_by_nine_puzzles_have_one_solution(nine):
    units = [[9 * i + j for j in range(9)] for i in range(9)]
    units += [[9 * j + i for j in range(9)] for i in range(9)]
    units += [
        [27 * i + 3 * j + 9 * k + m for k in range(3) for m in range(3)]
        for i in range(3)
        for j in range(3)
    ]
    splits = {s: nine.examples(s) for s in ("train", "validation", "test")}
    for example in (e for found in splits.values() for e in found):
        assert all({example.solution[c] for c in unit} == set("123456789") for unit in units)
        assert boards.solve(example.puzzle) == [example.solution]
        assert 30 <= example.puzzle.count("0") <= 50
    grids = [{e.solution for e in found} for found in splits.values()]
    assert [len(g) for g in grids] == [3, 3, 3]
    assert not grids[0] & grids[1]
    assert not (grids[0] | grids[1]) & grids[2]
    assert nine.examples("test") == splits["test"]


@pytest.mark.parametrize("style", ["compact", "grid", "published"])
def test_nine_by_nine_answers(nine, style):
    task = tasks.load("sudoku", size=9, style=style)
    for example in nine.examples("test"):
        answer = task.answer(example)
        assert task.score(example, answer)["solved"] == 1.0
        assert set(task.prompt(example)) | set(answer) <= set(task.alphabet)
        cell = example.puzzle.index("0")
        wrong = str(int(example.solution[cell]) % 9 + 1)
        board = example.solution[:cell] + wrong + example.solution[cell + 1 :]
        spoiled = task.score(example, task.answer(example._replace(solution=board)))
        empty = example.puzzle.count("0")
        assert spoiled["solved"] == 0.0
        assert spoiled["cells"] == pytest.approx((empty - 1) / empty)
    if style != "published":
        drawn = task.template(example)
        cells = "".join(drawn[c] for row in task.grid for c in row)
        assert cells == example.puzzle.replace("0", BLANK)


def test_nine_by_nine_has_no_published_splits():
    with pytest.raises(ValueError, match="split='d1' is not one of 'train', 'validation', 'test'"):
        tasks.load("sudoku", size=9).examples("d1")
    with pytest.raises(ValueError, match="size=5 is not one of 4, 9"):
        tasks.load("sudoku", size=5)


def shots(count=3, **options):
    return tasks.load("sudoku", style="published", shots=count, **options)


def test_worked_examples_stand_before_the_question_and_are_right():
    prompt = shots().prompt(PUZZLE)
    assert prompt.startswith(shots(0).prompt(PUZZLE).partition("Solve the following")[0])
    assert prompt.endswith(
        f"Question:\nSolve the following Sudoku puzzle: {PUZZLE.puzzle}\nAnswer:\n"
    )
    assert shots(0).prompt(PUZZLE).endswith(f"Solve the following Sudoku puzzle: {PUZZLE.puzzle}\n")
    for shot in sudoku_shots.SHOTS:
        assert sudoku.solutions(shot[0]) == [shot[1]]
        told = prompt.partition(f"puzzle: {shot[0]}\n")[2].partition("Question:")[0]
        assert shots().score(sudoku.Example(*shot), told)["solved"] == 1.0
        cells = re.findall(r": R([1-4])C([1-4])=([1-4])\.", told)
        assert len(cells) == shot[0].count("0")
        board = dict(enumerate(shot[0])) | {4 * int(r) + int(c) - 5: d for r, c, d in cells}
        assert "".join(board.values()) == shot[1]
    assert [shots(n).prompt(PUZZLE).count("Question:") for n in (0, 1, 2, 3)] == [0, 2, 3, 4]
    assert set(prompt) <= set(shots().alphabet)


def test_a_cell_is_filled_only_where_no_guess_is_needed():
    with pytest.raises(ValueError, match="needs a guess at 0034341200434321"):
        sudoku_shots.forced("0034341200434321")


def test_worked_examples_stay_out_of_what_is_measured():
    splits = ("train", "validation", "test", "validation_multi", "test_multi")
    grids = {grid for _, grid in sudoku_shots.SHOTS}
    seed = next(  # one whose own division holds such a grid out
        s
        for s in range(50)
        if grids - {e.solution for e in shots(0, split_seed=s, train_size=4000).examples("train")}
    )
    task = shots(split_seed=seed)
    found = {split: task.examples(split) for split in splits}
    assert grids <= {e.solution for e in found["train"]}
    for split, examples in found.items():
        assert not {e.puzzle for e in examples} & {puzzle for puzzle, _ in sudoku_shots.SHOTS}
        if split != "train":
            assert not {e.solution for e in examples} & grids
            assert not grids & {g for e in examples for g in sudoku.solutions(e.puzzle)}


@pytest.mark.parametrize("options", [{"size": 9}, {"style": "grid"}, {"shots": 4}])
def test_examples_that_do_not_exist_are_refused(options):
    with pytest.raises(ValueError, match=r"shots=\d: for size=\d and style='\w+' there are [03] w"):
        tasks.load("sudoku", **{"style": "published", "shots": 1} | options)


def test_the_puzzle_of_a_saved_question_with_examples_is_its_last():
    assert shots().recorded(shots().prompt(PUZZLE), PUZZLE.solution) == PUZZLE
