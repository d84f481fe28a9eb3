"""Zebra puzzles: one solution, no needless clue, disjoint splits, reading of answers."""

import itertools

import pytest

from dmrl import tasks
from dmrl.tasks import BLANK, zebra

HOLDS = {
    "=": lambda a, b: a == b,
    "<": lambda a, b: a < b,
    "-": lambda a, b: a == b - 1,
    "~": lambda a, b: a - b in (1, -1),
    "@": lambda a, b: a == b,
    "!": lambda a, b: a != b,
}


def by_hand(houses, rows, clues):
    """All grids that agree with the clues, by trying every one."""
    found = []
    for grid in itertools.product(itertools.permutations(range(houses)), repeat=rows):

        def place(value, grid=grid):
            return value[1] if value[0] < 0 else grid[value[0]].index(value[1])

        if all(HOLDS[c.kind](place(c.a), place(c.b)) for c in clues):
            found.append(grid)
    return found


@pytest.fixture(scope="module")
def small():
    return zebra.Task(houses=(3, 3), held_out_size=25, train_size=25)


def test_puzzles_have_one_solution_and_need_every_clue(small):
    for example in small.examples("validation")[:8]:
        rows = len(example.grid)
        assert by_hand(3, rows, example.clues) == [example.grid]
        for clue in example.clues:
            rest = [c for c in example.clues if c != clue]
            assert len(by_hand(3, rows, rest)) > 1


def test_the_solver_finds_all_solutions(small):
    clues = small.examples("test")[0].clues[:2]
    found = zebra.solutions(3, 3, clues, most=10_000)
    assert sorted(found) == sorted(by_hand(3, 3, clues))
    assert len(set(found)) == len(found) > 1
    assert len(zebra.solutions(3, 3, clues)) == 2
    contradiction = [zebra.Clue("@", (0, 0), (-1, 1)), zebra.Clue("!", (0, 0), (-1, 1))]
    assert zebra.solutions(3, 3, contradiction) == []


def test_splits_share_no_solution(small):
    splits = {s: small.examples(s) for s in ("train", "validation", "test")}
    grids = [{e.grid for e in found} for found in splits.values()]
    for a, b in itertools.combinations(grids, 2):
        assert not a & b
    assert all(len({e.clues for e in found}) == len(found) == 25 for found in splits.values())
    assert small.examples("test") == splits["test"]
    other = zebra.Task(houses=(3, 3), held_out_size=25, train_size=25, split_seed=1)
    assert {e.grid for e in other.examples("test")} != grids[2]


def test_sizes_up_to_six_houses_and_five_attributes():
    task = zebra.Task(style="published", houses=(4, 5), attributes=(3, 4), held_out_size=4)
    found = task.examples("test")
    assert {(e.houses, len(e.grid)) for e in found} == {(4, 3), (4, 4), (5, 3), (5, 4)}
    for example in found:
        assert zebra.solutions(example.houses, len(example.grid), example.clues) == [example.grid]
        assert task.score(example, task.answer(example))["solved"] == 1.0


@pytest.mark.parametrize("style", ["compact", "published"])
def test_answers_fill_the_template_and_earn_everything(small, style):
    task = zebra.Task(style=style, houses=(3, 3), held_out_size=25)
    for example in small.examples("test"):
        text = task.answer(example)
        assert task.score(example, text) == {"reward": 1.0, "solved": 1.0, "cells": 1.0}
        assert set(task.prompt(example)) | set(text) <= set(task.alphabet)
        if style == "compact":
            template = task.template(example)
            assert len(template) == len(text)
            blanks = [i for i, c in enumerate(template) if c == BLANK]
            assert blanks == [i for row in task.grid for i in row]


def test_cells_are_counted_one_by_one(small):
    example = small.examples("test")[0]
    text = small.answer(example)
    assert small.score(example, "9" + text[1:])["cells"] == pytest.approx(8 / 9)
    assert small.score(example, "9" + text[1:])["solved"] == 0.0
    for spoiled in ("", text[:-1], text + "1", text.replace("\n", ""), "\n" * 11):
        assert small.score(example, spoiled)["cells"] == 0.0
    strict = zebra.Task(houses=(3, 3), reward="grid")
    assert strict.score(example, "9" + text[1:])["reward"] == 0.0
    assert strict.score(example, text)["reward"] == 1.0
    told = zebra.Task(style="published", houses=(3, 3))
    lines = told.answer(example).split("\n")
    shuffled = "\n".join([lines[0], lines[3], lines[1].upper(), lines[2], lines[4]])
    assert told.score(example, shuffled)["solved"] == 1.0
    assert told.score(example, "\n".join([*lines[:3], lines[4]]))["cells"] == pytest.approx(6 / 9)


def test_clues_are_written_twice():
    example = zebra.Example(
        3, (zebra.Clue("-", (0, 1), (2, 0)), zebra.Clue("!", (1, 2), (-1, 0))), ((0, 1, 2),) * 3
    )
    assert zebra.Task(houses=(3, 3)).prompt(example) == "3;a2-c1;b3!1:"
    text = zebra.Task(style="published").prompt(example)
    assert "house with color green is directly to the left of the house with drink tea." in text
    assert "house with pet fish is not house 1." in text


def test_a_template_has_one_size():
    with pytest.raises(ValueError, match=r"houses=\(3, 4\): templates have one length"):
        tasks.load("zebra", houses=(3, 4))
    with pytest.raises(ValueError, match=r"houses=.*3 <= first <= last <= 6"):
        tasks.load("zebra", houses=(2, 3))


def test_worked_puzzles_are_of_train_and_right():
    options = {"style": "published", "houses": (3, 3), "attributes": (3, 3)}
    none = zebra.Task(held_out_size=2, **options)
    two = zebra.Task(held_out_size=2, shots=2, train_size=5, **options)
    example = two.examples("test")[0]
    start, first, second = two.prompt(example).split("Question:\n")
    assert none.prompt(example) == start + second.partition("</answer>\n\n")[2]
    train = {none.prompt(e).removeprefix(start): e for e in two.examples("train")}
    for piece in (first, second):
        asked, _, told = piece.partition("\nAnswer:\n")
        assert two.score(train[asked], told.partition("\n\n")[0])["solved"] == 1.0
    with pytest.raises(ValueError, match="shots=2: prompts in style='compact' have no examples"):
        zebra.Task(shots=2)
