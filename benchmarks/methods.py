"""Every method from the same tiny warm starts, at equal rollouts (IGPO adds its second ones).

    python benchmarks/methods.py --out=runs/methods                  # everything, hours
    python benchmarks/methods.py --methods=spg,wd1 --out=runs/methods
    python benchmarks/methods.py --table --out=runs/methods          # from finished runs alone

The task is the drawn 4x4 Sudoku of `configs/common.py`; a method is the `tiny` preset of
configs/METHOD.py with `--steps` outer steps of 64 prompts x 4 completions. For each method the
learning rate is the one of `--rates` whose run from the first seed's warm start ends with the
highest validation solve rate (mean of the four ways of decoding); with it the other seeds are
trained. Every run decodes the test split once before and once after; only the chosen rate's is
shown. Every run is a workdir of its own, so a command again continues. Writes methods.json and
methods.svg.
"""

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from absl import app, flags  # noqa: E402

from benchmarks import runs  # noqa: E402
from dmrl import recipe, trainer  # noqa: E402

METHODS = (
    "diffu_grpo",
    "sudoku_dispo",
    "wd1",
    "spg",
    "dispo_spg",
    "unigrpo",
    "coupled_grpo",
    "cj_grpo",
    "trace_rl",
    "mdpo",
    "egspo",
    "trafl",
    "rspo",
    "dtm",
    "igpo",
    "vrpo",
)
WHICH = flags.DEFINE_list("methods", list(METHODS), "Which configs")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds; the first one chooses the rate")
RATES = flags.DEFINE_list("rates", ["2e-4", "4e-4", "1e-3"], "Learning rates")
STEPS = flags.DEFINE_integer("steps", 120, "Outer steps of every run")
OUT = flags.DEFINE_string("out", "runs/methods", "Where the workdirs live")
TABLE = flags.DEFINE_bool("table", False, "Only the table of finished runs")


def folder(name: str, seed: int, rate: str) -> Path:
    """Of one run."""
    return Path(OUT.value) / f"{name}-{rate}-{seed}"


def config_of(name: str, seed: int, rate: str) -> Any:
    """The method's tiny preset, cut to the benchmark's length."""
    config = importlib.import_module(f"configs.{name}").get_config("tiny")
    config.seed, config.steps = seed, STEPS.value
    config.phase_steps = min(config.phase_steps, STEPS.value // 3)
    config.optimizer.learning_rate = float(rate)
    config.evaluation.every = 0
    config.evaluation.splits = ("test",)
    config.checkpoint_every = STEPS.value
    return config


def train(path: Path, config: Any) -> None:
    """One run to its end, unless it is there, from the warm start of its seed."""
    if (path / "done").exists():
        return
    print(f"== {path}", flush=True)
    start = Path(OUT.value) / f"warm_start-{config.seed}"
    runs.copy_warm_start(start, path)
    values = config.to_dict()
    trainer.train(recipe.build(values), path, values)
    (path / "done").touch()


def warm_start(seed: int) -> None:
    """The start that all methods of a seed share, made once."""
    path = Path(OUT.value) / f"warm_start-{seed}"
    if (path / "done").exists():
        return
    config = config_of("diffu_grpo", seed, RATES.value[0])
    config.steps, config.evaluation.splits, config.evaluation.steps = 1, (), ()
    values = config.to_dict()
    trainer.train(recipe.build(values), path, values)
    (path / "done").touch()


def attempt(name: str, seed: int, rate: str) -> None:
    """A run; one that diverges is said and left without an end."""
    try:
        warm_start(seed)
        train(folder(name, seed, rate), config_of(name, seed, rate))
    except trainer.NotFiniteError as error:
        print(f"{name} at {rate}, seed {seed}: {error}", flush=True)


def best_rate(name: str, seed: int) -> str | None:
    """The learning rate with the best validation from a seed's warm start; None if all broke."""
    rates = [r for r in RATES.value if (folder(name, seed, r) / "done").exists()]
    return max(rates, key=lambda rate: validation(folder(name, seed, rate)), default=None)


def validation(path: Path) -> float:
    """Final validation solve rate, mean over the ways of decoding."""
    final = {name: after for name, _, after in trainer.before_after(path)}
    return float(np.mean([final[f"eval/validation/{s}/solved"] for s in runs.SETTINGS]))


def measure(name: str) -> None:
    """All runs of a method."""
    first, *others = map(int, SEEDS.value)
    for rate in RATES.value:
        attempt(name, first, rate)
    best = best_rate(name, first)
    for seed in others if best else ():
        attempt(name, seed, best)


def result(name: str) -> dict[str, Any] | None:
    """What the finished runs of a method show; None if there is none.

    A seed whose run diverged is missing from `seeds`: the table then has fewer than asked for.
    """
    rate = best_rate(name, int(SEEDS.value[0]))
    if rate is None:
        return None
    paths = [folder(name, int(seed), rate) for seed in SEEDS.value]
    paths = [p for p in paths if (p / "done").exists()]
    found: dict[str, Any] = {"method": name, "seeds": len(paths), "rate": float(rate)}
    for setting in runs.SETTINGS:
        pairs = [_before_after(p, f"eval/test/{setting}/solved") for p in paths]
        change = [100 * (after - before) for before, after in pairs]
        found[setting] = {
            "before": 100 * float(np.mean([b for b, _ in pairs])),
            "after": 100 * float(np.mean([a for _, a in pairs])),
            "change": float(np.mean(change)),
            "half_width": runs.half_width(change),
        }
    lines = [x for p in paths for x in runs.step_lines(p)]
    found["seconds"] = float(np.mean([runs.seconds(p) for p in paths]))
    found["seconds_update"] = float(np.median([x["time/update"] for x in lines]))
    found["reward_calls"] = float(np.mean([runs.reward_calls(p) for p in paths]))
    found["signal"] = 1 - float(np.mean([x["frac_reward_zero_std"] for x in lines]))
    return found


def _before_after(path: Path, name: str) -> tuple[float, float]:
    return {m: (a, b) for m, a, b in trainer.before_after(path)}[name]


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one row a method, boards with one solution."""
    head = ["method", "rate", "seeds", *runs.HEADINGS, "seconds", "s/update", "reward calls"]
    rows = [[*head, "groups with a signal"], ["---"] * (len(head) + 1)]
    for r in results:
        cells = []
        for setting in runs.SETTINGS:
            x = r[setting]
            spread = f" ± {x['half_width']:.1f}" if r["seeds"] > 1 else ""
            cells.append(f"{x['before']:.1f} → {x['after']:.1f} ({x['change']:+.1f}{spread})")
        name = r["method"].removeprefix("sudoku_")
        costs = [f"{r['seconds']:.0f}", f"{r['seconds_update']:.2f}", f"{r['reward_calls']:,.0f}"]
        row = [name, f"{r['rate']:g}", str(r["seeds"]), *cells, *costs, f"{r['signal']:.0%}"]
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Change of the solve rate of every method with its interval, one panel a decoding."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [r["method"].removeprefix("sudoku_") for r in results]
    figure, axes = pyplot.subplots(
        1, len(runs.SETTINGS), sharey=True, figsize=(12, 0.6 + 0.32 * len(names))
    )
    for axis, setting, heading in zip(axes, runs.SETTINGS, runs.HEADINGS, strict=True):
        cells = [r[setting] for r in results]
        half = [0.0 if math.isnan(x["half_width"]) else x["half_width"] for x in cells]
        axis.errorbar([x["change"] for x in cells], range(len(names)), xerr=half, fmt="o", ms=4)
        axis.axvline(0, color="0.6", lw=1)
        axis.set_title(heading, fontsize=10)
        axis.set_xlabel("points over the warm start")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main(argv: list[str]) -> None:
    """Runs what is missing, then prints and saves the table of all that is finished."""
    del argv
    if not TABLE.value:
        for name in WHICH.value:
            measure(name)
    results = [r for r in map(result, METHODS) if r]
    results.sort(key=lambda r: -np.mean([r[s]["change"] for s in runs.SETTINGS]))
    print(table(results))
    out = Path(OUT.value)
    (out / "methods.json").write_text(json.dumps(results, indent=1))
    draw(results, out / "methods.svg")


if __name__ == "__main__":
    app.run(main)
