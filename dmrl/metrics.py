"""Where numbers go: JSON lines always, TensorBoard and W&B when asked."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class Lines:
    """An append-only JSONL file that can be cut back to where a checkpoint left it."""

    def __init__(self, path: Path, active: bool = True) -> None:
        self.path, self._active = path, active

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one line and flushes it to the operating system. NaN and Inf become null."""
        if self._active:
            with self.path.open("a") as file:
                file.write(json.dumps(_finite(row), allow_nan=False) + "\n")

    def size(self) -> int:
        """Bytes written so far; a checkpoint keeps this number."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Drops everything after `size` bytes: lines newer than the checkpoint restored."""
        if self._active and self.path.exists():
            os.truncate(self.path, min(size, self.size()))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Metrics:
    """metrics.jsonl in the workdir, and any further writers by name."""

    def __init__(
        self, workdir: Path, writers: Iterable[str] = (), run: str = "", active: bool = True
    ) -> None:
        """Raises ValueError for an unknown writer, ImportError if its package is missing."""
        self.lines = Lines(workdir / "metrics.jsonl", active)
        self._writers = [_WRITERS[w](workdir, run) for w in known(writers)] if active else []

    def write(self, step: int, stage: str, values: Mapping[str, Any]) -> None:
        """One line: step, stage, then the values."""
        self.lines.append({"step": step, "stage": stage, **values})
        for writer in self._writers:
            writer(step, {f"{stage}/{k}": float(v) for k, v in values.items()})


def known(writers: Iterable[str]) -> tuple[str, ...]:
    """The names of further writers, checked.

    Raises:
      ValueError: there is no such writer.
    """
    names = tuple(writers)
    for name in names:
        if name not in _WRITERS:
            raise ValueError(
                f"metrics: no writer {name!r}; choose from {', '.join(map(repr, _WRITERS))}"
            )
    return names


def _tensorboard(workdir: Path, run: str) -> Any:
    from tensorboardX import SummaryWriter

    board = SummaryWriter(str(workdir / "tensorboard"), flush_secs=1)

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            board.add_scalar(name, value, step)

    return write


def _wandb(workdir: Path, run: str) -> Any:
    import wandb

    session = wandb.init(project="dmrl", name=run, dir=str(workdir), resume="allow")
    return lambda step, values: session.log({**values, "step": step})


_WRITERS = {"tensorboard": _tensorboard, "wandb": _wandb}
