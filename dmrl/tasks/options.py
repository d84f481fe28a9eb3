"""Options of a task: checked at construction, with errors that name the value and the choices."""

import functools
import gzip
import json
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dmrl.tasks import equality


def one_of(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


def span(name: str, value: object, low: int, high: int) -> tuple[int, int]:
    """`value` as a pair (first, last), both inclusive, within [low, high].

    Raises ValueError for anything but two integers with low <= first <= last <= high.
    """
    pair = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) == 2 and all(type(bound) is int for bound in pair):
        first, last = pair
        if low <= first <= last <= high:
            return first, last
    raise ValueError(
        f"{name}={value!r} is not a range: give two integers (first, last), "
        f"both inclusive, with {low} <= first <= last <= {high}"
    )


def at_least(name: str, value: object, low: int) -> None:
    """Raises ValueError unless `value` is an integer >= `low`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name}={value!r} is not an integer of at least {low}")


def data_file(data_dir: str | None, path: str) -> Path:
    """The published file `path` below `data_dir`, or below $DMRL_DATA where that is None.

    Raises ValueError when no directory is given, FileNotFoundError when the file is absent.
    """
    root = data_dir or os.environ.get("DMRL_DATA")
    if not root:
        raise ValueError(
            f"published data needs a directory holding {path}: set data_dir=... "
            "or the environment variable DMRL_DATA"
        )
    file = Path(root) / path
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}: data_dir (or DMRL_DATA) must hold {path}")
    return file


def rows(data_dir: str | None, path: str, fields: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The objects of a JSONL file (perhaps .gz) below `data_dir`, in order.

    Raises as `data_file`, and ValueError, with the line's number, for a line that is no JSON
    object or lacks one of `fields`.
    """
    file = data_file(data_dir, path)
    opened = gzip.open if file.suffix == ".gz" else open
    found = []
    with opened(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: no JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number}: {line[:40]!r} is no JSON object")
            missing = [field for field in fields if field not in row]
            if missing:
                raise ValueError(
                    f"{file}, line {number}: no field {missing[0]!r} among {', '.join(row)}"
                )
            found.append(row)
    if not found:
        raise ValueError(f"{file} has no lines")
    return found


def divided(
    folder: str,
    split: str,
    data_dir: str | None,
    seed: int,
    held_out: int,
    fields: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The rows of a data set that comes as train.jsonl and test.jsonl in `folder`.

    'validation' is `held_out` rows of the training file, drawn by `seed`, and 'train' the
    rest, so that the test file is never used to choose anything.

    Raises as `rows`, and ValueError for another split or where nothing is left to train on.
    """
    one_of("split", split, ("train", "validation", "test"))
    if split == "test":
        return rows(data_dir, f"{folder}/test.jsonl", fields)
    every = rows(data_dir, f"{folder}/train.jsonl", fields)
    if held_out >= len(every):
        raise ValueError(f"held_out_size={held_out} leaves none of {len(every)} rows to train on")
    order = random.Random(seed).sample(range(len(every)), len(every))
    chosen = order[:held_out] if split == "validation" else order[held_out:]
    return [every[i] for i in chosen]


@functools.lru_cache(maxsize=16)
def shots_of(task: Any, count: int, seed: int) -> list[Any]:
    """`count` examples of the task's train split, drawn by `seed`; [] reads no file."""
    return random.Random(seed).sample(list(task.examples("train")), count) if count else []


def equality_rule(value: str, protocol: str) -> None:
    """Checks the option `equality`.

    Raises ValueError for an unknown rule, and for 'verify' without math-verify where it is
    needed.
    """
    one_of("equality", value, ("verify", "string"))
    if value == "verify" and protocol == "paper" and not equality.available():
        raise ValueError(
            "equality='verify' needs the package math-verify: pip install 'dmrl[eval]', "
            "or set equality='string'"
        )
