"""Tasks: rewards against the authors' own, splits, prompts and hostile answers."""

import json
import math
import re
import sys
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmrl import tasks
from dmrl.tasks import arithmetic, countdown, gsm8k, math500, options, parsers, sudoku
from dmrl.tasks.answers import last_answer

SMALL = countdown.Example((30, 100, 93), 23)
PUZZLE = sudoku.Example("4320004330100004", "4321124334122134")
WORDS = gsm8k.Example("How many?", "18", "9 + 9 = 18")
FORMULA = math500.Example("What is x?", r"\frac{14}{3}")
FAMILIES = ("d1", "spg", "wd1", "eoser")


@pytest.fixture
def golden_cases(golden_dir):
    with (golden_dir / "rewards.jsonl").open(encoding="utf-8") as lines:
        cases = [json.loads(line) for line in lines]
    return lambda task: [case for case in cases if case["task"] == task]


def test_golden_sudoku_rewards(golden_cases):
    task = tasks.load("sudoku", style="published", reward="cells")
    cases = golden_cases("sudoku")
    assert cases
    for case in cases:
        reward = task.score(sudoku.Example(**case["ground_truth"]), case["completion"])["reward"]
        scale = {name: 2 if name.startswith("dtm.") else 1 for name in case["rewards"]}
        expected = {name: value / scale[name] for name, value in case["rewards"].items()}
        assert expected == dict.fromkeys(expected, pytest.approx(reward, abs=1e-12)), case


def test_golden_countdown_rewards(golden_cases):
    task = tasks.load("countdown", style="published", protocol="d1")
    cases = [case for case in golden_cases("countdown") if case["rewards"] is not None]
    assert cases
    for case in cases:
        example = countdown.Example(**case["ground_truth"])
        reward = task.score(example, case["completion"])["reward"]
        expected = case["rewards"]
        assert expected == dict.fromkeys(expected, reward), case


def test_golden_countdown_default_is_the_same_but_for_operators_the_prompt_forbids(golden_cases):
    task = tasks.load("countdown", style="published")
    for case in golden_cases("countdown"):
        example = countdown.Example(**case["ground_truth"])
        reward = task.score(example, case["completion"])["reward"]
        answer = last_answer(case["completion"]) or ""
        if case["rewards"] is None or re.search(r"\*\*|//|\.", answer):
            assert reward <= 0.1, case  # powers, which the authors' code may never finish
        else:
            assert reward == case["rewards"]["d1.countdown_reward_func"], case


def test_golden_countdown_cases_without_a_value_are_wrong(golden_cases):
    task = tasks.load("countdown", style="published", protocol="d1")
    assert task.score(SMALL, "<answer>30**100**93</answer>")["reward"] == 0.1
    for case in golden_cases("countdown"):
        if case["rewards"] is None:
            example = countdown.Example(**case["ground_truth"])
            assert task.score(example, case["completion"])["reward"] == 0.1, case


GSM8K_PARTS = {
    "xml": "xmlcount_reward_func",
    "soft": "soft_format_reward_func",
    "strict": "strict_format_reward_func",
    "integer": "int_reward_func",
    "correct": "correctness_reward_func",
}
MATH_PARTS = {
    "format": "boxed_and_answer_tags_format_reward",
    "correct": "correctness_reward_func_math",
}


def assert_parts(case, name, truth, parts):
    """Every family's recorded parts of the reward; wd1's and EOSER's files are d1's."""
    for family in FAMILIES:
        task = tasks.load(name, protocol="spg" if family == "spg" else "d1")
        score = task.score(task.recorded("", truth), case["completion"])
        recorded = {part: case["rewards"][f"{family}.{f}"] for part, f in parts.items()}
        assert {part: score[part] for part in parts} == recorded, (family, case)
        assert score["reward"] == pytest.approx(sum(recorded.values()))


def test_golden_gsm8k_rewards(golden_cases):
    for case in golden_cases("gsm8k"):
        assert_parts(case, "gsm8k", case["ground_truth"]["answer"], GSM8K_PARTS)


def test_golden_math_rewards(golden_cases):
    for case in golden_cases("math"):
        assert_parts(case, "math500", case["ground_truth"]["parser_answer"], MATH_PARTS)


@pytest.mark.parametrize("family", ["d1", "spg"])
def test_golden_evaluation_parsers(golden_cases, family):
    number = 0
    for name, golden in (("gsm8k", "gsm8k"), ("math500", "math"), ("countdown", "countdown")):
        style = {"style": "evaluation", "protocol": family}
        task = tasks.load(name, **style)
        for case in golden_cases(golden):
            if case["parser"] is None:
                continue
            truth = case["ground_truth"]
            if name == "countdown":
                example = task.recorded("", (truth["numbers"], truth["target"]))
                read = parsers.countdown(case["completion"])
            else:
                example = task.recorded("", truth.get("parser_answer", truth["answer"]))
                read = {
                    "gsm8k": lambda text: parsers.gsm8k(text, family),
                    "math500": parsers.math,
                }[name](case["completion"])
            recorded = case["parser"][family]
            extracted = recorded["extracted"]
            if name == "gsm8k" and isinstance(extracted, str):
                read = str(read)  # inf and nan
            assert read == extracted, case
            solved = task.score(example, case["completion"])["solved"]
            assert solved == float(recorded["is_correct"]), case
            number += 1
    assert number > 200


@pytest.mark.parametrize("family", ["d1", "spg"])
def test_golden_sudoku_parsers(golden_cases, family):
    task = tasks.load("sudoku", style="published", protocol=family)
    for case in golden_cases("sudoku"):
        score = task.score(sudoku.Example(**case["ground_truth"]), case["completion"])
        recorded = case["parser"][family]
        assert score["cells"] == recorded["accuracy"], case
        filled = parsers.sudoku(case["completion"])
        assert (filled[:16].ljust(16, "0") if filled else "") == recorded["extracted"], case


@pytest.mark.parametrize("name", ["sudoku", "countdown"])
def test_published_prompt_asks_for_the_format(name):
    task = tasks.load(name, style="published")
    example = task.examples("validation")[0]
    prompt = task.prompt(example)
    assert prompt.startswith("\nRespond in the following format:\n<reasoning>\n...\n</reasoning>")
    shown = example.puzzle if name == "sudoku" else str(list(example.numbers))
    assert shown in prompt
    assert set(prompt) <= set(task.alphabet)
    assert task.template(example) is None


HOSTILE = {
    "empty": "",
    "null": "\0" * 1000,
    "surrogate": "<answer>\ud800\udfff1</answer>",
    "digits": "1" * 1_000_000,
    "arabic digits": "<answer>" + "\u0661" * 1_000_000 + "</answer>",
    "superscripts": "<answer>\u00b2\u00b3</answer>",
    "no digits": "<answer>" + "\u4e00" * 1_000_000 + "</answer>",
    "opening tags": "<answer>" * 125_000,
    "closing tags": "</answer>" * 111_000,
    "tag pairs": "<answer></answer>" * 59_000,
    "spaces": " " * 1_000_000,
    "spaces in tags": "<answer>" + " " * 1_000_000 + "</answer>",
    "brackets": "(" * 100_000,
    "closed brackets": "(" * 190 + "30+93-100" + ")" * 190,
    "more brackets": "(" * 490 + "30+93-100" + ")" * 490,
    "open brackets": "(" * 900 + "30+93-100",
    "signs": "-" * 900 + "30+93-100",
    "tower": "30**100**93",
    "power": "30**(100**1*93)",
    "huge number": "9" * 5000 + "+30+93-100",
    "zero": "30/(100-100)+93",
    "calls": "30(93)(100)" * 15,
    "code": "__import__('os').system('x')",
    "boxes": "\\boxed{" * 140_000,
    "boxes and a line": "\\boxed{" * 13_000 + "\n}",
    "a boxed tower": "\\boxed{9^{9^{9^{9}}}}",
    "a boxed power": "\\boxed{9**9**9**9}",
    "a boxed factorial": "\\boxed{(((9!)!)!)!}",
    "a deep box": "\\boxed{" + "\\frac{1}{" * 30_000,
    "a root of roots": "\\boxed{" + "\\sqrt{2+" * 30 + "}" * 31,
    "a sum": "\\boxed{\\sum_{n=1}^{99999999}\\frac{1}{n^2}}",
    "a null in a box": "\\boxed{14\0/3}",
    "a surrogate in a box": "\\boxed{\ud80014/3}",
    "reasoning tags": "<reasoning>" + "</reasoning><answer>" * 50_000,
    "broken reasoning": "<reasoning>\n" + "\n</reasoning>\n<answer>\n" * 40_000,
    "equals": "=1" * 500_000,
    "digits before equals": "1" * 500_000 + "=",
    "fences": "<answer>" + "``` 1" * 200_000,
    "fence of spaces": "<answer>```" + " " * 1_000_000,
    "spaced digits": "1111111111111111 " * 60_000,
    "markers": "<|eot_id|>" * 100_000,
    "thousands": "<answer>" + "1,000" * 200_000,
    "hashes": "#" * 1_000_000,
    "text commands": "<answer>" + "\\text{" * 150_000,
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("style", ["compact", "published"])
@pytest.mark.parametrize("protocol", ["paper", "spg"])
@pytest.mark.parametrize(
    ("name", "option", "example"),
    [
        ("sudoku", {"reward": "board"}, PUZZLE),
        ("sudoku", {"reward": "cells"}, PUZZLE),
        ("countdown", {}, SMALL),
        ("gsm8k", {}, WORDS),
        ("math500", {}, FORMULA),
    ],
    ids=["board", "cells", "countdown", "gsm8k", "math500"],
)
def test_hostile_answers_score_finitely_and_quickly(
    name, option, example, style, protocol, hostile
):
    task = tasks.load(name, style=style, protocol=protocol, **option)
    keys = set(task.score(example, "1"))
    for completion in (hostile, f"<answer>{hostile}</answer>"):
        took = []
        for _ in range(3):
            start = time.process_time()
            score = task.score(example, completion)
            took.append(time.process_time() - start)
        assert min(took) < 0.05
        assert set(score) == keys
        assert all(type(v) is float and math.isfinite(v) for v in score.values())
        assert score["reward"] <= 1.0 + 3.0 * (name in ("gsm8k", "math500"))
        assert score["solved"] == 0.0 or "30+93-100" in hostile


EXPRESSIONS = st.text("0123456789+-*/(). \n", max_size=60)


@given(st.one_of(st.text(), EXPRESSIONS, EXPRESSIONS.map(lambda t: f"<answer>{t}</answer>")))
@settings(deadline=None, max_examples=200)
def test_no_text_raises_or_warns(completion):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arithmetic.evaluate(completion, powers=True)
        for style in ("compact", "published"):
            for task, example in (
                (sudoku.Task(style=style), PUZZLE),
                (countdown.Task(style=style, protocol="d1"), SMALL),
                (gsm8k.Task(style=style), WORDS),
                (math500.Task(style=style), FORMULA),
            ):
                assert 0.0 <= task.score(example, completion)["reward"] <= 4.0
            assert gsm8k.Task(style=style, protocol="d1").score(WORDS, completion)["reward"] <= 4.0


def test_scoring_survives_a_deep_stack():
    def at_depth(depth):
        if depth:
            return at_depth(depth - 1)
        return countdown.Task().score(SMALL, "-" * 100 + "30+93-100")["reward"]

    frame, used = sys._getframe(), 0
    while frame:
        frame, used = frame.f_back, used + 1
    assert at_depth(sys.getrecursionlimit() - used - 60) == 0.1


@given(st.lists(st.sampled_from(["<answer>", "</answer>", "1", "2", "\n", "<", ">"])))
def test_last_answer_is_the_last_lazy_match(pieces):
    text = "".join(pieces)
    matches = re.findall("<answer>(.*?)</answer>", text, re.DOTALL)
    assert last_answer(text) == (matches[-1] if matches else None)


def test_unknown_names_are_answered_with_a_suggestion():
    with pytest.raises(ValueError, match="no task 'sudoko'; did you mean 'sudoku'"):
        tasks.load("sudoko")
    with pytest.raises(ValueError, match=r"no task 'answers'.*countdown"):
        tasks.load("answers")
    with pytest.raises(ValueError, match="no option 'blank'; did you mean 'blanks'"):
        tasks.load("sudoku", blank=(4, 4))
    with pytest.raises(ValueError, match=r"no task 'nowhere\.to_be_found'"):
        tasks.load("nowhere.to_be_found")


def test_a_task_may_live_elsewhere(tmp_path, monkeypatch):
    source = """
import dataclasses
from dmrl.tasks import countdown

@dataclasses.dataclass(frozen=True)
class Task(countdown.Task):
    size: int = 3
"""
    (tmp_path / "mine_pkg").mkdir()
    (tmp_path / "mine_pkg" / "echo.py").write_text(source)
    (tmp_path / "mine_pkg" / "broken.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    assert tasks.load("mine_pkg.echo", size=4).size == 4
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        tasks.load("mine_pkg.broken")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "sudoku",
            {"style": "tall"},
            "style='tall' is not one of 'compact', 'grid', 'template', 'published'",
        ),
        ("sudoku", {"reward": "row"}, "reward='row' is not one of 'board', 'cells'"),
        ("sudoku", {"blanks": (4, 13)}, "blanks=.*1 <= first <= last <= 12"),
        ("sudoku", {"blanks": (9, 4)}, "blanks=.*1 <= first <= last <= 12"),
        ("sudoku", {"blanks": [4]}, "blanks=.*is not a range"),
        ("sudoku", {"train_size": 0}, "train_size=0 is not an integer of at least 1"),
        ("countdown", {"protocol": "d2"}, "protocol='d2' is not one of 'paper', 'd1'"),
        ("countdown", {"numbers": (1, 3)}, "numbers=.*2 <= first"),
        ("countdown", {"split_seed": -1}, "split_seed=-1 is not an integer of at least 0"),
    ],
)
def test_bad_options_name_value_and_choices(name, options, message):
    with pytest.raises(ValueError, match=message):
        tasks.load(name, **options)


def test_options_of_another_type_are_refused():
    for value in (4, "49", (1, 2, 3), (1.0, 2.0), None):
        with pytest.raises(ValueError, match="is not a range: give two integers"):
            options.span("blanks", value, 1, 12)
    for number in (1.5, "3", None, True):
        with pytest.raises(ValueError, match="is not an integer of at least 0"):
            options.at_least("split_seed", number, 0)


@pytest.mark.parametrize("name", ["sudoku", "countdown"])
def test_unknown_splits_name_the_choices(name):
    with pytest.raises(ValueError, match=r"split='tset' is not one of 'train', 'validation'"):
        tasks.load(name).examples("tset")


@pytest.mark.parametrize(("name", "split"), [("sudoku", "d1"), ("countdown", "published")])
def test_missing_published_data_says_what_to_set(name, split, tmp_path, monkeypatch):
    monkeypatch.delenv("DMRL_DATA", raising=False)
    with pytest.raises(ValueError, match=r"data_dir.*DMRL_DATA"):
        tasks.load(name).examples(split)
    with pytest.raises(FileNotFoundError, match="must hold"):
        tasks.load(name, data_dir=str(tmp_path)).examples(split)
