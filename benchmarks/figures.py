"""The papers' pictures from finished runs of the tiny Sudoku, and the numbers behind them.

    python benchmarks/figures.py --runs=runs/sudoku/dispo-0,runs/sudoku/diffu_grpo-0 \\
        --pictures=docs/figures [--figures=reward,variance,violation,pass_at]

    reward     rewards of completions and of fillings over the outer steps, of all runs
    variance   of DiSPO's step gradient, by the tokens that enter and by the number of fillings
    violation  when boards first break the rules, before and after stage 2, by order
    pass_at    chance that one of N completions is right, before and after, by order

The last three take the runs with a DiSPO term. Runs of one objective are its seeds: lines are their
means, bands their ranges. Writes FIGURE.svg and FIGURE.json for each.
"""

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
from absl import app, flags  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

from benchmarks import runs, variance  # noqa: E402
from dmrl import (  # noqa: E402
    evaluate,
    models,
    optim,
    parallel,
    policy,
    recipe,
    results,
    trace,
    trainer,
)
from dmrl.diffusion.sampling import Sampling  # noqa: E402
from dmrl.held import Held  # noqa: E402
from dmrl.programs import Programs  # noqa: E402
from dmrl.trajectories import reader  # noqa: E402
from dmrl.types import Rollout  # noqa: E402

RUNS = flags.DEFINE_list("runs", [], "Workdirs of finished runs")
OUT = flags.DEFINE_string("pictures", "docs/figures", "Where they go")

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
"""Okabe and Ito's, told apart with any colour vision; lines differ in style and marker too."""
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = "osD^v"
BLOCK = 5
"""Outer steps of a point."""
ORDERS = ("low_confidence", "random", "top_k:5", "softmax_confidence:0.05")
CELLS = 12
"""Most empty cells of a board: with as many steps one is filled at each."""
SAMPLES, BOARDS = 32, 64
STATES = 192
COUNTS = (2, 3, 4, 6)


class Run(NamedTuple):
    """A finished run."""

    path: Path
    objective: str
    """Names of its terms."""
    recipe: Any


class Loaded(NamedTuple):
    """A run with what stage 2 began with and what it made of it."""

    run: Run
    mesh: Any
    held: Held
    before: Any
    after: Any


def opened(path: Path) -> Run:
    """The run in a workdir."""
    made = recipe.build(runs.config_of(path))
    return Run(path, " + ".join(term.name for term in made.terms), made)


def loaded(found: Sequence[Run]) -> list[Loaded]:
    """The runs with their weights; they have one task and model, and no adapter."""
    mesh = parallel.make_mesh(**found[0].recipe.mesh)
    held = Held(found[0].recipe, mesh)
    told = []
    for run in found:
        before = runs.warm_started(run.recipe, mesh, held, run.path)
        after = policy.load(str(run.path), "", mesh).trainable
        told.append(Loaded(run, mesh, held, before, after))
    return told


def with_dispo(found: Sequence[Run]) -> list[Run]:
    """The runs with a DiSPO term.

    Raises:
      ValueError: there is none.
    """
    own = [run for run in found if "dispo" in run.objective.split(" + ")]
    if not own:
        names = ", ".join(run.path.name for run in found)
        raise ValueError(f"none of {names} has a dispo term: add such a run, or draw reward alone")
    return own


def by_objective(found: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in nothing but their seeds."""
    groups: dict[str, list[Run]] = {}
    for run in found:
        groups.setdefault(run.objective, []).append(run)
    return groups


def band(curves: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Mean, least and largest of equally long curves, a point a column."""
    table = np.asarray(curves, np.float64)
    told = {"mean": table.mean(0), "low": table.min(0), "high": table.max(0)}
    return {"seeds": len(table)} | {k: np.round(v, 4).tolist() for k, v in told.items()}


def blocks(values: Sequence[float]) -> list[float]:
    """Means of BLOCK values each, without what is left over at the end."""
    whole = len(values) // BLOCK * BLOCK
    return np.reshape(values[:whole], (-1, BLOCK)).mean(1).tolist()


def reward(found: Sequence[Run]) -> dict[str, Any]:
    """Rewards over outer steps, means of BLOCK: of completions, and of fillings."""
    told: dict[str, Any] = {"completions": {}, "fillings": {}, "steps_a_point": BLOCK}
    for objective, group in by_objective(found).items():
        lines = [runs.step_lines(run.path) for run in group]
        for name, key in (("completions", "reward"), ("fillings", "dispo/step_reward")):
            if key in lines[0][0]:
                told[name][objective] = band([blocks([x[key] for x in one]) for one in lines])
    return told


def draw_reward(told: dict[str, Any]) -> Any:
    """One panel for completions, one for fillings."""
    figure, axes = pyplot.subplots(1, 2, sharey=True, figsize=(8, 3.2), layout="constrained")
    names = list(told["completions"])
    for axis, part in zip(axes, ("completions", "fillings"), strict=True):
        for objective, curve in told[part].items():
            place = (np.arange(len(curve["mean"])) + 0.5) * told["steps_a_point"]
            _line(axis, place, curve, names.index(objective), objective, marker=None)
        axis.set(xlabel="outer step", title=f"mean reward of {part}", ylim=(0, 1))
    axes[0].legend()
    return figure


def violated(rollout: Rollout, made: recipe.Recipe, how: Sampling) -> np.ndarray:
    """[B] share of a board's empty cells filled when it first breaks a rule; inf if it never does.

    Raises:
      ValueError: several cells were filled at once, so that shares would not compare.
    """
    shown, read = trace.layout(made.task, how.length), reader(made)
    reveal = np.asarray(rollout.reveal_step)
    cells = np.sum((reveal >= 0) & (reveal < how.steps), axis=1)
    if np.any(reveal.max(1) + 1 != cells):
        raise ValueError(f"steps={how.steps} fill several cells at once: give {cells.max()}")
    found = [trace.make(rollout, i, how.steps, read, shown) for i in range(len(cells))]
    first = [x["violation"]["step"] + 1 if x["violation"] else np.inf for x in found]
    return np.array(first) / cells


@functools.cache
def sampler(model: models.Config, rules: Sampling, samples: int) -> Programs:
    """Compiled once for all runs of one shape."""
    unused = optim.make(optim.Optimizer(), 1)
    return Programs(model, (), rules, unused, parallel.make_mesh(), group_size=samples)


def decoded(
    one: Loaded, when: str, boards: int, rules: Mapping[str, Any], samples: int = 1
) -> tuple[evaluate.Decoded, Sampling]:
    """The first test boards (0: all), a cell a step, each `samples` times, and how.

    Args:
      when: before or after.
    """
    made, prompts = one.run.recipe, one.held.prompts["test"]
    how = dataclasses.replace(made.sampling, steps=CELLS, **rules)
    out = evaluate.decode(
        sampler(made.model, how, samples),
        getattr(one, when),
        one.held.frozen,
        prompts.first(boards or len(prompts.examples)),
        made.task,
        made.tokenizer,
        256 // samples,
        jax.random.key(0),
    )
    return out, how


def violation(found: Sequence[Run]) -> dict[str, Any]:
    """Share of test boards that have broken a rule when so many of their cells are filled.

    Greedy tokens.
    """
    places, many = np.arange(1, 9) / 8, loaded(with_dispo(found))
    told: dict[str, Any] = {"filled": places.tolist(), "orders": {}}
    for order in ORDERS:
        told["orders"][order] = {}
        for when in ("before", "after"):
            firsts = []
            for one in many:
                out, how = decoded(one, when, 0, {"order": order, "temperature": 0.0})
                firsts.append(violated(out.rollout, one.run.recipe, how))
            curves = [[float(np.mean(first <= x)) for x in places] for first in firsts]
            told["orders"][order][when] = band(curves)
    return told


def draw_violation(told: dict[str, Any]) -> Any:
    """A panel an order."""
    figure, axes = pyplot.subplots(
        1, len(told["orders"]), sharey=True, figsize=(10, 2.9), layout="constrained"
    )
    for axis, (order, curves) in zip(axes, told["orders"].items(), strict=True):
        for i, (when, curve) in enumerate(curves.items()):
            _line(axis, told["filled"], curve, i, f"{when} reinforcement")
        axis.set(xlabel="share of empty cells filled", title=order, xlim=(0, 1.03))
    axes[0].set(ylabel="boards that broke a rule", ylim=(0, None))
    axes[0].legend()
    return figure


def pass_at(found: Sequence[Run]) -> dict[str, Any]:
    """pass@N of test boards by order, and what greedy max-confidence solves of them.

    Tokens are greedy where the order draws, and drawn at temperature 1 in the order of confidence.
    """
    ks = [2**i for i in range(SAMPLES.bit_length()) if 2**i <= SAMPLES]
    told: dict[str, Any] = {"samples": SAMPLES, "boards": BOARDS, "n": ks}
    lines = {order: (order, float(order == "low_confidence"), SAMPLES) for order in ORDERS}
    lines["greedy"] = ("low_confidence", 0.0, 1)
    many = loaded(with_dispo(found))
    for when in ("before", "after"):
        told[when] = {}
        for name, (order, temperature, samples) in lines.items():
            rules, curves = {"order": order, "temperature": temperature}, []
            for one in many:
                out, _ = decoded(one, when, BOARDS, rules, samples)
                rights = out.scores["solved"].reshape(-1, samples).sum(1).astype(int).tolist()
                curves.append([results.pass_at(rights, samples, k) for k in ks if k <= samples])
            told[when][name] = band(curves)
    return told


def draw_pass_at(told: dict[str, Any]) -> Any:
    """One panel before, one after."""
    figure, axes = pyplot.subplots(1, 2, sharey=True, figsize=(8, 3.4), layout="constrained")
    for axis, when in zip(axes, ("before", "after"), strict=True):
        for i, (name, curve) in enumerate(told[when].items()):
            if name == "greedy":
                axis.axhline(curve["mean"][0], color="0.4", lw=1, label="greedy, one path")
            else:
                _line(axis, told["n"], curve, i, name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(told["n"], list(map(str, told["n"])))
        axis.set(xlabel="N completions", title=f"{when} reinforcement", ylim=(None, 1))
    axes[0].set_ylabel("pass@N")
    axes[0].legend()
    return figure


def step_variance(found: Sequence[Run]) -> dict[str, Any]:
    """Of the final policy of the first run with a DiSPO term."""
    one = loaded(with_dispo(found)[:1])[0]
    here, later = variance.measure(one.run.recipe, one.mesh, one.held, one.after, STATES)
    return variance.study(here, later, COUNTS)


def draw_variance(told: dict[str, Any]) -> Any:
    """By the number of fillings, and by the tokens that enter."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.5, 3.4), layout="constrained")
    rows = told["by_fillings"]
    counts = [x["fillings"] for x in rows]
    for i, (key, label) in enumerate(
        (("leave_one_out", "leave-one-out baseline"), ("trained", "mean baseline, as trained"))
    ):
        _errors(left, counts, [x[key] for x in rows], i, label)
    theory = np.array([x["predicted_leave_one_out"] for x in rows])
    shrunk = (4 * (1 - 1 / np.array(counts)) ** 2) * theory
    left.plot(counts, theory, color=COLOURS[0], lw=1, label="predicted (U-statistic)")
    left.plot(counts, shrunk, color=COLOURS[1], lw=1)
    left.plot(counts, [1 / (z - 1) for z in counts], ":", color="0.4", lw=1, label="1 / (Z - 1)")
    left.set(xlabel="fillings Z", title="variance, Z = 2 is 1", ylim=(0, None), xticks=counts)
    left.legend()
    for i, (name, part) in enumerate(told["by_tokens"].items()):
        shares = [x["share"] for x in part["by_step"]]
        _errors(right, shares, part["by_step"], i, name)
    right.plot([0, 1], [0, 1], ":", color="0.4", lw=1, label="m / L (Proposition 4.3)")
    right.set(xlabel="masked share m / L of the state", title="variance, masked / all tokens")
    right.legend(loc="lower right")
    return figure


FIGURES = {
    "reward": (reward, draw_reward),
    "variance": (step_variance, draw_variance),
    "violation": (violation, draw_violation),
    "pass_at": (pass_at, draw_pass_at),
}
WHICH = flags.DEFINE_list("figures", list(FIGURES), "Which pictures")


def _line(axis: Any, x: Any, curve: dict[str, Any], i: int, label: str, marker: Any = "") -> None:
    shape = {"color": COLOURS[i], "ls": STYLES[i], "lw": 1.5, "ms": 4}
    axis.plot(x, curve["mean"], label=label, marker=MARKERS[i] if marker == "" else marker, **shape)
    axis.fill_between(x, curve["low"], curve["high"], color=COLOURS[i], alpha=0.2, lw=0)


def _errors(axis: Any, x: Any, rows: Sequence[dict[str, float]], i: int, label: str) -> None:
    middle = np.array([row["ratio"] for row in rows])
    ends = [middle - [row["low"] for row in rows], [row["high"] for row in rows] - middle]
    shape = {"color": COLOURS[i], "fmt": MARKERS[i], "ms": 4, "capsize": 2}
    axis.errorbar(x, middle, np.maximum(ends, 0), label=label, **shape)


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Text as text and nothing that changes from one run to the next: small files, small diffs."""
    options = {
        "svg.fonttype": "none",
        "svg.hashsalt": "dmrl",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.fontsize": 8,
    }
    with pyplot.rc_context(options):
        yield


def save(name: str, told: dict[str, Any], out: Path) -> None:
    """FIGURE.json and FIGURE.svg, white behind so that it reads on a dark page too."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")
    with style():
        figure = FIGURES[name][1](told)
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)


def main(argv: list[str]) -> None:
    """Measures and draws what is asked for."""
    if len(argv) > 1 or not RUNS.value:
        raise app.UsageError("give --runs=DIR,... and nothing but flags")
    unknown = set(WHICH.value) - FIGURES.keys()
    if unknown:
        raise app.UsageError(f"--figures={sorted(unknown)}: choose from {', '.join(FIGURES)}")
    found = [opened(Path(path)) for path in RUNS.value]
    for name in WHICH.value:
        print(f"== {name}", flush=True)
        about = {
            "runs": [run.path.name for run in found],
            "commit": trainer.git_hash(),
            "device": jax.devices()[0].device_kind,
        }
        save(name, about | FIGURES[name][0](found), Path(OUT.value))


if __name__ == "__main__":
    app.run(main)
