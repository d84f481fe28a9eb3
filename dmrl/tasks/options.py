"""Options of a task: checked at construction, with errors that name the value and the choices."""

import functools
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dmrl import sources
from dmrl.tasks import equality

Example = TypeVar("Example")


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

    Raises as `data_file` and `sources.lines`, and ValueError for a row that lacks one of `fields`.
    """
    return [row.values for row in _complete(sources.lines(data_file(data_dir, path)), fields)]


def _complete(found: Iterable[sources.Row], fields: Sequence[str]) -> list[sources.Row]:
    checked = list(found)
    for row in checked:
        missing = [field for field in fields if field not in row.values]
        if missing:
            raise ValueError(f"{row.where}: no field {missing[0]!r} among {', '.join(row.values)}")
    return checked


def source_of_rows(value: str, *own: str) -> None:
    """Checks the option `source` of a task that has sources of its `own`.

    Raises ValueError for what is no source; nothing is opened.
    """
    kind, _, place = value.partition(":")
    if value not in own and not (kind in sources.KINDS and place):
        raise ValueError(
            f"source={value!r} is not one of {', '.join(map(repr, own))}, 'jsonl:PATH', "
            "'hf:NAME[/CONFIG][:SPLIT]', 'tfds:NAME'"
        )


def divided(
    task: Any, split: str, make: Callable[[dict[str, Any]], Example], fields: Sequence[str] = ()
) -> list[Example]:
    """The examples of a split of a data set, `make(row)` for every row.

    Rows come from `task.source`, where 'published' is train.jsonl and test.jsonl in the folder
    `task.published` below `data_dir`, and 'easy' what `task.easy()` gives. Splits that the data
    set has are taken as they are. One that it lacks is `held_out_size` rows of its 'train', drawn
    by `split_seed` ('test' before 'validation'), and 'train' the rest: what chooses or measures is
    never trained on.

    Raises as `sources.read`, and ValueError for another split, for a row that lacks one of
    `fields` or of which `make` cannot make an example, and where nothing is left to train on.
    """
    one_of("split", split, sources.SPLITS)
    found = _found(task)
    if split in found and split != "train":
        chosen = _complete(found[split](), fields)
    elif "train" in found:
        chosen = _cut(task, split, _complete(found["train"](), fields), found)
    else:
        raise ValueError(f"source={task.source!r} has no split 'train' among {', '.join(found)}")
    if not chosen:
        raise ValueError(f"source={task.source!r}: split {split!r} has no rows")
    return [_made(make, row) for row in chosen]


def _found(task: Any) -> sources.Source:
    if task.source == "published":
        return published(task)
    if task.source == "easy":
        return {"train": lambda: (sources.Row("easy problems", row) for row in task.easy())}
    return sources.read(task.source)


def published(task: Any) -> sources.Source:
    """The files of a task below its `data_dir`; they need not exist until they are read."""

    def lines(split: str) -> Iterator[sources.Row]:
        return sources.lines(data_file(task.data_dir, f"{task.published}/{split}.jsonl"))

    return {split: functools.partial(lines, split) for split in ("train", "test")}


def _cut(
    task: Any, split: str, every: list[sources.Row], found: sources.Source
) -> list[sources.Row]:
    lacking = [s for s in ("test", "validation") if s not in found]
    size = task.held_out_size
    if size * len(lacking) >= len(every):
        raise ValueError(
            f"held_out_size={size} leaves none of {len(every)} rows to train on"
            + (f": {' and '.join(lacking)} are cut from them" if len(lacking) > 1 else "")
        )
    order = list(range(len(every)))
    if lacking:
        order = random.Random(task.split_seed).sample(order, len(order))
    pieces = {s: order[i * size : (i + 1) * size] for i, s in enumerate(lacking)}
    return [every[i] for i in pieces.get(split, order[len(lacking) * size :])]


def _made(make: Callable[[dict[str, Any]], Example], row: sources.Row) -> Example:
    try:
        return make(row.values)
    except (ValueError, TypeError, KeyError) as error:
        said = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{row.where}: {said}") from None


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
