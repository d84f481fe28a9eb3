"""Countdown: arithmetic without evaluation, rewards, and disjoint solvable splits."""

import collections
import itertools
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmrl import tasks
from dmrl.tasks import arithmetic, countdown


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1+2*3", 7),
        ("(1+2)*3", 9),
        ("8/4/2", 1),
        ("7-4-2", 1),
        ("1/3*3", 1),
        ("--3 - -4", 7),
        ("+3", 3),
        ("2*(3\n+4)", 14),
    ],
)
def test_evaluate_computes(text, value):
    assert arithmetic.evaluate(text) == value


@pytest.mark.parametrize(
    "text",
    [
        *["", "(", "1+", "1 2", "030", "1=1", "x", "1,2", "()", "1(2)", "1j", "1_0", "1 + \u0662"],
        *["1/0", "1/(2-2)", "2**3", "7//2", "1.5", "__import__('os')"],
        *["9" * 1001, "(" * 150, "-" * 1250 + "1"],
    ],
)
def test_evaluate_refuses(text):
    assert arithmetic.evaluate(text) is None


@pytest.mark.parametrize(
    "text",
    ["9**9**9", "(9**9)**9", "9**(9*9*9*9*9)", "(9*9*9*9*9)**(9*9*9)", "0**(0-1)", "(0-8)**(1/2)"],
)
def test_evaluate_refuses_large_and_senseless_powers(text):
    assert arithmetic.evaluate(text, powers=True) is None


def test_evaluate_reads_deep_brackets():
    assert arithmetic.evaluate("(" * 150 + "30 + 93 - 100" + ")" * 150) == 23


def test_evaluate_computes_powers_when_asked():
    assert arithmetic.evaluate("2**3", powers=True) == 8
    assert arithmetic.evaluate("100**100", powers=True) == 100**100
    assert arithmetic.evaluate("7//2", powers=True) == 3


terms = st.recursive(
    st.integers(0, 30).map(lambda n: arithmetic.Term(str(n))),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: t[0].join(*t[1:])),
    max_leaves=8,
)


@given(terms)
@settings(deadline=None, max_examples=300)
def test_evaluate_agrees_with_python(term):
    exact = re.sub("([0-9]+)", r"Fraction(\1)", term.text)
    try:
        expected = eval(exact, {"Fraction": Fraction})  # text that this test wrote itself
    except ZeroDivisionError:
        expected = None
    assert arithmetic.evaluate(term.text) == expected


def test_terms_are_written_with_the_brackets_they_need():
    one, two, three = (arithmetic.Term(n) for n in "123")
    assert one.join("-", two.join("-", three)).text == "1-(2-3)"
    assert one.join("-", two).join("-", three).text == "1-2-3"
    assert one.join("+", two).join("*", three).text == "(1+2)*3"
    assert one.join("/", two.join("*", three)).text == "1/(2*3)"
    assert one.join("+", two.join("-", three)).text == "1+2-3"
    assert one.join("*", two.join("/", three)).text == "1*2/3"


def test_solve_finds_fractions_and_admits_defeat():
    assert arithmetic.evaluate(arithmetic.solve([8, 3, 8, 3], 24)) == 24  # 8/(3-8/3)
    assert arithmetic.solve([1, 1, 1], 100) is None


SMALL = countdown.Example((30, 100, 93), 23)


@pytest.mark.parametrize(
    ("completion", "reward", "numbers"),
    [
        ("", 0.0, 0.0),
        ("   ", 0.0, 0.0),
        ("30+93-100", 1.0, 1.0),
        (" 93 - (100 - 30) ", 1.0, 1.0),
        ("30+93-101", 0.1, 0.0),
        ("30+93", 0.1, 0.0),
        ("100+93-30", 0.1, 1.0),
        ("30+93-100=23", 0.1, 0.0),
        ("23", 0.1, 0.0),
        ("30+93-(100", 0.1, 1.0),
        ("<answer>30+93-100</answer>", 0.1, 1.0),
    ],
)
def test_compact_countdown_reward(completion, reward, numbers):
    score = tasks.load("countdown").score(SMALL, completion)
    assert score["reward"] == reward
    assert score["numbers"] == numbers
    assert score["solved"] == float(reward == 1.0)
    assert score["answered"] == float(reward > 0)


@pytest.mark.parametrize(
    ("numbers", "hack", "d1_reward"),
    [
        ((23, 2, 100), "23+2//100", 1.0),
        ((23, 10, 6), "23+10**-6", 1.0),
        ((23, 10, 6), "23-10**-6", 1.0),
        ((23, 10, 4), "23+10**-4", 0.1),
        ((23, 10, 4), "23-10**-4", 0.1),
    ],
)
def test_protocol_decides_over_forbidden_operators(numbers, hack, d1_reward):
    example = countdown.Example(numbers, 23)
    paper, d1 = (tasks.load("countdown", protocol=p) for p in ("paper", "d1"))
    assert paper.score(example, hack)["reward"] == 0.1
    assert d1.score(example, hack)["reward"] == d1_reward


def test_countdown_prompts():
    assert tasks.load("countdown").prompt(SMALL) == "30,100,93=23:"
    assert tasks.load("countdown").template(SMALL) is None
    assert "[30, 100, 93]" in tasks.load("countdown", style="published").prompt(SMALL)


def test_countdown_splits_are_disjoint_and_solvable():
    task = tasks.load("countdown", train_size=4000)
    seen = set()
    for split, size in (("train", 4000), ("validation", 1024), ("test", 1024)):
        found = task.examples(split)
        keys = {(tuple(sorted(e.numbers)), e.target) for e in found}
        assert len(keys) == len(found) == size
        assert not keys & seen
        seen |= keys
        counts = collections.Counter(len(e.numbers) for e in found)
        assert counts == {3: size // 2, 4: size // 2}
        for e in found:
            assert all(1 <= n <= 100 for n in (*e.numbers, e.target))
            assert set(e.solution) <= set(task.alphabet)
            assert task.score(e, e.solution)["reward"] == 1.0


def test_generated_countdown_is_solvable_by_search():
    for example in tasks.load("countdown").examples("test")[:20]:
        found = arithmetic.solve(example.numbers, example.target)
        assert arithmetic.evaluate(found) == example.target


def test_narrow_countdown_ranges_give_fewer_puzzles_or_an_error():
    narrow = tasks.load("countdown", numbers=(2, 2), values=(1, 3), targets=(1, 6))
    found = [e for split in ("train", "validation", "test") for e in narrow.examples(split)]
    # {a, b} from 1..3 and a target of theirs: 1+1=2, 1*1=1 ... counted by search.
    pairs = itertools.combinations_with_replacement((1, 2, 3), 2)
    possible = [(p, t) for p in pairs for t in range(1, 7) if arithmetic.solve(p, t)]
    assert sorted((tuple(sorted(e.numbers)), e.target) for e in found) == possible
    with pytest.raises(ValueError, match="widen a range"):
        tasks.load("countdown", values=(1, 1), targets=(90, 99)).examples("test")


def test_published_countdown_file(data_dir):
    task = tasks.load("countdown", data_dir=str(data_dir))
    found = task.examples("published")
    assert len(found) == 256
    assert all(task.score(e, e.solution)["reward"] == 1.0 for e in found)


@pytest.mark.parametrize("style", ["published", "evaluation"])
def test_worked_examples_are_of_train_and_right(style):
    options = {"style": style, "train_size": 100, "held_out_size": 4, "numbers": (3, 3)}
    none, two = tasks.load("countdown", **options), tasks.load("countdown", shots=2, **options)
    example = two.examples("test")[0]
    pieces = two.prompt(example).split("Question:\n")
    assert none.prompt(example) == pieces[0] + pieces[2].partition("\n\n")[2]
    train = {(tuple(e.numbers), e.target): e for e in two.examples("train")}
    for piece in pieces[1:]:
        asked, told = piece.split("\nAnswer:\n")
        *numbers, target = map(int, re.findall("[0-9]+", asked))
        shot = train[tuple(numbers), target]
        assert two.score(shot, told.partition("\n\n")[0])["solved"] == 1.0
    with pytest.raises(ValueError, match="shots=2: prompts in style='compact' have no examples"):
        tasks.load("countdown", shots=2)
