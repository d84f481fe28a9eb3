"""Tiny runs: a recipe that trains in seconds, in this process or through launch/train.py."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import compiling

from configs import sudoku_dispo

ROOT = Path(__file__).parent.parent
RECIPE = "configs/sudoku_dispo.py"
TINY = {
    "task.style": "compact",
    "task.reward": "cells",
    "task.train_size": 16,
    "task.held_out_size": 8,
    "model.d_model": 16,
    "model.n_layers": 1,
    "model.n_heads": 2,
    "model.n_kv_heads": 2,
    "model.mlp_hidden_size": 32,
    "sampling.length": 16,
    "sampling.steps": 4,
    "sampling.block_length": 16,
    "steps": 3,
    "prompts_per_step": 4,
    "num_generations": 2,
    "num_iterations": 1,
    "microbatches": 1,
    "rollout_chunks": 1,
    "checkpoint_every": 2,
    "completions_every": 2,
    "warm_start.steps": 2,
    "warm_start.batch": 8,
    "warm_start.evaluate_every": 100,
    "warm_start.target": 2.0,
    "evaluation.every": 2,
    "evaluation.size": 8,
    "evaluation.batch": 8,
    "evaluation.steps": (),
    "evaluation.splits": (),
    "evaluation.trajectories": 2,
}
CLOCKS = ("time/", "step_time", "tokens_per_s")
"""Metrics that may differ between two runs of one recipe."""


def config(**overrides):
    """The tiny recipe as a plain dict; `a__b=1` sets `a.b`."""
    made = sudoku_dispo.get_config()
    made.update_from_flattened_dict(TINY | _dotted(overrides))
    return made.to_dict()


def arguments(**overrides):
    """The same on a command line."""
    return [f"--config.{key}={value}" for key, value in (TINY | _dotted(overrides)).items()]


def _dotted(overrides):
    return {key.replace("__", "."): value for key, value in overrides.items()}


def start(*args, cache=None, recipe=RECIPE, path=(), more=None):
    """launch/train.py in a process of its own, with a compilation cache if asked.

    `more`: further variables of its environment.
    """
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(map(str, path))}
    env |= compiling.QUICKLY
    env |= more or {}
    if cache:
        env |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "train.py"), f"--config={recipe}", *args],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_together(count, *args, cache=None, own=()):
    """`count` processes of one run.

    `own`: for some of the processes, the first ones, a further argument.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
    }
    return [
        start(*args, *own[i : i + 1], cache=cache, more=shared | {"JAX_PROCESS_ID": str(i)})
        for i in range(count)
    ]


def finish(process, code=0):
    """(stdout, stderr) once the process has ended with this exit code."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
    return out, err


def rows(path):
    """The lines of a JSONL file; none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def timeless(metrics):
    """Metric rows without clock readings."""
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in metrics]
