"""The HTML report: what it embeds, what it refuses to fetch, and what it survives."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dmrl import report, viewer

HOSTILE = "</script><img src=x onerror=alert(1)><!--"


def trajectory(**changes: Any) -> dict[str, Any]:
    """One position given by the template, one filled right, one wrong, one never filled."""
    row = {
        "when": "before",
        "setting": "greedy_4",
        "id": 0,
        "prompt": "p",
        "template": "1___",
        "tokens": ["1", "2", "3", "4"],
        "reveal_step": [-1, 0, 1, 4],
        "log_prob": [0.0, math.log(0.5), -0.25, 0.0],
        "entropy": [0.0, 0.7, 0.5, 0.0],
        "steps": 4,
        "reward": 0.5,
        "metrics": {"solved": 0.0},
        "answer": [None, "2", "4", None],
        "grid": [2, 2],
    }
    return row | changes


def fill(workdir: Path, **files: Any) -> Path:
    """Writes config (a value), metrics and trajectories (lists of rows) as a run would."""
    if "config" in files:
        (workdir / "config.json").write_text(json.dumps(files["config"]))
    for name in ("metrics", "trajectories"):
        if name in files:
            text = "".join(json.dumps(row) + "\n" for row in files[name])
            (workdir / f"{name}.jsonl").write_text(text)
    return workdir


def embedded(workdir: Path) -> dict[str, Any]:
    page = report.write(workdir).read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1], parse_constant=pytest.fail)


def test_write_returns_the_page_and_leaves_nothing_else(tmp_path):
    assert report.write(tmp_path) == tmp_path / "report.html"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(NotADirectoryError, match="nowhere"):
        report.write(tmp_path / "nowhere")


def test_page_fetches_nothing(tmp_path):
    fill(tmp_path, metrics=[{"step": 0, "stage": "rl", "reward": 0.1}], trajectories=[trajectory()])
    page = report.write(tmp_path).read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttp|import\(", page)
    assert re.findall(r'\s(?:src|href)="([^"]*)"', page) == ["data:,"]
    assert "default-src 'none'" in page
    assert "unsafe-inline" not in page


def test_hostile_text_stays_data(tmp_path):
    fill(
        tmp_path,
        config={"config": {"task": HOSTILE}, "git": HOSTILE, "device": HOSTILE},
        metrics=[{"step": 0, "stage": HOSTILE, f"eval/{HOSTILE}": 1.0}],
        trajectories=[trajectory(tokens=[HOSTILE] * 4, prompt=HOSTILE)],
    )
    data = embedded(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert data["traces"][0]["tokens"] == [HOSTILE] * 4
    assert data["config"] == {"task": HOSTILE}


def test_changes_take_first_and_last_finite_value(tmp_path):
    name = "eval/validation/greedy_4/solved"
    rows = [
        {"step": 0, "stage": "warm_start", name: 0.0},
        {"step": 9, "stage": "warm_start", name: 0.25},
        {"step": 0, "stage": "rl", name: 0.25},
        {"step": 5, "stage": "rl", name: 0.75},
        {"step": 6, "stage": "rl", name: float("nan")},
    ]
    [change] = embedded(fill(tmp_path, metrics=rows))["changes"]
    assert change == {
        "name": "validation/greedy_4/solved",
        "before": 0.0,
        "middle": 0.25,
        "after": 0.75,
    }


def test_one_evaluation_is_no_change(tmp_path):
    rows = [{"step": 0, "stage": "rl", "eval/greedy_4/solved": 0.5}]
    [change] = embedded(fill(tmp_path, metrics=rows))["changes"]
    assert (change["before"], change["middle"], change["after"]) == (0.5, None, None)


def test_settings_are_ordered_by_number(tmp_path):
    row = {f"eval/greedy_{steps}/solved": 0.5 for steps in (16, 4, 8)}
    data = embedded(fill(tmp_path, metrics=[{"step": 0, "stage": "rl"} | row]))
    names = [change["name"] for change in data["changes"]]
    assert names == ["greedy_4/solved", "greedy_8/solved", "greedy_16/solved"]


def test_stage_that_counts_from_zero_again_follows_the_one_before(tmp_path):
    rows = [{"step": step, "stage": "warm_start", "loss": 1.0} for step in range(4)]
    rows += [{"step": step, "stage": "rl", "loss": 2.0} for step in range(3)]
    stages = embedded(fill(tmp_path, metrics=rows))["stages"]
    assert [(s["name"], s["offset"], s["last"]) for s in stages] == [
        ("warm_start", 0, 3),
        ("rl", 3, 2),
    ]


def test_stage_whose_steps_run_on_keeps_them(tmp_path):
    rows = [
        {"step": 0, "stage": "warm_start", "loss": 1.0},
        {"step": 7, "stage": "rl", "loss": 2.0},
    ]
    stages = embedded(fill(tmp_path, metrics=rows))["stages"]
    assert [s["offset"] for s in stages] == [0, 0]


def test_resumed_run_overwrites_the_steps_it_repeats(tmp_path):
    rows = [
        {"step": s, "stage": "rl", "loss": float(v)} for s, v in ((1, 1), (2, 2), (3, 3), (2, 9))
    ]
    [stage] = embedded(fill(tmp_path, metrics=rows))["stages"]
    assert stage["series"]["loss"] == [[1, 2, 3], [1.0, 9.0, 3.0]]


def test_not_finite_becomes_null(tmp_path):
    rows = [
        {"step": 0, "stage": "rl", "kl": float("nan"), "loss": float("inf")},
        {"step": 1, "stage": "rl", "kl": 0.123456789},
    ]
    board = trajectory(log_prob=[0.0, float("-inf"), float("nan"), 0.0])
    data = embedded(fill(tmp_path, metrics=rows, trajectories=[board]))
    assert data["stages"][0]["series"] == {"kl": [[0, 1], [None, 0.123457]], "loss": [[0], [None]]}
    assert data["traces"][0]["log_prob"] == [0.0, None, None, 0.0]


def test_config_is_exact_and_summarised(tmp_path):
    config = {
        "optim": {"learning_rate": 0.00012345678901},
        "task": {"name": "sudoku"},
        "terms": {"diffu_grpo": {"weight": 1.0}, "dispo": {"weight": 0.5, "fillings": 2}},
        "model": {"width": 128, "layers": 4, "remat": True},
    }
    fill(
        tmp_path,
        config={"config": config, "git": None, "packages": {"jax": "1"}, "device": "cpu x1"},
    )
    fill(tmp_path, metrics=[{"step": s, "stage": "rl", "step_time": 60.0} for s in range(1, 64)])
    data = embedded(tmp_path)
    assert data["config"] == config
    assert data["facts"] == [
        ["Task", "sudoku"],
        ["Objective", "1 × diffu_grpo + 0.5 × dispo"],
        ["Model", "width 128, layers 4"],
        ["Device", "cpu x1"],
        ["Steps", "RL 63"],
        ["Time", "1 h 3 min of logged steps"],
    ]


def test_broken_files_are_counted_not_fatal(tmp_path):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "reward": 0.5}\n[]\n{"loss": 1}\n{"step": 2, "rew'
    )
    short = trajectory(log_prob=[0.0])
    fill(tmp_path, trajectories=[short, {"when": "after"}, trajectory()])
    data = embedded(tmp_path)
    assert data["skipped"] == {"config.json": 1, "metrics.jsonl": 3, "trajectories.jsonl": 2}
    assert data["stages"][0]["series"] == {"reward": [[1], [0.5]]}
    assert len(data["traces"]) == 1


def test_boards_are_limited_by_board_not_by_line(tmp_path):
    ids = range(viewer.MAX_IDS + 3)
    rows = [trajectory(when=when, id=i) for when in ("before", "after") for i in ids]
    rows.append(trajectory(when="after", id=0, reward=0.875))
    data = embedded(fill(tmp_path, trajectories=rows))
    assert len(data["traces"]) == 2 * viewer.MAX_IDS
    assert data["left_out"] == 3
    assert {row["reward"] for row in data["traces"] if row["id"] == "0"} == {0.5, 0.875}


def test_long_series_keep_their_ends(tmp_path):
    steps = 3 * report.MAX_POINTS
    rows = [{"step": step, "stage": "rl", "loss": step} for step in range(steps)]
    [x, y] = embedded(fill(tmp_path, metrics=rows))["stages"][0]["series"]["loss"]
    assert len(x) == report.MAX_POINTS
    assert (x[0], x[-1]) == (0, steps - 1)
    assert x == y


def test_two_thousand_lines_make_a_small_page(tmp_path):
    rows = [
        {"step": step, "stage": "rl"} | {f"metric_{i}": step / (i + 3) for i in range(25)}
        for step in range(2000)
    ]
    fill(tmp_path, metrics=rows)
    assert report.write(tmp_path).stat().st_size < 1_500_000


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "dmrl.report"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == tmp_path / "report.html"
    assert (tmp_path / "report.html").exists()
    usage = subprocess.run(command, capture_output=True, text=True, check=False)
    assert usage.returncode == 1
    assert "WORKDIR" in usage.stderr
