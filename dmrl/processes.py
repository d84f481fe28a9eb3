"""The processes of one logical run: joining them, sharing host work, agreeing, stopping.

Every process runs the same command and makes the same calls in the same order. Device work is
shared by the mesh; what the host computes (rewards) is shared here. One process is the same
program: nothing is sent anywhere.
"""

import functools
import os
import sys
import zlib
from collections.abc import Callable
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
SILENT_SECONDS = 60
"""A process that says nothing for so long is taken for dead, and the others stop."""
EXIT_SECONDS = 1800
"""How long a process that has finished waits for the others, which may still write files."""

PEERS = (
    "(If another process of this run stopped first, its own output says why. Start all processes "
    "again with the same command: the run continues from its last checkpoint.)"
)


def join() -> None:
    """Joins the other processes of this run, if there are any. Call before anything uses jax.

    On Cloud TPU slices, SLURM, Kubernetes jobs and Open MPI the environment says who they are.
    Elsewhere set JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. With neither, the process is alone.

    Raises:
      ValueError: some of the three variables are set, but not all, or to no number.
    """
    named = {name: os.environ.get(name, "") for name in (ADDRESS, COUNT, NUMBER)}
    initialize = functools.partial(
        jax.distributed.initialize,
        heartbeat_timeout_seconds=SILENT_SECONDS,
        shutdown_timeout_seconds=EXIT_SECONDS,
    )
    if named[COUNT] or named[NUMBER]:
        numbers = [named[COUNT], named[NUMBER]]
        if not named[ADDRESS] or not all(x.isdigit() for x in numbers):
            told = ", ".join(f"{name}={value!r}" for name, value in named.items())
            raise ValueError(f"{told}: give host:port of process 0, their number, and 0 to it - 1")
        initialize(named[ADDRESS], int(named[COUNT]), int(named[NUMBER]))
        return
    try:
        initialize()
    except ValueError as error:
        if "should be defined" not in str(error):  # jax found no cluster around it
            raise
    except OSError as error:  # a TPU machine without a metadata server, such as a notebook's
        print(f"no other processes found ({error}): this one is alone", file=sys.stderr)


def is_writer() -> bool:
    """Whether this process writes the run's files."""
    return jax.process_index() == 0


def any_of(flag: bool) -> bool:
    """Whether `flag` is set in any process: the same answer in all."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def check_same(what: str, text: str) -> None:
    """Raises ValueError in every process unless `text` is the same in all of them."""
    if jax.process_count() == 1:
        return
    sums = multihost_utils.process_allgather(np.array(zlib.crc32(text.encode()), np.uint32))
    if np.any(sums != sums[0]):
        other = int(np.argmax(sums != sums[0]))
        raise ValueError(
            f"process {other} has another {what} than process 0: start all with the same command "
            "and the same version"
        )


def shared_rows(count: int, work: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Rows 0..count-1 of a table whose rows the processes compute by turns; all get all of it.

    Args:
      work: row numbers [n] -> their rows [n, C], float64. What it returns for a row is what
        every process sees, so that results which differ from call to call agree.
    """
    processes = jax.process_count()
    if processes == 1:
        return work(np.arange(count))
    # Everybody computes as many, the last rows perhaps twice: shapes must agree.
    each = -(-count // processes)
    own = np.minimum(np.arange(each) * processes + jax.process_index(), count - 1)
    words = np.ascontiguousarray(work(own), np.float64).view(np.uint32)  # jax would round float64
    gathered = np.ascontiguousarray(multihost_utils.process_allgather(words))
    table = gathered.view(np.float64)
    return np.moveaxis(table, 0, 1).reshape(each * processes, -1)[:count]


def stop(message: str) -> NoReturn:
    """Ends a run that cannot go on, with exit status 1 and one line.

    With several processes it does not wait for the others, which may be waiting for this one:
    they notice that it is gone.
    """
    if jax.process_count() == 1:
        sys.exit(message)
    place = f"process {jax.process_index()} of {jax.process_count()}"
    print(f"{place}: {message}\n{PEERS}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
