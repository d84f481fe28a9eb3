"""The outer loop: resume, checkpoints, signals, metrics. What a step does is in `stages`."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmrl import models, orders, parallel, preferences, processes, recipe, report, stages
from dmrl.checkpoint import Checkpoints
from dmrl.console import Console
from dmrl.held import Held
from dmrl.metrics import Lines, Metrics
from dmrl.models import int8, weights
from dmrl.objective import needs
from dmrl.programs import TrainState, frozen_copy
from dmrl.recipe import Recipe

STAGES = {"warm_start": 1, "imitation": 3, "rl": 2}
"""The stages, first to last, and what is folded into the run's key for each."""
FILES = ("metrics.jsonl", "completions.jsonl", "trajectories.jsonl")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")


class NotFiniteError(RuntimeError):
    """A loss or a gradient stopped being a number."""


def describe(workdir: Path, config: Mapping[str, Any]) -> None:
    """Writes config.json: the resolved config, git hash, package versions and device.

    Raises:
      ValueError: the workdir belongs to a run with another config.
    """
    path = workdir / "config.json"
    config = json.loads(json.dumps(config))
    processes.check_same("config", json.dumps(config))
    if path.exists():
        _refuse_other(path, json.loads(path.read_text())["config"], config)
    if not processes.is_writer():
        return
    device = jax.devices()[0]
    text = json.dumps(
        {
            "config": config,
            "git": git_hash(),
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
            "device": f"{device.device_kind} x{jax.device_count()}",
        },
        indent=1,
    )
    partial = path.with_name(f".config.{os.getpid()}.json")
    partial.write_text(text)
    partial.replace(path)  # a run killed here must still be able to resume


def _refuse_other(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    # Options that came after the run was begun: it went as their defaults say.
    later = {f.name: f.default for f in dataclasses.fields(recipe.Loop) if f.name not in old}
    old_flat, new_flat = _flat({**later, **old}), _flat(new)
    for key in sorted(old_flat.keys() | new_flat.keys()):
        if old_flat.get(key) != new_flat.get(key):
            raise ValueError(
                f"{path.parent} holds a run with {key}={old_flat.get(key)}, this one has "
                f"{new_flat.get(key)}: choose another --workdir, or the old value to resume"
            )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def git_hash() -> str | None:
    """Commit of the source tree, with `+` if it has uncommitted changes."""
    root = Path(__file__).resolve().parent.parent
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit, dirty = (
            subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
        return commit + ("+" if dirty else "")
    return None


def initial_weights(recipe: Recipe, mesh: Any) -> tuple[Any, Any]:
    """(trainable, frozen) before any stage: converted weights, or fresh ones from the seed."""
    cfg, key = recipe.model, jax.random.fold_in(jax.random.key(recipe.seed), 0)

    def fresh() -> Any:
        return models.init(cfg, key)

    layout = parallel.shardings(mesh, jax.eval_shape(fresh))
    if recipe.init_from:
        params = weights.load_base(recipe.init_from, layout["params"], cfg)
        if not cfg.lora_rank:
            return {"params": params}, None
        lora = jax.jit(lambda: fresh()["lora"], out_shardings=layout["lora"])()
        return {"lora": lora}, params
    with jax.set_mesh(mesh):
        variables = jax.jit(fresh, out_shardings=layout)()
        if cfg.int8:
            variables["params"] = jax.jit(int8.quantized)(variables["params"])
    if cfg.lora_rank:
        return {"lora": variables["lora"]}, variables["params"]
    return variables, None


def train(
    recipe: Recipe,
    workdir: Path,
    config: Mapping[str, Any],
    stage_two: type[stages.Reinforce] | None = None,
) -> dict[str, float]:
    """Runs or resumes all stages; returns the final evaluation.

    `stage_two` lets an experiment replace what a step of stage 2 does.

    The workdir decides: what it already holds is not done again, and an interrupted run
    continues bit for bit from its last checkpoint.

    Raises:
      ValueError: the workdir belongs to another config.
      NotFiniteError: loss or gradient became NaN or Inf; the last good checkpoint is kept.
      CheckpointError: a checkpoint could not be written, or none could be read.
      SystemExit: 0 after SIGTERM, with a checkpoint written.
    """
    mesh = parallel.make_mesh(**recipe.mesh)
    held = Held(recipe, mesh)
    warm = stages.WarmStart(recipe, mesh, held) if recipe.warm_start.steps else None
    imitation = orders.Imitation(recipe, mesh, held) if recipe.imitation.steps else None
    if stage_two is None:
        stage_two = preferences.Preferences if recipe.preferences else stages.Reinforce
    reinforce = stage_two(recipe, mesh, held)
    # What the user can get wrong has been checked: now the workdir may be claimed.
    workdir.mkdir(parents=True, exist_ok=True)
    describe(workdir, config)
    with _terminated() as terminated:
        stopping = functools.partial(_any_terminated, terminated)
        trainable, held.frozen = initial_weights(recipe, mesh)
        loop = Loop(recipe, workdir, stopping)
        for split, prompts in held.prompts.items():
            if prompts.cut:
                loop.console.note(
                    f"{split}: {prompts.cut} of {len(prompts.examples)} prompts cut to their last "
                    f"{recipe.max_prompt_length} tokens"
                )
        if warm:
            trainable = loop.run(warm, trainable).trainable
        if orders.is_trained(recipe):
            held.frozen, trainable = trainable["params"], orders.fresh_on(recipe, mesh)
        if imitation:
            trainable = loop.run(imitation, trainable).trainable
        if not recipe.model.lora_rank and "reference" in needs(recipe.terms):
            held.frozen = frozen_copy(recipe.model, trainable["params"])
        trained = loop.run(reinforce, trainable).trainable
    if orders.is_trained(recipe) and not recipe.init_from:
        trained = {**trained, "params": held.frozen}  # the only copy
    for collection in sorted(trained.keys() - {"heads"}):
        folder = orders.FOLDER if collection == "order" else "weights"
        what = (recipe.model, trained[collection], collection)
        if loop.writer:
            weights.save_weights(workdir / folder, *what, force=True, fetch=parallel.gather)
        else:
            weights.fetch_all(*what, fetch=parallel.gather)
    return loop.final


class Loop:
    """Runs a stage from wherever its checkpoints left it."""

    def __init__(self, recipe: Recipe, workdir: Path, stopping: Callable[[], bool]) -> None:
        self.recipe, self.workdir, self.stopping = recipe, workdir, stopping
        self.writer = processes.is_writer()
        self.metrics = Metrics(workdir, recipe.metrics, workdir.name, self.writer)
        self.lines = {name: Lines(workdir / name, self.writer) for name in FILES}
        self.console = Console(active=self.writer)
        self.final: dict[str, float] = {}

    def run(self, stage: stages.Stage, trainable: Any) -> TrainState:
        """All remaining steps of `stage`, which starts from `trainable`."""
        with contextlib.closing(self.checkpoints(stage.name)) as checkpoints:
            run = _StageRun(self, stage, checkpoints)
            run.restore(trainable)
            return run.finish()

    def checkpoints(self, stage: str) -> Checkpoints:
        """Those of a stage."""
        kept = self.recipe.loop.checkpoints_kept
        return Checkpoints(self.workdir / "checkpoints" / stage, kept)

    def begun(self, names: Sequence[str]) -> bool:
        """Whether any of these stages has a checkpoint."""
        return any(self.checkpoints(name).steps() for name in names)


@dataclasses.dataclass
class _StageRun:
    """One stage on its way: state, step number, data position."""

    loop: Loop
    stage: stages.Stage
    checkpoints: Checkpoints

    def restore(self, trainable: Any) -> None:
        """The newest checkpoint that loads, or the stage's beginning.

        Files are cut back to what they held at that moment, unless a later stage has a
        checkpoint: then that one is the moment to go back to.
        """
        name, loop = self.stage.name, self.loop
        names = list(STAGES)
        self.key = jax.random.fold_in(jax.random.key(loop.recipe.seed), STAGES[name])
        self.state, self.number, self.done = self.stage.init(trainable), 0, False
        found = self.checkpoints.restore(self.state)
        if found is None:
            if not loop.begun(names):  # killed before the first checkpoint of all
                self._cut(dict.fromkeys(FILES, 0))
            return
        self.number, self.state, host = found
        self.key = jax.random.wrap_key_data(jnp.array(host["key"], jnp.uint32))
        self.done = host["done"]
        loop.final = host["final"]
        self.stage.batches.set_state(host["batches"])
        if not loop.begun(names[names.index(name) + 1 :]):
            self._cut(host["files"])
        loop.console.note(f"{name}: resumed after step {self.number}")

    def _cut(self, sizes: Mapping[str, int]) -> None:
        for name, size in sizes.items():
            self.loop.lines[name].cut(size)

    def save(self) -> None:
        """One atomic checkpoint of everything a resumed run needs."""
        host = {
            "key": np.asarray(jax.random.key_data(self.key)).tolist(),
            "done": self.done,
            "final": self.loop.final,
            "batches": self.stage.batches.get_state(),
            "files": {name: lines.size() for name, lines in self.loop.lines.items()},
        }
        self.checkpoints.save(self.number, self.state, host)
        if self.loop.writer:
            report.write(self.loop.workdir)

    def finish(self) -> TrainState:
        """Steps until the stage is done or SIGTERM arrives; evaluates and saves on the way."""
        stopping, every = self.loop.stopping, self.loop.recipe.loop.checkpoint_every
        if not self.done and self.number == 0:
            self._evaluate()
        self.clock = time.perf_counter()
        stop = stopping()
        while not self.done and not stop:
            self._step()
            stop = stopping()  # read once: what is saved and what ends the run must agree
            if self.done or stop or (every and self.number % every == 0):
                self.save()
        if stop:
            name = self.stage.name
            self.loop.console.note(f"{name}: stopped by SIGTERM after step {self.number}")
            raise SystemExit(0)
        return self.state

    def _step(self) -> None:
        stage, loop = self.stage, self.loop
        index = np.asarray(next(stage.batches))
        key = jax.random.fold_in(self.key, self.number)
        result = stage.step(self.state, self.number, index, key)
        self.state, self.number = result.state, self.number + 1
        _check_finite(stage.name, self.number, result.values)
        before, self.clock = self.clock, time.perf_counter()
        loop.metrics.write(self.number, stage.name, result.values)
        for row in result.completions:
            loop.lines["completions.jsonl"].append(row)
        for row in result.trajectories:
            loop.lines["trajectories.jsonl"].append(row)
        seconds = self.clock - before
        loop.console.step(stage.name, self.number, stage.steps, result.values, seconds)
        self._evaluate()
        self.done = self.done or self.number >= stage.steps

    def _evaluate(self) -> None:
        found = self.stage.evaluate(self.state, self.number)
        if found is None:
            return
        loop = self.loop
        loop.metrics.write(self.number, self.stage.name, found.values)
        for row in found.trajectories:
            loop.lines["trajectories.jsonl"].append(row)
        loop.console.evaluated(self.stage.name, self.number, found.values)
        self.done = found.done
        loop.final = found.values


def _check_finite(stage: str, step: int, values: Mapping[str, float]) -> None:
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            raise NotFiniteError(f"{stage} step {step}: {name} is {values[name]}")


def _any_terminated(terminated: Callable[[], bool]) -> bool:
    """The same answer in all processes, so that all stop after the same step."""
    return processes.any_of(terminated())


@contextlib.contextmanager
def _terminated() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGTERM has arrived since."""
    arrived: list[int] = []
    old = signal.signal(signal.SIGTERM, lambda number, frame: arrived.append(number))
    try:
        yield lambda: bool(arrived)
    finally:
        signal.signal(signal.SIGTERM, old)


def before_after(workdir: Path) -> Sequence[tuple[str, float, float]]:
    """(metric, before, after) of stage 2 from metrics.jsonl: its first and last evaluation."""
    first: dict[str, float] = {}
    final: dict[str, float] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["stage"] == "rl":
            values = {k: v for k, v in row.items() if k.startswith("eval/")}
            first = {**values, **first}
            final |= values
    return [(name, first[name], final[name]) for name in first]
