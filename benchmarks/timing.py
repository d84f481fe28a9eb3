"""What the benchmarks of speed share: clocks, memory, the machine, rows of the table."""

import ctypes
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags, logging

REPEATS = flags.DEFINE_integer("repeats", 7, "Timed runs of each contestant")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CLOCK = flags.DEFINE_enum(
    "clock", "wall", list(CLOCKS), "cpu: seconds of this process, for one core that others share"
)
SHAPES = flags.DEFINE_list("shapes", ["T0", "T1"], "Which shapes, where a script takes several")
SERVE = flags.DEFINE_list("serve", None, "Only run the peer of this case, once a line of input")
OUT = flags.DEFINE_string("out", "runs/bench", "Where the JSON goes")


class Times(NamedTuple):
    """Seconds of one contestant."""

    first: float
    """The first call, compilation included."""
    minimum: float
    median: float
    load: float
    """Load average of the last minute, when the last repeat ended."""

    @property
    def compile(self) -> float:
        """What the first call took beyond an ordinary one."""
        return max(self.first - self.median, 0.0)


def alternate(contestants: Mapping[str, Callable[[], Any]]) -> dict[str, Times]:
    """Runs all of them --repeats times in turn, A B A B, after one call each to warm up.

    Turns, so that what else the machine does hits all of them alike.
    """
    first = {name: _seconds(run) for name, run in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(REPEATS.value):
        for name, run in contestants.items():
            seconds[name].append(_seconds(run))
    load = os.getloadavg()[0]
    times = {
        name: Times(first[name], min(found), statistics.median(found), load)
        for name, found in seconds.items()
    }
    for name, found in times.items():
        logging.info("%s: min %.4g s, median %.4g s", name, found.minimum, found.median)
    return times


class Apart:
    """A contestant in a process of its own, timed by that process's clock.

    For what must not profit from how this one was set up (`dmrl.heap`).
    """

    def __init__(self, *options: str) -> None:
        command = [sys.executable, *sys.argv, *options]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def __call__(self) -> float:
        """Seconds of one run. Raises BrokenPipeError or ValueError if the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def serve(run: Callable[[], Any]) -> None:
    """The other end of `Apart`: a run and its seconds for every line."""
    for _ in sys.stdin:
        print(_seconds(run), flush=True)


def _seconds(run: Callable[[], Any]) -> float:
    """Of one run, which may itself say its seconds.

    Raises ValueError for the CPU clock on several cores: threads that wait would count.
    """
    if CLOCK.value == "cpu" and cores() > 1:
        raise ValueError(f"--clock=cpu needs one core, not {cores()}: run under `taskset -c 0`")
    clock = CLOCKS[CLOCK.value]
    start = clock()
    found = jax.block_until_ready(run())
    return found if isinstance(found, float) else clock() - start


def ratio(times: Mapping[str, Times], over: str, under: str) -> float:
    """How many times longer `over` takes than `under`, by medians."""
    return times[over].median / times[under].median


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes that the process grows by at the worst moment of `run`: Linux's high-water mark.

    What the allocator kept from earlier runs goes back first: `run` would use it unseen.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    jax.block_until_ready(run())
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{name}:"))


def workspace(compiled: Any) -> int:
    """Bytes of temporaries of a compiled program, beside its arguments and results."""
    return int(compiled.memory_analysis().temp_size_in_bytes)


@functools.cache
def peak_flops(dtype: str = "float32") -> float:
    """FLOP/s of a large matrix product on this device, now: the roof of the roofline."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    precision = "highest" if dtype == "float32" else "default"
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    best = alternate({"product": lambda: product(x, x)})["product"].minimum
    return 2 * size**3 / best


def cores() -> int:
    """Cores that this process may use; both sides of a comparison get as many threads."""
    return len(os.sched_getaffinity(0))


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    device = jax.devices()[0]
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "device": device.device_kind if device.platform != "cpu" else (names or ["cpu"])[0],
        "cores": cores(),
        "devices": jax.device_count(),
        "clock": CLOCK.value,
        "peak GFLOP/s": round(peak_flops() / 1e9, 1),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


class Row(NamedTuple):
    """One line of the table. Ratios above 1 say that dmrl is faster."""

    item: str
    what: str
    shape: str
    figure: str
    goal: str = ""
    bound: str = ""
    peer: float | None = None
    full_logits: float | None = None
    roofline: float | None = None
    """Least possible seconds (FLOPs over the measured peak) over measured ones."""
    met: bool | None = None


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    head = ["item", "what", "shape", "figure", "goal", "bound", "vs peer", "vs own full logits"]
    lines = [[*head, "of roofline", "met"], ["---"] * 10]
    for row in rows:
        ratios = [
            "" if x is None else f"{x:.2f}" for x in (row.peer, row.full_logits, row.roofline)
        ]
        met = {None: "", True: "yes", False: "no"}[row.met]
        lines.append([row.item, row.what, row.shape, row.figure, row.goal, row.bound, *ratios, met])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def save(name: str, rows: Sequence[Row], details: Mapping[str, Any]) -> None:
    """Prints the table and writes OUT/NAME.json: rows, seconds, machine."""
    print(table(rows), flush=True)
    folder = Path(OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "rows": [row._asdict() for row in rows],
        "seconds": details,
        "machine": machine(),
    }
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
