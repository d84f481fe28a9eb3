"""GSM8K and MATH: how answers are read, equality, prompts, splits."""

import json
import os

import pytest

from dmrl import tasks
from dmrl.tasks import equality, gsm8k, latex, math500, options, tags

WORDS = gsm8k.Example("How many?", "1035", "1,000 + 35 = 1035")


@pytest.fixture
def small_data(tmp_path):
    """Twenty questions of each data set, without its solutions where it has none."""
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "math500").mkdir()
    for split in ("train", "test"):
        words = [
            {"question": f"{split} {i}?", "answer": f"It is <<{i}*100={i}00>>{i}00.\n#### {i},100"}
            for i in range(1, 21)
        ]
        maths = [
            {"problem": f"{split} {i}", "solution": rf"So $\boxed{{x^{i}}}$."} for i in range(20)
        ]
        for folder, rows in (("gsm8k", words), ("math500", maths)):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / folder / f"{split}.jsonl").write_text(lines)
    return str(tmp_path)


@pytest.mark.parametrize(
    "answer",
    [
        *["1035", "1,035", "$1,035", r"\$1,035", r"\boxed{1,035}", "1035."],
        *["1035.00", " 1035 dollars ", r"\boxed{1035\text{ eggs}}", r"x = 1035", "1035%"],
        *[r"\boxed{1035", r"\boxed{7} \boxed{1035}", r"1000 + 35 = 1035", r"\frac{2070}{2}"],
    ],
)
def test_a_number_is_right_however_it_is_written(answer):
    score = tasks.load("gsm8k").score(WORDS, f"<answer>\n{answer}\n</answer>")
    assert score["solved"] == 1.0
    assert score["correct"] == 2.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "1035",  # no answer is given
        "<answer>1036</answer>",
        "<answer>-1035</answer>",
        "<answer>1035</answer><answer>7</answer>",
        "<answer>7</answer><|eot_id|><answer>1035</answer>",
        r"<answer>\frac{1035}{2}</answer>",
        r"<answer>1035^{2}</answer>",
        "<answer>11035</answer>",
        "<answer>1,0,3,5</answer>",
        "<answer>\u0661\u0660\u0663\u0665</answer>",  # Arabic digits are no number here
    ],
)
def test_other_numbers_and_other_places_are_wrong(completion):
    assert tasks.load("gsm8k").score(WORDS, completion)["solved"] == 0.0


def test_gsm8k_reward_adds_up_to_four():
    task = tasks.load("gsm8k")
    full = "<reasoning>\ntwo\nlines\n</reasoning>\n<answer>\n1035\n</answer>"
    for text in (full, full + "\n", full + "\n<|eot_id|><|endoftext|>", task.answer(WORDS)):
        score = task.score(WORDS, text)
        assert score["reward"] == 4.0, text
        assert (score["soft"], score["strict"], score["integer"]) == (0.5, 0.5, 0.5)
    trailing = task.score(WORDS, full + "\n" + "x" * 100)
    assert trailing["xml"] == pytest.approx(0.5 - 0.2)
    assert trailing["strict"] == 0.0


def test_long_text_behind_the_answer_costs_no_more_than_the_count():
    full = "<reasoning>\na\n</reasoning>\n<answer>\n1035\n</answer>\n" + "x" * 9000
    assert tags.xml_count(full, "paper") == 0.0
    assert tags.xml_count(full, "d1") == pytest.approx(0.5 - 18.0)


def test_format_slips_of_the_authors_are_theirs_alone():
    two_lines = "<reasoning>a\nb</reasoning><answer>1</answer>"
    assert tags.soft(two_lines, multiline=True)
    assert not tags.soft(two_lines, multiline=False)
    assert tags.soft("<reasoning>a</reasoning>\n\n<answer>1</answer>", multiline=False)
    box = r"<answer>\boxed{1035}</answer>"
    fixed, d1 = (math500.Task(protocol=p) for p in ("paper", "d1"))
    example = math500.Example("?", "1035")
    assert fixed.score(example, box)["format"] == 1.0
    assert d1.score(example, box)["format"] == 0.75
    assert fixed.score(example, r"\boxed{1035}")["reward"] == 2.5
    assert fixed.score(example, "<answer>1035</answer>")["reward"] == 2.75
    assert fixed.score(example, "1035")["reward"] == 0.25


def test_compact_style_reads_behind_the_hashes():
    task = tasks.load("gsm8k", style="compact")
    assert task.answer(WORDS) == "1,000 + 35 = 1035\n#### 1035"
    assert task.score(WORDS, task.answer(WORDS))["reward"] == 1.0
    assert task.score(WORDS, "1035")["reward"] == 0.0


@pytest.mark.parametrize(
    ("truth", "answer", "verdict"),
    [
        (r"\frac{1}{8}", r"\frac{3}{24}", True),
        ("3, 5, 7", "7, 5, 3", True),
        (r"16\sqrt{3}", r"\sqrt{768}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("x^2+2x+1", "(x+2)^2", False),
        ("2", r"\frac{2}{3}", False),
    ],
)
def test_math_verify_decides_equality(truth, answer, verdict):
    example = math500.Example("?", truth)
    completion = rf"<answer>\boxed{{{answer}}}</answer>"
    assert math500.Task().score(example, completion)["solved"] == float(verdict)
    assert math500.Task().score(example, completion)["string"] == 0.0
    assert math500.Task(equality="string").score(example, completion)["solved"] == 0.0


@pytest.mark.parametrize(
    "text",
    [
        *["", "9**9**9", "9^{9^{9}}", "2^{10000}", "1" * 16, "10!", r"\binom{99}{50}", "1\0"],
        *["(" * 7 + "1" + ")" * 7, "x" * 201, "\ud800", r"\sum_{n=1}^{9}n", "x\n1", "x^2" * 9],
    ],
)
def test_what_could_be_huge_is_never_given_to_math_verify(text):
    assert not equality.admissible(text)
    assert not equality.equal("1", text)


def test_an_overrun_is_cut_off_and_the_next_question_answered(monkeypatch):
    assert equality.equal("1", r"\frac{5}{5}")
    monkeypatch.setattr(equality, "SECONDS", -1.0)
    assert not equality.equal("1", r"\frac{6}{6}")
    monkeypatch.undo()
    assert equality.equal("1", r"\frac{7}{7}")


def test_without_math_verify_the_choice_is_named(monkeypatch):
    monkeypatch.setattr(equality, "available", lambda: False)
    with pytest.raises(ValueError, match=r"dmrl\[eval\].*equality='string'"):
        tasks.load("math500")
    assert tasks.load("math500", equality="string")
    assert tasks.load("gsm8k", protocol="d1")  # asks for none


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (r"\frac12", r"\dfrac{1}{2}"),
        ("0.5", r"\frac{1}{2}"),
        ("x=3", "3"),
        (r"\sqrt3", r"\sqrt{3}"),
    ],
)
def test_spellings_are_the_same_by_the_string_rule(a, b):
    assert latex.same(a, b)


@pytest.mark.parametrize("text", [r"\frac", r"\sqrt", r"1\text{ a}\text{ b}", "x/2"])
def test_where_the_string_rule_breaks_down_texts_decide(text):
    assert latex.same(text, text)
    assert not latex.same(text, text + " ")


@pytest.mark.parametrize("name", ["gsm8k", "math500"])
def test_splits_hold_validation_out_of_train(small_data, name):
    task = tasks.load(name, data_dir=small_data, held_out_size=5)
    splits = {s: task.examples(s) for s in ("train", "validation", "test")}
    assert {s: len(found) for s, found in splits.items()} == {
        "train": 15,
        "validation": 5,
        "test": 20,
    }
    questions = {s: {e.question for e in found} for s, found in splits.items()}
    assert not questions["train"] & questions["validation"]
    assert {q.split()[0] for q in questions["train"] | questions["validation"]} == {"train"}
    assert task.examples("validation") == splits["validation"]
    for example in splits["test"]:
        assert task.score(example, task.answer(example))["solved"] == 1.0
    with pytest.raises(ValueError, match="held_out_size=20 leaves none of 20"):
        tasks.load(name, data_dir=small_data, held_out_size=20).examples("train")


def test_calculator_marks_and_separators_leave_the_data(small_data):
    example = tasks.load("gsm8k", data_dir=small_data).examples("test")[0]
    assert example == gsm8k.Example("test 1?", "1100", "It is 100.")


@pytest.mark.parametrize("name", ["gsm8k", "math500"])
def test_prompts_of_every_style(small_data, name):
    load = lambda **more: tasks.load(name, data_dir=small_data, held_out_size=5, **more)  # noqa: E731
    example = load().examples("test")[3]
    assert load(style="compact").prompt(example) == f"{example.question}\n"
    published = load().prompt(example)
    assert published.startswith("\nRespond in the following format:\n<reasoning>\n...")
    assert published.endswith(f"\n\n{example.question}")
    asked = load(style="evaluation").prompt(example)
    assert asked.startswith("You are a math expert.")
    assert "<answer>\n\\boxed{...}\n</answer>" in asked
    few = load(shots=2).prompt(example)
    assert few.count("Question: ") == 3
    assert few.count("</answer>\n\nQuestion: ") == 2
    assert few.endswith(f"Question: {example.question}\nAnswer:\n")
    assert "Question: test" not in few.replace(example.question, "")


def test_bad_rows_are_named(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    file = tmp_path / "gsm8k" / "test.jsonl"
    for text, message in (
        ('{"question": "?", "answer": "#### 1"}\nnot json', "test.jsonl, line 2: no JSON"),
        ("[1]", "line 1: .* is no JSON object"),
        ("", "has no lines"),
        ('{"question": "?", "answer": "eighteen"}', "does not end in ####"),
        ('{"question": "?"}', "line 1: no field 'answer' among question"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            tasks.load("gsm8k", data_dir=str(tmp_path)).examples("test")


def test_published_files(data_dir):
    task = tasks.load("gsm8k", data_dir=str(data_dir))
    sizes = [len(task.examples(s)) for s in ("train", "validation", "test")]
    assert sizes == [7473 - 512, 512, 1319]
    assert all(task.score(e, task.answer(e))["reward"] == 4.0 for e in task.examples("test"))
    found = tasks.load("math500", data_dir=str(data_dir)).examples("test")
    assert len(found) == 500
    assert "Please reason" not in found[0].question
    rule = math500.Task(equality="string")
    assert all(rule.score(e, rule.answer(e))["solved"] == 1.0 for e in found)


def test_rows_may_be_compressed(tmp_path):
    import gzip

    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"a": 1}\n')
    assert options.rows(str(tmp_path), "a.jsonl.gz") == [{"a": 1}]
    assert os.listdir(tmp_path) == ["a.jsonl.gz"]
