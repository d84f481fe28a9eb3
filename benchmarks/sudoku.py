"""The tiny Sudoku run and its controls, from one warm start a seed.

    python benchmarks/sudoku.py --runs=dispo,diffu_grpo --seeds=0,1,2 --out=runs/sudoku
    python benchmarks/sudoku.py --table --out=runs/sudoku

Every run is a workdir of its own under --out, so a command again continues or does nothing.
Held-out test boards are decoded once before and once after; nothing is chosen on them.

    dispo              configs/sudoku_dispo.py as it is
    diffu_grpo         without the DiSPO term, equal rollouts
    diffu_grpo_seconds without it, as many steps as fit into dispo's seconds
    dispo_calls        dispo with as many reward calls as diffu_grpo makes
    shuffled           dispo, rewards permuted within every group and among siblings; 120 steps
    coin               dispo, a coin flip for a reward; 120 steps
    sft                supervised training for dispo's seconds from the same warm start, its
                       learning rate annealed like dispo's
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from absl import app, flags  # noqa: E402

from benchmarks import runs  # noqa: E402
from configs import sudoku_dispo  # noqa: E402
from dmrl import parallel, recipe, stages, trainer  # noqa: E402
from dmrl.held import Held  # noqa: E402
from dmrl.scoring import Scored  # noqa: E402

RUNS = flags.DEFINE_list("runs", ["dispo", "diffu_grpo"], "Which runs")
SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds")
OUT = flags.DEFINE_string("out", "runs/sudoku", "Where the workdirs live")
TABLE = flags.DEFINE_bool("table", False, "Only print the table of finished runs")

SHORT = {"shuffled": 120, "coin": 120}
"""Steps of the runs that can only show that nothing is learned."""


class Shuffled(stages.Reinforce):
    """Breaks the link between a completion and its reward, keeping every group's rewards."""

    def _score(self, examples: Any, rollout: Any, probes: Any) -> Scored:
        scored = super()._score(examples, rollout, probes)
        rng = np.random.default_rng(scored.host.tokens[:, -1].sum())
        groups = scored.parts["reward"].reshape(-1, self.recipe.loop.num_generations)
        mixed = rng.permuted(groups, axis=1).reshape(-1)
        steps = [r if r is None else rng.permuted(r, axis=2) for r in scored.step_rewards]
        return scored._replace(parts=scored.parts | {"reward": mixed}, step_rewards=tuple(steps))


class Coin(stages.Reinforce):
    """A reward that knows nothing of the completion."""

    def _score(self, examples: Any, rollout: Any, probes: Any) -> Scored:
        scored = super()._score(examples, rollout, probes)
        rng = np.random.default_rng(scored.host.tokens.sum())

        def flips(like: Any) -> Any:
            return rng.integers(0, 2, np.shape(like)).astype(np.float32)

        steps = [r if r is None else flips(r) for r in scored.step_rewards]
        blind = scored.parts | {"reward": flips(scored.parts["reward"])}
        return scored._replace(parts=blind, step_rewards=tuple(steps))


def workdir(name: str, seed: int) -> Path:
    """Of one run."""
    return Path(OUT.value) / f"{name}-{seed}"


def config_of(name: str, seed: int) -> Any:
    """The recipe with what the run changes."""
    config = sudoku_dispo.get_config("tiny")
    config.seed = seed
    config.steps = SHORT.get(name, config.steps)
    dispo = config.terms.dispo
    if name == "dispo_calls":
        config.steps = round(config.steps / (1 + dispo.fillings * dispo.states))
    if name.startswith("diffu_grpo"):
        dispo.weight = 0.0
    if name == "diffu_grpo_seconds":
        plain = workdir("diffu_grpo", seed)
        ratio = runs.seconds(workdir("dispo", seed)) / runs.seconds(plain)
        config.steps = round(len(runs.step_lines(plain)) * ratio)
    return config


def run(name: str, seed: int) -> None:
    """One run to its end, unless it is there."""
    path = workdir(name, seed)
    if (path / "done").exists():
        return
    print(f"== {name}, seed {seed}", flush=True)
    if name != "dispo":
        runs.copy_warm_start(workdir("dispo", seed), path)  # a killed control starts again
    config = config_of(name, seed).to_dict()
    if name == "sft":
        budget = runs.seconds(workdir("dispo", seed))
        step = runs.median_step(workdir("dispo", seed), "warm_start")
        supervise(config, path, round(budget / step))
    else:
        stage = {"shuffled": Shuffled, "coin": Coin}.get(name, stages.Reinforce)
        trainer.train(recipe.build(config), path, config, stage)
    (path / "done").touch()


def supervise(config: dict[str, Any], path: Path, steps: int) -> None:
    """Goes on with the warm start for `steps` and writes evaluations like stage 2."""
    made = recipe.build(config)
    mesh = parallel.make_mesh(**made.mesh)
    held = Held(made, mesh)
    weights, held.frozen = trainer.initial_weights(made, mesh)
    warm = stages.WarmStart(made, mesh, held)
    loop = trainer.Loop(made, path, lambda: False)
    start = loop.run(warm, weights).trainable
    settings, splits = held.settings, made.evaluation.splits

    def evaluate(trainable: Any, step: int) -> None:
        for split in splits:
            loop.metrics.write(step, "rl", held.measure(trainable, split, settings).values)

    evaluate(start, 0)
    annealed = dataclasses.replace(
        made.warm_optimizer, schedule="cosine", final_fraction=made.optimizer.final_fraction
    )
    longer = dataclasses.replace(made.warm_start, steps=steps)
    stage = stages.WarmStart(made._replace(warm_start=longer, warm_optimizer=annealed), mesh, held)
    state, key = stage.init(start), jax.random.key(made.seed + 1000)
    for step in range(steps):
        index = np.asarray(next(stage.batches))
        state, values, _ = stage.step(state, step, index, jax.random.fold_in(key, step))
        loop.metrics.write(step + 1, "rl", values)
    evaluate(state.trainable, steps)


def table() -> str:
    """Mean change of the solve rate in points with a 95% t-interval over seeds."""
    done = sorted(Path(OUT.value).glob("*/done"))
    found: dict[str, list[Path]] = {}
    for flag in done:
        found.setdefault(flag.parent.name.rpartition("-")[0], []).append(flag.parent)
    rows = []
    for name in [n for n in ORDER if n in found]:
        for split in ("test", "test_multi"):
            rows.append(_row(name, split, found[name]))
    return "\n".join([_HEADER, *rows])


ORDER = (
    "dispo",
    "diffu_grpo",
    "diffu_grpo_seconds",
    "dispo_calls",
    "shuffled",
    "coin",
    "sft",
)
_HEADER = (
    f"| run | boards | seeds | steps | reward calls | seconds | {' | '.join(runs.HEADINGS)} | "
    "least change |\n" + "|---" * 11 + "|"
)


def _row(name: str, split: str, paths: list[Path]) -> str:
    cells, least = [], []
    for setting in runs.SETTINGS:
        pairs = [_before_after(p, f"eval/{split}/{setting}/solved") for p in paths]
        change = [100 * (b - a) for a, b in pairs]
        before, after = (100 * np.mean(x) for x in zip(*pairs, strict=True))
        half = ""
        if len(change) > 1:
            half = f" ± {runs.half_width(change):.1f}"
        cells.append(f"{before:.1f} → {after:.1f} ({np.mean(change):+.1f}{half})")
        least.append(min(change))
    boards = "one solution" if split == "test" else "several"
    return " | ".join(
        [
            f"| {name}",
            boards,
            str(len(paths)),
            f"{np.mean([len(runs.step_lines(p)) for p in paths]):.0f}",
            f"{np.mean([runs.reward_calls(p) for p in paths]):,.0f}",
            f"{np.mean([runs.seconds(p) for p in paths]):.0f}",
            *cells,
            f"{min(least):+.1f} |",
        ]
    )


def _before_after(path: Path, name: str) -> tuple[float, float]:
    found = {m: (a, b) for m, a, b in trainer.before_after(path)}
    return found[name]


def main(argv: list[str]) -> None:
    """Runs what is missing, then prints the table."""
    del argv
    if not TABLE.value:
        for seed in map(int, SEEDS.value):
            for name in RUNS.value:
                run(name, seed)
    print(table())


if __name__ == "__main__":
    app.run(main)
