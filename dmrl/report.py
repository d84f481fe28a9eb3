"""The HTML report of a run: one self-contained page, drawn from what the run wrote.

`python -m dmrl.report WORKDIR` writes it again at any time. The page fetches nothing: metrics
and traces are embedded as JSON, and drawn by the scripts beside this file.
"""

import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dmrl import page, viewer

SCRIPTS = ("report_charts.js", *viewer.SCRIPTS, "report.js")
STYLES = (*viewer.STYLES, "report.css")
MAX_POINTS = 2000


def write(workdir: Path) -> Path:
    """Writes `workdir/report.html` from config.json, metrics.jsonl and trajectories.jsonl.

    Each of the three may be missing, and lines that cannot be read are skipped and counted on
    the page, so that a report can be written at any moment of a run. The file is replaced
    atomically.

    Raises:
      NotADirectoryError: if `workdir` is not a directory.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise NotADirectoryError(f"workdir must be the directory of a run, got {str(workdir)!r}")
    data = _collect(workdir)
    return page.write(workdir / "report.html", f"{data['name']} · dmrl", data, SCRIPTS, STYLES)


def _collect(workdir: Path) -> dict[str, Any]:
    """Everything the page shows, ready for JSON: metrics at six digits, the config exactly."""
    meta, bad_config = _read_config(workdir / "config.json")
    logged, bad_lines = _read_lines(workdir / "metrics.jsonl")
    lines = [line for line in logged if isinstance(line.get("step"), int)]
    rows, bad_rows = _read_lines(workdir / "trajectories.jsonl")
    stages = _stages(lines)
    traces, left_out, bad_traces = viewer.choose(rows)
    skipped = {
        "config.json": bad_config,
        "metrics.jsonl": bad_lines + len(logged) - len(lines),
        "trajectories.jsonl": bad_rows + bad_traces,
    }
    found = {
        "name": workdir.resolve().name,
        "facts": _facts(meta, stages),
        "changes": _changes(stages),
        "stages": [_thin(stage) for stage in stages],
        "traces": traces,
        "left_out": left_out,
        "skipped": {name: count for name, count in skipped.items() if count},
        "packages": meta.get("packages"),
        "git": meta.get("git"),
    }
    return {**page.finite(found), "config": page.finite(meta.get("config"), ".17g")}


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _read_config(path: Path) -> tuple[dict[str, Any], int]:
    """(contents, 0), or ({}, 1) if the file is there but is not a JSON object."""
    if not path.exists():
        return {}, 0
    value = _json_object(path.read_text(encoding="utf-8", errors="replace"))
    return ({}, 1) if value is None else (value, 0)


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a file, and how many lines were not one (a run cut off mid-write)."""
    if not path.exists():
        return [], 0
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = [_json_object(line) for line in lines if line.strip()]
    found = [row for row in rows if row is not None]
    return found, len(rows) - len(found)


def _stages(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics by stage in order of appearance: name, title, offset, first and last step, and
    "series", {key: (steps, values)}.

    A resumed run logs some steps twice: the later line counts. `offset` places a stage whose steps
    count from 0 again behind the one before it on a common axis; it is 0 where steps run on.
    """
    values: dict[str, dict[str, dict[int, Any]]] = {}
    for line in lines:
        step = line["step"]
        stage = values.setdefault(str(line.get("stage", "rl")), {})
        for key, value in line.items():
            if type(value) in (int, float) and key != "step":  # a bool is an int, but no number
                stage.setdefault(key, {})[step] = value
    stages: list[dict[str, Any]] = []
    end: int | None = None
    for name, columns in values.items():
        steps = {step for column in columns.values() for step in column}
        if not steps:
            continue
        offset = end if end is not None and min(steps) < end else 0
        end = offset + max(steps)
        series = {key: _sorted_columns(column) for key, column in columns.items()}
        stages.append(
            {
                "name": name,
                "title": _stage_name(name),
                "offset": offset,
                "first": min(steps),
                "last": max(steps),
                "series": series,
            }
        )
    return stages


def _sorted_columns(column: dict[int, Any]) -> tuple[list[int], list[Any]]:
    steps = sorted(column)
    return steps, [column[step] for step in steps]


def _thin(stage: dict[str, Any]) -> dict[str, Any]:
    """At most MAX_POINTS points a series, evenly spaced, first and last among them."""
    series = {}
    for key, (x, y) in stage["series"].items():
        if len(x) > MAX_POINTS:
            pick = [round(i * (len(x) - 1) / (MAX_POINTS - 1)) for i in range(MAX_POINTS)]
            series[key] = ([x[i] for i in pick], [y[i] for i in pick])
        else:
            series[key] = (x, y)
    return {**stage, "series": series}


def _changes(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """First and last finite value of each evaluation metric, and the value where RL began.

    `middle` is the last value before the final stage. `middle` and `after` are None unless they
    are measurements of their own.
    """
    found = {key for stage in stages for key in stage["series"] if key.startswith("eval/")}
    keys = sorted(found, key=_natural)
    changes = []
    for key in keys:
        by_stage = [
            [value for value in stage["series"].get(key, ((), ()))[1] if math.isfinite(value)]
            for stage in stages
        ]
        earlier = [value for values in by_stage[:-1] for value in values]
        every = earlier + by_stage[-1]
        if every:
            middle = earlier[-1] if len(earlier) > 1 and by_stage[-1] else None
            after = every[-1] if len(every) > 1 else None
            row = {"before": every[0], "middle": middle, "after": after}
            changes.append({"name": key.removeprefix("eval/")} | row)
    return changes


def _natural(name: str) -> list[tuple[str, int]]:
    """Sort key that puts greedy_4 before greedy_16."""
    return [(text, int(part or 0)) for text, part in re.findall(r"(\D*)(\d*)", name)]


def _facts(meta: dict[str, Any], stages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What ran, as (label, text) pairs; what is not known is left out."""
    config = meta.get("config")
    facts = [
        ("Task", _named(_find(config, "task"))),
        ("Objective", _objective(_find(config, "terms"))),
        ("Model", _model(_find(config, "model"))),
        ("Device", str(meta.get("device") or "")),
        ("Steps", ", ".join(f"{s['title']} {s['last']:,}" for s in stages)),
        ("Time", _duration(stages)),
    ]
    return [(label, text) for label, text in facts if text]


def _stage_name(name: str) -> str:
    return "RL" if name == "rl" else name.replace("_", " ")


def _find(config: Any, key: str) -> Any:
    """The value of `key` at the least depth of a nested config, or None."""
    level = [config] if isinstance(config, dict) else []
    while level:
        for node in level:
            if key in node:
                return node[key]
        level = [child for node in level for child in node.values() if isinstance(child, dict)]
    return None


def _named(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("name")
    return str(value or "")


def _objective(terms: Any) -> str:
    """Text like `1 × diffu_grpo + 0.5 × dispo` of {name: {"weight": weight, ...}, ...}."""
    if not isinstance(terms, dict):
        return ""
    weights = {k: v.get("weight") for k, v in terms.items() if isinstance(v, dict)}
    return " + ".join(
        f"{w:g} × {k}" for k, w in weights.items() if isinstance(w, int | float) and w
    )


def _model(model: Any) -> str:
    if not isinstance(model, dict):
        return str(model or "")
    sizes = {k: v for k, v in model.items() if isinstance(v, int) and not isinstance(v, bool)}
    return ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in sizes.items())


def _duration(stages: list[dict[str, Any]]) -> str:
    times = [time for stage in stages for time in stage["series"].get("step_time", ((), ()))[1]]
    seconds = sum(time for time in times if math.isfinite(time))
    if not times or seconds < 0:
        return ""
    if seconds < 120:
        return f"{seconds:.1f} s of logged steps"
    hours, minutes = divmod(round(seconds / 60), 60)
    return (f"{hours} h " if hours else "") + f"{minutes} min of logged steps"


def main() -> None:
    """Writes the report of the run directory named on the command line and prints its path."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m dmrl.report WORKDIR")
    print(write(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
