"""Runs programs that a model wrote, against tests they cannot see, and survives them.

Every run is two processes of their own (`dmrl.confined`): the program, and the tests, which
call it over a pipe and get plain data back. Both live in fresh Linux namespaces: no network, no
other process, no file but Python's own and a scratch directory in memory, no privilege, an
empty environment, limits on CPU time, memory, files and processes; and when the time is up all
of it is killed, children included. A verdict comes from the checking process alone.

Time limits go by the clock, so a verdict near the limit depends on the machine: rewards of code
are not bitwise reproducible, and are stored with the completions.
"""

import dataclasses
import functools
import json
import os
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_PROGRAM = Path(__file__).resolve().parent / "confined.py"
CONFINEMENTS = ("namespaces", "rlimits")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a run may use."""

    seconds: float = 5.0
    """Wall-clock and, rounded up, CPU seconds of the program and its tests together."""
    memory: int = 1 << 30
    """Bytes of address space of a process."""
    megabytes: int = 16
    """Of files in the scratch directory, and of one file."""
    processes: int = 16
    """Processes and threads."""
    confinement: str = "namespaces"
    """'namespaces', or 'rlimits' where the system grants no user namespaces: limits and an
    empty environment as before, and a hook in Python that refuses files, sockets and new
    processes. Code that reaches C gets around the hook: for programs that mean no harm."""


class Tests(NamedTuple):
    """What a program is held against."""

    setup: str
    """Code that runs first, beside the tests and not beside the program."""
    functions: Mapping[str, str]
    """Names in the tests -> functions of the program. `from solution import f` works too."""
    checks: Sequence[str]
    """Pieces of code; each that ends without an exception is passed."""


class Verdict(NamedTuple):
    """How a program did."""

    passed: int
    total: int
    reason: str
    """'' after a verdict, 'time' when the time was up, 'ended' when the tests broke off."""


def run(code: str, tests: Tests, limits: Limits = Limits()) -> Verdict:
    """Runs a program against its tests; takes some 0.1 s, at most `limits.seconds` and a bit.

    Raises:
      RuntimeError: the system cannot confine as `limits` ask for.
      ValueError: for an unknown confinement.
    """
    if limits.confinement not in CONFINEMENTS:
        raise ValueError(f"confinement={limits.confinement!r} is not one of {CONFINEMENTS}")
    if limits.confinement == "namespaces" and not namespaces():
        raise RuntimeError(
            "this system grants no user namespaces, so programs cannot be shut in; allow them "
            "(sysctl kernel.unprivileged_userns_clone or user.max_user_namespaces), or choose "
            "confinement='rlimits', which stops only programs that mean no harm"
        )
    calls, replies, verdict = os.pipe(), os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(prefix="dmrl-sandbox-") as scratch:
        cells = []
        try:
            solution = {"role": "solution", "code": code}
            cells.append(_start(solution, (calls[0], replies[1]), "rw", limits, scratch))
            checker = {"role": "checker", **tests._asdict()}
            ends = (calls[1], replies[0], verdict[1])
            cells.append(_start(checker, ends, "wrw", limits, scratch))
            for end in (*calls, *replies, verdict[1]):
                os.close(end)
            said = _line(verdict[0], limits.seconds)
        finally:
            for cell in cells:
                _end(cell)
            os.close(verdict[0])
    total = len(tests.checks)
    if said is None or not said.strip().isdigit():
        return Verdict(0, total, "time" if said is None else "ended")
    return Verdict(min(int(said), total), total, "")


@functools.cache
def namespaces() -> bool:
    """Whether the system lets this user build the namespaces; tried once."""
    if not sys.platform.startswith("linux"):
        return False
    with tempfile.TemporaryDirectory(prefix="dmrl-sandbox-") as scratch:
        cell = _start({"role": "probe"}, (), "", Limits(), scratch, stdout=subprocess.PIPE)
        try:
            return bool(cell.communicate(timeout=20)[0] == b"confined\n")
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(cell)


def _start(
    job: Mapping[str, Any],
    fds: Sequence[int],
    modes: str,
    limits: Limits,
    scratch: str,
    stdout: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    values = dataclasses.asdict(limits) | {"seconds": int(limits.seconds) + 1}
    values |= {
        "namespaces": limits.confinement == "namespaces",
        "visible": _visible(),
        "fds": fds,
        "modes": list(modes),
    }
    cell = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_PROGRAM)],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        pass_fds=fds,
        env={},
        cwd=scratch,
        start_new_session=True,
    )
    assert cell.stdin is not None
    cell.stdin.write(json.dumps({**values, **job}).encode())
    cell.stdin.close()
    cell.stdin = None
    return cell


@functools.cache
def _visible() -> list[str]:
    """Directories that a Python interpreter needs: its own and the system's libraries."""
    paths = sysconfig.get_paths()
    wanted = {paths["stdlib"], "/lib", "/lib64", "/usr/lib", "/usr/lib64"}
    library = sysconfig.get_config_var("LIBDIR")
    return sorted({os.path.realpath(p) for p in (*wanted, library) if p and os.path.isdir(p)})


def _line(fd: int, seconds: float) -> str | None:
    """What is written to `fd` until a line or the end; None when the time is up."""
    deadline, held = time.monotonic() + seconds, b""
    while not held.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            return None
        piece = os.read(fd, 64)
        if not piece:
            break
        held += piece
    return held.decode()


def _end(cell: subprocess.Popen[bytes]) -> None:
    """Kills a process with its group; the namespace dies with its first process."""
    if cell.poll() is None:
        os.killpg(cell.pid, signal.SIGKILL)
    cell.wait()
