"""How much of one update's gradient is signal, for every method at the same policy.

    python benchmarks/credit.py --start=runs/methods/warm_start-0 [--batches=48]

Takes the policy that a finished warm start left, draws that many independent outer steps of 64
prompts x 4 completions for each method's `tiny` preset, and looks at the gradients g_1..g_n that
the update program computes. Prints a markdown table, one row a method:

    signal   |E g|^2 / E|g|^2, from products of different batches: unbiased above and below
    batches  how many updates one would have to average for the mean to be as long as its noise
    cosine   between E g and the mean gradient of cj_grpo, which follows the sampler's own steps

A method whose signal is within two standard errors of 0 has no measurable cosine: "-".
"""

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from absl import app, flags  # noqa: E402

from benchmarks import runs  # noqa: E402
from dmrl import held, parallel, recipe, stages  # noqa: E402

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cj_grpo": ("cj_grpo", {}),
    "trace_rl": ("trace_rl", {}),
    "egspo": ("egspo", {}),
    "mdpo": ("mdpo", {}),
    "diffu_grpo (all masked)": ("diffu_grpo", {}),
    "wd1 (all masked)": ("wd1", {}),
    "dispo": ("sudoku_dispo", {}),
    "dtm": ("dtm", {}),
    "rspo": ("rspo", {}),
    "trafl": ("trafl", {}),
    "vrpo": ("vrpo", {}),
    "coupled_grpo": ("coupled_grpo", {}),
    "unigrpo": ("unigrpo", {}),
    "unigrpo, mask ratio >= 0.9": ("unigrpo", {"t_min": 0.9}),
    "spg": ("spg", {}),
    "spg, m = 8": ("spg", {"samples": 8}),
    "spg, ELBO for both signs": ("spg", {"negative": "elbo"}),
    "spg, all masked": ("spg", {"masking": "all", "samples": 1, "negative": "elbo"}),
}
"""Row of the table -> config and what its first term changes."""
AGAINST = "cj_grpo"
START = flags.DEFINE_string("start", "runs/methods/warm_start-0", "Workdir of a warm start")
BATCHES = flags.DEFINE_integer("batches", 48, "Outer steps to draw for each row")
ROWS = flags.DEFINE_list("rows", list(VARIANTS), "Which rows")


class Estimate(NamedTuple):
    """A mean and its standard error."""

    value: float
    error: float


def capture() -> optax.GradientTransformation:
    """An optimiser that changes nothing and keeps the last gradient as its state."""

    def init(params: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, params)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(jnp.zeros_like, state), grads

    return optax.GradientTransformation(init, update)


def gradients(name: str, options: dict[str, Any], start: Path, batches: int) -> np.ndarray:
    """[batches, parameters] gradients of the whole objective at the warm-started policy."""
    config = importlib.import_module(f"configs.{name}").get_config("tiny")
    config.terms[next(iter(config.terms))].update(options)
    config.evaluation.splits = ()
    built = recipe.build(config.to_dict())
    mesh = parallel.make_mesh(**built.mesh)
    data = held.Held(built, mesh)
    trainable = runs.warm_started(built, mesh, data, start)
    data.frozen = jax.tree.map(jnp.copy, trainable["params"])
    stage = stages.Reinforce(built, mesh, data)
    stage.programs = dataclasses.replace(stage.programs, optimizer=capture())
    state, rows = stage.init(trainable), []
    for number in range(batches):
        index = np.asarray(next(stage.batches))
        key = jax.random.fold_in(jax.random.key(99), number)
        state = stage.step(state, 0, index, key).state
        leaves = jax.tree.leaves(state.opt_state["params"])
        rows.append(np.concatenate([np.asarray(x, np.float64).ravel() for x in leaves]))
    return np.stack(rows)


def pairs(x: np.ndarray, y: np.ndarray) -> Estimate:
    """E x . E y from the products of different batches, with a jackknife standard error."""
    products = x @ y.T
    n = len(products)
    off = products - np.diag(np.diag(products))
    total = off.sum()
    without = (total - off.sum(0) - off.sum(1)) / ((n - 1) * (n - 2))
    error = np.sqrt((n - 1) * np.mean((without - without.mean()) ** 2))
    return Estimate(float(total / (n * (n - 1))), float(error))


def row(name: str, g: np.ndarray, against: np.ndarray) -> list[str]:
    """One line of the table."""
    size = float(np.mean(np.sum(g * g, axis=1)))
    found, own = pairs(g, g), pairs(against, against)
    share = f"{100 * found.value / size:.2f} ± {100 * found.error / size:.2f} %"
    if found.value < 2 * found.error:
        return [name, share, "-", "-"]
    length = np.sqrt(found.value * own.value)
    cross = pairs(g, against)
    cosine = f"{cross.value / length:.2f} ± {cross.error / length:.2f}"
    return [name, share, f"{size / found.value - 1:.0f}", cosine]


def main(argv: list[str]) -> None:
    """Draws, compares and prints."""
    del argv
    start, batches = Path(START.value), BATCHES.value
    against = gradients(*VARIANTS[AGAINST], start, batches)
    print("| method | signal | batches | cosine |\n|---|---|---|---|")
    for name in ROWS.value:
        g = against if name == AGAINST else gradients(*VARIANTS[name], start, batches)
        print(f"| {' | '.join(row(name, g, against))} |", flush=True)


if __name__ == "__main__":
    app.run(main)
