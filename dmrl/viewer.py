"""The viewer of traces: a page that shows completions being decoded, step by step.

The training report shows the same view among its curves.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dmrl import page

SCRIPTS = ("viewer_trace.js", "viewer_board.js", "viewer.js")
"""What draws traces, in any page that calls `addViewer`."""
STYLES = ("viewer.css",)
MAX_IDS = 64

_COLUMNS = ("tokens", "reveal_step", "log_prob", "entropy")
_MORE = ("split", "prompt", "steps", "reward", "metrics", "grid", "box", "length", "changes")
_SHOWN = (*_COLUMNS, *_MORE, "answer", "violation", "branches")


def write(target: Path, title: str, traces: Sequence[Mapping[str, Any]]) -> Path:
    """Writes the page of `traces` and returns its path; nothing that it shows is fetched.

    Args:
      traces: each as `dmrl.trace.make` gives it, with `id` (which prompt), `setting` (how it was
        decoded) and `when` (by whom), and perhaps `split`, `prompt`, `reward`, `metrics` and
        `branches`. Traces of one `split` and `id` can stand side by side.

    Raises:
      ValueError: there is no trace.
      OSError: the file cannot be written.
    """
    if not traces:
        raise ValueError(f"no trace to show in {target}")
    data = page.finite({"name": title, "traces": list(traces)})
    return page.write(target, f"{title} · dmrl", data, (*SCRIPTS, "viewer_page.js"), STYLES)


def choose(rows: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], int, int]:
    """(traces to show, prompts left out, malformed rows) of what a run wrote.

    Of each setting the first MAX_IDS prompts are kept with all their traces; one that is recorded
    twice counts as its later line.
    """
    kept: dict[tuple[str, str, str], dict[str, Any]] = {}
    ids: dict[str, set[str]] = {}
    left_out: set[tuple[str, str]] = set()
    malformed = 0
    for row in rows:
        if not _is_trace(row):
            malformed += 1
            continue
        setting, name, when = (str(row[key]) for key in ("setting", "id", "when"))
        seen = ids.setdefault(setting, set())
        if name not in seen and len(seen) == MAX_IDS:
            left_out.add((setting, name))
            continue
        seen.add(name)
        names = {"setting": setting, "id": name, "when": when}
        kept[setting, name, when] = {key: row.get(key) for key in _SHOWN} | names
    return list(kept.values()), len(left_out), malformed


def _is_trace(row: Mapping[str, Any]) -> bool:
    """Whether the fields are there and each list has one entry a position."""
    lists = [row.get(key) for key in _COLUMNS]
    if row.get("answer") is not None:
        lists.append(row["answer"])
    return (
        all(key in row for key in ("when", "setting", "id"))
        and isinstance(row.get("steps"), int)
        and all(isinstance(column, list) for column in lists)
        and len({len(column) for column in lists if isinstance(column, list)}) == 1
        and all(isinstance(step, int) for step in row["reveal_step"])
    )
