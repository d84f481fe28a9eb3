"""Scores saved generations: one accuracy, read as one protocol says.

A generation is a line of a JSONL file with the fields of the authors' own files: `question`,
`generations` (the completion, perhaps with its special tokens) and `ground_truth`. Nothing
here knows a model.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dmrl import tasks

SCORER = 1
"""Raised whenever a change of the tasks moves an accuracy; two versions do not compare."""

_STYLES = ("evaluation", "published")
"""Prompt styles of saved generations, the first that the task has."""


class Generation(NamedTuple):
    """A saved completion with its question and its true answer as the file gives them."""

    question: str
    completion: str
    truth: Any


def load(task: str, protocol: str, **options: Any) -> tasks.Task:
    """The task as saved generations were prompted for, read as `protocol` says.

    Raises:
      ValueError: for an unknown task or protocol, or a task that cannot read generations.
    """
    for style in _STYLES:
        try:
            made = tasks.load(task, **{"style": style, "protocol": protocol, **options})
        except ValueError as error:
            if style != _STYLES[-1] and f"style={style!r}" in str(error):
                continue
            raise
        break
    if not hasattr(made, "recorded"):
        raise ValueError(f"task {task!r} reads no saved generations: it has no method `recorded`")
    return made


def generations(path: str | Path) -> Iterator[Generation]:
    """The generations of a file, in order.

    Raises:
      ValueError: naming file and line, for a line that is no JSON or lacks a field, and for a
        file without lines.
    """
    number = 0
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                yield Generation(row["question"], row["generations"], row["ground_truth"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: not a JSON object with question, generations and "
                    f"ground_truth ({type(error).__name__}: {error})"
                ) from None
    if not number:
        raise ValueError(f"{path} has no lines")


def scores(task: Any, found: Sequence[Generation]) -> list[dict[str, float]]:
    """What the task says of every generation."""
    return [task.score(task.recorded(g.question, g.truth), g.completion) for g in found]


def summary(task: Any, found: Sequence[Generation]) -> dict[str, Any]:
    """The result of a file, JSON-able: see `summarized`."""
    examples = [task.recorded(g.question, g.truth) for g in found]
    return summarized(task, examples, scores(task, found), len({g.question for g in found}))


def summarized(
    task: Any, examples: Sequence[Any], each: Sequence[Mapping[str, float]], questions: int
) -> dict[str, Any]:
    """What the scores of completions say together, JSON-able.

    Args:
      examples, each: of every completion its example and its score.
      questions: different questions among them.

    Returns:
      n: completions; n_questions.
      accuracy: share solved, with its 95% Wilson interval `accuracy_95` (over questions, where
        each was answered several times). For boards under 'd1' and 'spg' what these papers
        call so, the cell accuracy.
      cell_accuracy, board_accuracy: of boards: right empty cells of all empty cells, and
        boards solved.
      string_accuracy: of mathematics, the share right by the string rule.
      reward, and every part of the score: means.
    """
    mean = {name: float(np.mean([s[name] for s in each])) for name in each[0]}
    solved, n = mean.pop("solved"), len(each)
    sampled = bool(questions) and n % questions == 0 and n > questions
    low, high = interval(solved * questions, questions) if sampled else interval(solved * n, n)
    result: dict[str, Any] = {
        "n": n,
        "n_questions": questions,
        "accuracy": solved,
        "accuracy_95": [low, high],
    }
    if hasattr(task, "empty"):
        cells = float(np.average([s["cells"] for s in each], weights=[*map(task.empty, examples)]))
        result |= {"cell_accuracy": cells, "board_accuracy": solved}
        if getattr(task, "protocol", "paper") != "paper":
            result |= {"accuracy": cells, "accuracy_95": None}
    if "string" in mean:
        result["string_accuracy"] = mean.pop("string")
    return rounded(result | {"means": mean})


def described(task: Any) -> dict[str, Any]:
    """The options that a result depends on, and the scorer's version."""
    options = dataclasses.asdict(task)
    paper = options.get("protocol", "paper") == "paper"
    kept = ("style", "protocol", *(["equality"] if paper else []))
    return {"scorer": SCORER} | {name: options[name] for name in kept if name in options}


def interval(successes: float, count: int) -> tuple[float, float]:
    """95% Wilson interval of a rate, as fractions."""
    z, rate = 1.959964, successes / count
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(rate * (1 - rate) / count + z * z / (4 * count**2))
    return float(centre - half), float(centre + half)


def rounded(value: Any) -> Any:
    """Floats to six decimals, so that a line can be read."""
    if isinstance(value, Mapping):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return round(value, 6) if isinstance(value, float) else value
