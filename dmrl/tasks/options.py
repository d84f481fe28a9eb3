"""Options of a task: checked at construction, with errors that name the value and the choices."""

import os
from collections.abc import Iterable
from pathlib import Path


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
