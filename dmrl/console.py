"""Live progress on a terminal; plain lines now and then where there is none."""

import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console as Terminal
from rich.table import Table


class Console:
    """One status line a step: stage, step, reward, solve rate, seconds a step, time left."""

    def __init__(self, active: bool = True, quiet_seconds: float = 10.0) -> None:
        self._active, self._quiet = active, quiet_seconds
        self._live = sys.stdout.isatty()
        self._last, self._solved = -float("inf"), ""
        self._pace: dict[str, float] = {}

    def note(self, text: str) -> None:
        """A line of its own."""
        if self._active:
            self._clear()
            print(text, flush=True)

    def step(
        self, stage: str, step: int, steps: int, values: Mapping[str, float], seconds: float
    ) -> None:
        """Shows a finished step; `seconds` is wall time since the one before."""
        if not self._active:
            return
        pace = self._pace.get(stage)  # the first step compiles: keep it out of the estimate
        self._pace[stage] = (
            values["step_time"] if pace is None or step <= 2 else (0.9 * pace + 0.1 * seconds)
        )
        now = time.monotonic()
        if not self._live and now - self._last < self._quiet and step < steps:
            return
        self._last = now
        left = int(self._pace[stage] * (steps - step))
        main = (
            f"reward {values['reward']:.3f}" if "reward" in values else f"loss {values['loss']:.3f}"
        )
        text = (
            f"{stage} {step}/{steps}  {main}{self._solved}  "
            f"{self._pace[stage]:.2f} s/step  ETA {left // 60}:{left % 60:02d}"
        )
        if self._live:
            print(f"\r\x1b[2K{text}", end="", flush=True)
        else:
            print(text, flush=True)

    def evaluated(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Remembers the newest solve rates for the status line."""
        del stage, step
        rates = [
            f"{v:.0%}" for k, v in values.items() if k.endswith("/solved") and "/validation/" in k
        ]
        self._solved = f"  solved {' '.join(rates)}" if rates else self._solved

    def table(self, title: str, rows: Sequence[tuple[str, float, float]]) -> None:
        """Before/after table of rates, in percent; the change in points."""
        if not self._active:
            return
        self._clear()
        table = Table(title=title)
        for name in ("metric", "before", "after", "change"):
            table.add_column(name, justify="left" if name == "metric" else "right")
        for name, before, after in rows:
            numbers = (f"{100 * before:.1f} %", f"{100 * after:.1f} %")
            table.add_row(name.removeprefix("eval/"), *numbers, f"{100 * (after - before):+.1f}")
        Terminal().print(table)

    def _clear(self) -> None:
        if self._live:
            print("\r\x1b[2K", end="")
