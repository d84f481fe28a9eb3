"""JSON lines that are always JSON, and the optional writers."""

import json
import time

import numpy as np
import pytest

from dmrl.metrics import Lines, Metrics, known


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    lines = Lines(tmp_path / "a.jsonl")
    row = {
        "nan": float("nan"),
        "inf": [1.0, -np.inf, np.float32(0.5)],
        "deep": {"n": np.float64("nan"), "i": np.int32(3)},
        "text": "NaN",
        "none": None,
        "true": True,
    }
    lines.append(row)
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {
        "nan": None,
        "inf": [1.0, None, 0.5],
        "deep": {"n": None, "i": 3},
        "text": "NaN",
        "none": None,
        "true": True,
    }


def test_a_file_is_cut_back_to_where_a_checkpoint_left_it(tmp_path):
    lines = Lines(tmp_path / "a.jsonl")
    assert lines.size() == 0
    lines.cut(0)
    assert not lines.path.exists()
    lines.append({"step": 1, "text": "é"})
    kept, size = lines.path.read_bytes(), lines.size()
    assert size == len(kept)
    lines.append({"step": 2})
    with lines.path.open("a") as file:
        file.write('{"torn')
    lines.cut(size)
    assert lines.path.read_bytes() == kept
    lines.append({"step": 2})
    assert [json.loads(x)["step"] for x in lines.path.read_text().splitlines()] == [1, 2]


def test_cutting_never_lengthens(tmp_path):
    lines = Lines(tmp_path / "a.jsonl")
    lines.append({"step": 1})
    before = lines.path.read_bytes()
    lines.cut(10_000)
    assert lines.path.read_bytes() == before


def test_a_process_that_is_no_writer_writes_nothing(tmp_path):
    Metrics(tmp_path, (), active=False).write(1, "rl", {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_line_is_step_stage_and_values(tmp_path):
    Metrics(tmp_path).write(3, "rl", {"loss": 0.5})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert line == '{"step": 3, "stage": "rl", "loss": 0.5}'


def test_unknown_writers_are_named():
    assert known(["tensorboard"]) == ("tensorboard",)
    with pytest.raises(ValueError, match="no writer 'tensorbord'; choose from 'tensorboard', 'wan"):
        known(["tensorbord"])


def test_tensorboard_shows_what_the_lines_say(tmp_path):
    pytest.importorskip("tensorboardX")
    metrics = Metrics(tmp_path, ("tensorboard",), "run")
    for step in (1, 2):
        metrics.write(step, "rl", {"loss": 1.0 / step})
    (events,) = (tmp_path / "tensorboard").iterdir()
    deadline = time.monotonic() + 20  # a thread writes it
    while b"rl/loss" not in events.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert events.read_bytes().count(b"rl/loss") == 2
