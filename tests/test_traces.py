"""Worked solutions: what may be given away of them, and what never is."""

import re

import pytest

from dmrl import tasks
from dmrl.tasks import gsm8k, math500, traces

SOLD = "She sold 48/2 = 24 clips in May. So 48+24 = 72 in all.\nNot 1,072. That is 72km."


def given(pieces):
    return "".join(text for text, allowed in pieces if allowed)


@pytest.mark.parametrize("style", ["published", "evaluation", "compact"])
def test_sentences_with_the_answer_are_kept_back(style):
    task = tasks.load("gsm8k", style=style, equality="string")
    example = gsm8k.Example("How many?", "72", SOLD)
    pieces = task.trace(example)
    assert "".join(text for text, _ in pieces) == task.answer(example)
    opening = "" if style == "compact" else "<reasoning>\n"
    assert given(pieces) == f"{opening}She sold 48/2 = 24 clips in May.\nNot 1,072."


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (r"\frac{3}{4}", r"So $x = \frac{3} {4}$ now."),
        ("1000", "It is 1,000 in all."),
        ("1000", r"It is 1{,}000 then."),
        ("1000", r"It is 1,\!000 then."),
        (r"15,\!625", "Get $15625$ so."),
        ("15625", r"Get $15\,625$ so."),
        ("12", "So 3*4=12km in all."),
        (r"\frac{3}{4}", r"It is \boxed{\dfrac{3}{4}} here."),
        ("x^2", "Then x^2 + 1 is it."),
        ("5", "Five, 5.0, say."),
        ("(1, 2)", "The point (1,2) is it."),
    ],
)
def test_an_answer_is_found_however_it_is_spaced(answer, told):
    solution = f"First. {told} Next. Done."
    pieces = traces.around(solution, solution, answer)
    assert given(pieces) == "First. Next."


def test_the_last_sentence_is_never_given_away():
    assert given(traces.around("So it ends.\n\n#### 7", "So it ends.\n", "7")) == ""
    assert given(traces.around("A. B.", "A. B.", "7")) == "A."


def test_without_a_solution_there_is_no_trace():
    task = tasks.load("math500", equality="string")
    assert task.trace(math500.Example("Why?", "7")) is None
    unboxed = math500.Example("Why?", "7", "Three and four. Seven.")
    assert tasks.load("math500", equality="string", style="compact").trace(unboxed) is None
    assert task.trace(unboxed) is not None


@pytest.mark.parametrize("name", ["gsm8k", "math500"])
def test_easy_problems_keep_their_answer(name):
    task = tasks.load(name, equality="string", source="easy", style="published")
    for example in task.examples("validation")[:50]:
        pieces = task.trace(example)
        assert "".join(text for text, _ in pieces) == task.answer(example)
        assert not re.search(rf"(?<![0-9]){re.escape(example.answer)}(?![0-9])", given(pieces))


def test_real_solutions_give_most_of_themselves_away(data_dir):
    task = tasks.load("gsm8k", equality="string", data_dir=str(data_dir), held_out_size=500)
    share = []
    for example in task.examples("validation"):
        pieces = task.trace(example)
        assert "".join(text for text, _ in pieces) == task.answer(example)
        assert task.score(example, given(pieces))["solved"] == 0.0
        share.append(len(given(pieces)) / len(task.answer(example)))
    assert sum(share) / len(share) > 0.3


def test_a_right_answer_alone_can_be_rewarded():
    example = gsm8k.Example("How many?", "72", SOLD)
    for options, right, wrong in (({}, 4.0, 2.0), ({"reward": "solved"}, 1.0, 0.0)):
        task = tasks.load("gsm8k", equality="string", **options)
        assert task.score(example, task.answer(example))["reward"] == right
        other = task.answer(example._replace(answer="73"))
        assert task.score(example, other)["reward"] == wrong
    with pytest.raises(ValueError, match="reward='parts' is not one of"):
        tasks.load("gsm8k", reward="parts")
