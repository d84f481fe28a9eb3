"""Checkpoints: arrays and host state of one step, written whole or not at all.

Orbax does the writing (in the background, each process its own shards, onto local disks or
object stores), the commit by rename, and the resharding. This file adds what a run that must
survive a kill needs: it says where a checkpoint and the configuration disagree, goes back to
the previous checkpoint when the newest is damaged, and reports failures in one sentence.
"""

import json
import logging
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

try:
    from orbax.checkpoint import v1 as ocp
except ImportError:  # orbax releases that still call this interface experimental
    from orbax.checkpoint.experimental import v1 as ocp

log = logging.getLogger(__name__)

# Every orbax failure reaches the caller as an exception or as a warning of ours, so its own
# running commentary (written to absl's logger, like everybody's) only hides them.
logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, read, or made to fit the configuration."""


class _Damaged(CheckpointError):
    """The files of a checkpoint are missing, truncated or unreadable."""


class Checkpoints:
    """The checkpoints of one run, one directory per step.

    In a run of several processes every process makes the same calls in the same order.
    Opening a directory and restoring from it changes nothing there, so an evaluation may read
    beside a run that writes; only one run at a time may write. What a killed save left behind
    is removed before the first save.

    Args:
      directory: local path, or an object store such as `gs://bucket/run`.
      keep: how many of the newest checkpoints to keep, at least 1. The oldest is deleted only
        after the newest is committed.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        path = os.fspath(directory)
        self.directory = path if "://" in path else os.path.abspath(path)
        self._keep = keep
        self._writer: Any = None
        self._pending: tuple[int, Any] | None = None
        self._damaged: set[int] = set()

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, oldest first."""
        return sorted(self._paths())

    def save(self, step: int, state: Any, host: dict) -> None:
        """Writes one checkpoint; returns once the arrays may be donated, then goes on writing.

        Waits for the previous save first, and raises what went wrong with it. Checkpoints that
        `restore` found damaged are deleted here: the run has gone on without them.

        Args:
          step: must be larger than every step saved so far.
          state: pytree of `jax.Array` (any sharding, empty arrays and typed keys included).
          host: what JSON can hold; in a run of several processes, that of process 0 is kept.

        Raises:
          CheckpointError: this or the previous checkpoint could not be written.
        """
        self.wait()
        newest = max(set(self.steps()) - self._damaged, default=None)
        if newest is not None and step <= newest:
            raise CheckpointError(
                f"cannot save step {step} under {self.directory}: step {newest} is already "
                "there; continue from it, delete the newer ones, or choose another directory"
            )
        leaves = _leaves(state)
        for path, leaf in leaves.items():
            if not isinstance(leaf, jax.Array):
                raise CheckpointError(f"a state holds jax arrays, but {path} is {leaf!r}")
        try:
            record = {"host": host, "leaves": _describe(leaves)}
            json.dumps(record)
            self._open_writer()
            for damaged in sorted(self._damaged & set(self.steps())):
                self._writer.delete(damaged)
            self._damaged.clear()
            response = self._writer.save_checkpointables_async(
                step, {"state": _stored(leaves)}, force=True, custom_metadata=record
            )
        except Exception as error:
            raise self._save_failed(step, error) from error
        self._pending = (step, response)

    def restore(self, abstract: Any) -> tuple[int, Any, dict] | None:
        """Reads the newest checkpoint that is whole.

        A damaged checkpoint is named in a warning and the one before it is tried.

        Args:
          abstract: pytree of `jax.ShapeDtypeStruct` or arrays: the structure, shapes, dtypes
            and shardings to restore into, whatever mesh the checkpoint was written from. A
            leaf without a sharding goes to the first local device.

        Returns:
          (step, state, host), or None if there is no checkpoint.

        Raises:
          CheckpointError: the newest readable checkpoint holds another tree, or none is whole.
        """
        self.wait()
        failures = {}
        for step in reversed(self.steps()):
            try:
                state, host = self._read(step, abstract)
            except _Damaged as error:
                failures[step] = str(error)
                log.warning("%s; trying the one before it", error)
                continue
            self._damaged = set(failures)
            return step, state, host
        if failures:
            raise CheckpointError("no checkpoint can be read: " + "; ".join(failures.values()))
        return None

    def restore_step(self, step: int, abstract: Any) -> tuple[Any, dict]:
        """Reads the checkpoint of `step`; see `restore`. Raises CheckpointError."""
        self.wait()
        if step not in self.steps():
            raise CheckpointError(
                f"no checkpoint of step {step} under {self.directory}; there are {self.steps()}"
            )
        return self._read(step, abstract)

    def wait(self) -> None:
        """Returns once the last save is committed; raises CheckpointError if it failed."""
        if self._pending is None:
            return
        step, response = self._pending
        self._pending = None
        try:
            response.result()
        except Exception as error:
            raise self._save_failed(step, error) from error

    def close(self) -> None:
        """Waits for the last save and releases the writer; a later save opens it again."""
        try:
            self.wait()
        finally:
            self._close_writer()

    def _paths(self) -> dict[int, Any]:
        found = ocp.path.step.standard_name_format().find_all(self.directory)
        return {checkpoint.step: checkpoint.path for checkpoint in found}

    def _open_writer(self) -> None:
        if self._writer is None:
            self._writer = ocp.training.Checkpointer(
                self.directory,
                preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
                cleanup_tmp_directories=True,
            )

    def _close_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _save_failed(self, step: int, error: Exception) -> CheckpointError:
        try:  # the next save starts from a clean writer, which removes the torn files
            self._close_writer()
        except Exception as again:
            log.debug("closing after a failed save: %s", again)
        good = max(set(self.steps()) - self._damaged, default=None)
        last = "there is no checkpoint yet" if good is None else f"the last good one is step {good}"
        return CheckpointError(
            f"could not save step {step} under {self.directory}: {_reason(error)}; {last}"
        )

    def _read(self, step: int, abstract: Any) -> tuple[Any, dict]:
        path = self._paths()[step]
        record = _agreed(path, lambda: _read_record(path))
        targets = {name: _target(leaf) for name, leaf in _leaves(abstract).items()}
        if difference := _difference(record["leaves"], _describe(targets)):
            raise CheckpointError(f"{path} does not fit this configuration: {difference}")
        leaves = _agreed(path, lambda: _read_leaves(path, targets))
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves), record["host"]


def _agreed(path: Any, read: Callable[[], Any]) -> Any:
    """What `read` returns, or the same exception in every process: all restore one step."""
    good, reason = True, "another process cannot read its part"
    try:
        result = read()
    except Exception as error:  # damage shows up as any exception at all
        good, reason = False, _reason(error)
    if jax.process_count() > 1:
        good = bool(np.all(multihost_utils.process_allgather(np.array(good))))
    if not good:
        raise _Damaged(f"checkpoint {path} is damaged: {reason}")
    return result


def _read_record(path: Any) -> dict:
    record = ocp.checkpointables_metadata(path).custom_metadata
    if not record or not {"host", "leaves"} <= set(record):
        raise ValueError("its metadata cannot be read")
    return record


def _read_leaves(path: Any, targets: dict[str, jax.ShapeDtypeStruct]) -> list[jax.Array]:
    wanted = _stored(targets)
    with _alone():
        leaves = ocp.load_checkpointables(path, {"state": wanted})["state"]
    # A loss that orbax passes over, such as that of a key's type, still shows here.
    if difference := _difference(_describe(leaves), _describe(wanted)):
        raise ValueError(difference)
    return [leaves[name] if name in leaves else _empty(t) for name, t in targets.items()]


def _leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path, such as `.params['head']['kernel']`, in the order of `jax.tree.leaves`."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _describe(leaves: dict[str, Any]) -> dict[str, str]:
    """Dtype and shape of each leaf, such as `bfloat16[4096,128]`."""
    return {
        path: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for path, leaf in leaves.items()
    }


def _stored(leaves: dict[str, Any]) -> dict[str, Any]:
    """What has bytes to store: the format has no arrays of size zero."""
    return {path: leaf for path, leaf in leaves.items() if leaf.size}


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _empty(target: jax.ShapeDtypeStruct) -> jax.Array:
    nothing = np.empty(target.shape, target.dtype)
    return jax.make_array_from_callback(target.shape, target.sharding, nothing.__getitem__)


def _difference(saved: dict[str, str], wanted: dict[str, str]) -> str:
    """The first leaf that differs, in words; empty if none does."""
    for path in [*wanted, *saved]:
        there, here = saved.get(path, "absent"), wanted.get(path, "absent")
        if there != here:
            return f"{path} is {there} in the checkpoint and {here} here"
    return ""


def _alone() -> Any:
    """Orbax reading without its barriers, where all would wait for one that found damage."""
    context, process = ocp.Context(), jax.process_index()
    context.multiprocessing.primary_host = process
    context.multiprocessing.active_processes = {process}
    context.multiprocessing.barrier_sync_key_prefix = f"process{process}"
    return context


def _reason(error: BaseException) -> str:
    """The innermost cause, which is where the file system speaks, without its request dump."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    text = str(error).partition("\n")[0].partition(" [")[0]
    return f"{type(error).__name__}: {text}"
