"""Saved generations: the authors' accuracies, and what a bad file is told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dmrl import protocol

ROOT = Path(__file__).parent.parent
FILES = {
    "gsm8k": "gsm8k_256.jsonl",
    "math500": "math500_256.jsonl",
    "countdown": "countdown_256.jsonl",
    "sudoku": "sudoku_256.jsonl",
}


@pytest.fixture(scope="module")
def recorded(golden_dir):
    return json.loads((golden_dir / "aggregate_accuracy.json").read_text())


@pytest.mark.parametrize("family", ["d1", "spg"])
@pytest.mark.parametrize("name", FILES)
def test_accuracies_are_those_of_the_authors(data_dir, recorded, name, family):
    found = list(protocol.generations(data_dir / "baselines" / FILES[name]))
    result = protocol.summary(protocol.load(name, family), found)
    wanted = recorded[FILES[name]][family]
    assert result["n"] == wanted["items"]
    assert result["n_questions"] == wanted["n_unique_questions"]
    if name == "sudoku":
        assert round(result["cell_accuracy"], 4) == wanted["cell_accuracy"]
        assert round(result["board_accuracy"], 4) == wanted["board_accuracy"]
        assert result["accuracy"] == result["cell_accuracy"]
        assert round(result["means"]["cells"], 4) == wanted["mean_item_accuracy"]
        assert round(result["cell_accuracy"] * wanted["empty_cells"]) == wanted["correct_cells"]
    else:
        assert round(result["accuracy"], 4) == wanted["accuracy"]
        assert round(result["accuracy"] * wanted["items"]) == wanted["correct"]


@pytest.mark.parametrize(
    ("name", "against", "gained", "lost"),
    [  # the counts of docs/protocol.md
        ("gsm8k", "d1", 17, 4),
        ("gsm8k", "spg", 12, 16),
        pytest.param("math500", "d1", 15, 0, marks=pytest.mark.slow),
        ("countdown", "d1", 0, 1),
    ],
)
def test_the_default_differs_in_as_many_cases_as_documented(
    data_dir, monkeypatch, name, against, gained, lost
):
    monkeypatch.setenv("DMRL_DATA", str(data_dir))
    found = list(protocol.generations(data_dir / "baselines" / FILES[name]))
    ours = protocol.scores(protocol.load(name, "paper"), found)
    theirs = protocol.scores(protocol.load(name, against), found)
    change = [a["solved"] - b["solved"] for a, b in zip(ours, theirs, strict=True)]
    assert (change.count(1.0), change.count(-1.0)) == (gained, lost)


def line(truth=18.0, completion="<answer>18</answer>", **more):
    row = {"question": "How many?", "generations": completion, "ground_truth": truth}
    return json.dumps(row | more) + "\n"


def run(tmp_path, text, *flags):
    file = tmp_path / "generations.jsonl"
    file.write_text(text)
    script = [sys.executable, str(ROOT / "launch" / "evaluate.py"), f"--generations={file}"]
    return subprocess.run([*script, *flags], capture_output=True, text=True, check=False)


def test_the_script_prints_one_json_line(tmp_path):
    text = line() + line(completion=r"so \boxed{1,8}<|eot_id|> or \boxed{18}")
    done = run(tmp_path, text, "--task=gsm8k", "--equality=string")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert result["task"] == "gsm8k"
    assert result["protocol"] == "paper"
    assert result["n"] == 2
    assert result["accuracy"] == 0.5  # the second answer stands behind the end of the turn
    assert result["accuracy_95"] == pytest.approx([0.0945, 0.9055], abs=1e-4)
    assert result["scorer"] == protocol.SCORER


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        (line() + "{", ["--task=gsm8k"], r"generations.jsonl, line 2: not a JSON object with"),
        ('{"question": "?"}\n', ["--task=gsm8k"], "line 1: .*KeyError: 'generations'"),
        ("", ["--task=gsm8k"], "has no lines"),
        (line(), ["--task=gsm9k"], "no task 'gsm9k'; did you mean 'gsm8k'"),
        (line(truth="12"), ["--task=sudoku"], "no puzzle of 16 digits"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, text, flags, message):
    file = tmp_path / "generations.jsonl"
    file.write_text(text)
    name = flags[0].removeprefix("--task=")

    def summary():
        return protocol.summary(protocol.load(name, "d1"), list(protocol.generations(file)))

    with pytest.raises(ValueError, match=message):
        summary()


def test_the_script_ends_with_an_error_line(tmp_path):
    done = run(tmp_path, "{", "--task=gsm8k", "--protocol=d1")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "line 1" in done.stderr
