"""The easy problems of GSM8K's and MATH's form: right, distinct, read by these tasks."""

import re
from fractions import Fraction

import pytest

from dmrl import tasks, tokenizer
from dmrl.tasks import arithmetic, problems

LONGEST = {"gsm8k": (4235, 30, 16), "math500": (1611, 23, 20)}


def load(name, **options):
    return tasks.load(name, style="compact", source="easy", equality="string", **options)


@pytest.mark.parametrize("name", LONGEST)
def test_rows_are_distinct_and_as_long_as_said(name):
    rows = list(getattr(problems, name)())
    asked, told = ("question", "answer") if name == "gsm8k" else ("problem", "solution")
    longest = [max(len(row[field]) for row in rows) for field in (asked, told)]
    assert (len({row[asked] for row in rows}), *longest) == LONGEST[name]
    assert list(getattr(problems, name)()) == rows
    count, prompt, completion = LONGEST[name]
    text = " ".join((getattr(problems, name).__doc__).split())
    assert f"{count:,} of at most {prompt} characters, " in text
    assert f"of at most {completion}." in text


def test_worked_answers_are_right():
    for row in problems.gsm8k():
        *lines, last = row["answer"].splitlines()
        for line in lines:
            step, value = line.split("=")
            assert arithmetic.evaluate(step) == int(value)
        assert last == f"#### {value}"
        numbers = re.findall("[0-9]+", row["question"])
        assert all(number in re.findall("[0-9]+", row["answer"]) for number in numbers)


def at(polynomial, x):
    """The value of "x^2+5x+6" or "(x+2)(x+3)" at x."""
    text = re.sub(r"([0-9])x", r"\1*x", polynomial).replace(")(", ")*(").replace("^", "**")
    return arithmetic.evaluate(text.replace("x", str(x)), powers=True)


def test_mathematical_answers_are_right():
    kinds = set()
    for row in problems.math500():
        kind, given = re.fullmatch(r"(\w+) \$(.*)\$\.", row["problem"]).groups()
        answer = row["answer"]
        if kind == "Reduce":
            a, b, c, d = map(int, re.findall("[0-9]+", given + answer))
            assert (Fraction(a, b).numerator, Fraction(a, b).denominator) == (c, d)
        elif kind == "Solve":
            left, right = given.split("=")
            assert at(left, int(answer)) == int(right)
        else:
            assert [at(given, x) for x in range(3)] == [at(answer, x) for x in range(3)]
        kinds.add(kind)
    assert kinds == {"Reduce", "Solve", "Expand"}


@pytest.mark.parametrize("name", LONGEST)
def test_they_go_through_the_prompts_and_readers_of_the_published_rows(name):
    task = load(name, held_out_size=64)
    found = {split: task.examples(split) for split in ("train", "validation", "test")}
    assert [len(rows) for rows in found.values()] == [LONGEST[name][0] - 128, 64, 64]
    asked = [example.question for rows in found.values() for example in rows]
    assert len(set(asked)) == LONGEST[name][0]
    letters = tokenizer.characters(task.alphabet)
    for example in found["test"]:
        answer = task.answer(example)
        assert task.score(example, answer)["reward"] == 1.0
        assert task.score(example, answer[:-3])["reward"] == 0.0
        assert len(tokenizer.encode(letters, task.prompt(example))) <= LONGEST[name][1] + 1


def test_other_tasks_have_none():
    with pytest.raises(ValueError, match="source='easy' is not one of 'generated', 'jsonl:PATH'"):
        tasks.load("countdown", source="easy")
    with pytest.raises(ValueError, match="is not one of 'published', 'easy', 'jsonl:PATH'"):
        tasks.load("gsm8k", source="hard")
