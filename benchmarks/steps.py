"""Whole outer steps: what DiSPO adds, what Z adds, what compiles, what the host adds.

    python benchmarks/steps.py [--shape=T0] [--clock=cpu]
    python benchmarks/steps.py --shape=Fn --clock=cpu --repeats=2    # item 5 alone, 20 minutes

An outer step is one rollout, given rewards, and mu updates. First asserts that Z does not change
the states that are probed, and that every program compiles once whatever the prompts. Items 5,
6, 7, 15 and 16.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from absl import app, flags  # noqa: E402

from benchmarks import runs, spread, timing  # noqa: E402
from benchmarks.shapes import SHAPES, F, Shape  # noqa: E402
from configs import sudoku_dispo  # noqa: E402
from dmrl import cost, heap, models, optim, recipe, trainer  # noqa: E402
from dmrl.objective import Term, make_term, needs  # noqa: E402
from dmrl.programs import Programs, TrainState  # noqa: E402

_SHAPE = flags.DEFINE_enum("shape", "T0", ["tiny", "T0", "Fn"], "Shape of the steps")
_HOST_STEPS = flags.DEFINE_integer("host_steps", 12, "Steps of the tiny recipe, for the host gap")
_START = flags.DEFINE_bool("start", False, "Only build, compile, take one step and print seconds")

GROUP = 6


def terms(base: str, beta: float, fillings: int = 0) -> tuple[Term, ...]:
    """A terminal term alone, or with DiSPO of that many fillings beside it."""
    options = {} if base == "spg" else {"beta": beta}
    made = [make_term(base, 1.0, options)]
    if fillings:
        made.append(make_term("dispo", 0.5, {"fillings": fillings, "beta": beta}))
    return tuple(made)


class Step:
    """An outer step that can be taken again and again."""

    def __init__(self, shape: Shape, terms: Sequence[Term], updates: int) -> None:
        adjusted = tuple(_with_blocks(term, shape) for term in terms)
        self.shape, self.mesh = shape, spread.mesh()
        self.programs = Programs(
            shape.model,
            adjusted,
            shape.sampling,
            optim.make(optim.Optimizer(), 1000),
            self.mesh,
            GROUP,
            updates,
        )
        # Compiled, as the trainer does.
        init = jax.jit(models.init, static_argnums=0)
        trainable = spread.whole(init(shape.model, jax.random.key(0)))
        self.frozen = None
        if shape.model.lora_rank:
            self.frozen = trainable.pop("params")
        elif "reference" in needs(adjusted):
            self.frozen = jax.tree.map(jnp.copy, trainable["params"])
        self.state: TrainState = self.programs.init_state(trainable)
        self.number = 0

    def __call__(self) -> TrainState:
        """Samples one group, gives random rewards, updates; a new prompt every time."""
        key = jax.random.fold_in(jax.random.key(1), self.number)
        rollout, probes = self.programs.rollout(
            self.state.trainable, self.frozen, self.prompts(key), 0, key
        )
        rollout = rollout._replace(reward=_rewards(rollout.tokens.shape[:1], self.number))
        scored = tuple(
            p and p._replace(reward=_rewards(p.fills.shape[:3], self.number)) for p in probes
        )
        self.state, _ = self.programs.update(self.state, self.frozen, [rollout], [scored], key)
        self.number += 1
        return self.state

    def prompts(self, key: jax.Array) -> tuple[jax.Array, ...]:
        """One prompt, for a group."""
        shape, top = self.shape, self.shape.model.eos_token_id
        prompt = jax.random.randint(key, (1, shape.prompt), 0, top)
        blank = jnp.full((1, shape.sampling.length), shape.model.mask_token_id, jnp.int32)
        return prompt, jnp.ones(prompt.shape, bool), blank

    def compilations(self) -> tuple[int, int]:
        """Of the rollout and of the update."""
        return self.programs._rollout._cache_size(), self.programs._update._cache_size()


def _with_blocks(term: Term, shape: Shape) -> Term:
    if term.name != "spg":
        return term
    return make_term("spg", term.weight, {"block_length": shape.sampling.block_length})


def _rewards(shape: tuple[int, ...], seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).random(shape), jnp.float32)


def flops(shape: Shape, base: str, updates: int, kl: bool, dispo: bool) -> float:
    """Of one completion's share of a step; the bound of a ratio of two steps is theirs.

    A gradient is three forwards, two under an adapter, one more with recomputed layers. diffu-GRPO
    and DiSPO read old and (with KL) reference policy once an update; SPG, two maskings an update,
    reads neither. DiSPO's probe is a forward of its own.
    """
    sizes = cost.shape_of(shape.model)
    backward = (2 if sizes.lora_rank else 3) + sizes.remat
    length = shape.sampling.length
    one = cost.scoring_flops(sizes, shape.prompt, length)
    ratio = backward + 1 + kl
    update = updates * (2 * backward if base == "spg" else ratio)
    if dispo:
        update += 1 + updates * ratio
    sampling = shape.sampling
    drawn = cost.rollout_flops(
        sizes, 1, shape.prompt, length, sampling.block_length, sampling.steps
    )
    return drawn + update * one


COMPARISONS = (
    ("diffu_grpo", 8, 0.0, 1.25),
    ("diffu_grpo", 12, 0.04, 1.35),
    ("spg", 4, 0.0, 1.12),
)
"""(terminal term, mu, weight of the KL penalty in both terms, goal at shape F)."""


def against_base(shape: Shape) -> tuple[list[timing.Row], dict[str, Any]]:
    """Item 5: a step with DiSPO over one without, beside the bounds of this shape and of F."""
    rows, details = [], {}
    for base, updates, beta, goal in COMPARISONS:
        contestants = {
            "without": Step(shape, terms(base, beta), updates),
            "with": Step(shape, terms(base, beta, 2), updates),
        }
        times = timing.alternate(contestants)
        overhead = timing.ratio(times, "with", "without")
        bounds = {}
        for at in (shape, F):
            work = [flops(at, base, updates, beta > 0, dispo) for dispo in (True, False)]
            bounds[at.name] = work[0] / work[1]
        kl = ", KL in both" if beta else ""
        details[f"{base} {updates}"] = {key: value._asdict() for key, value in times.items()}
        rows.append(
            timing.Row(
                "5",
                f"DiSPO step over {base} step, mu {updates}{kl}",
                shape.name,
                f"{overhead:.2f}x ({overhead / bounds[shape.name]:.2f} of this shape's bound)",
                f"<= {goal}x at F",
                f"{bounds[shape.name]:.2f}x here, {bounds['F']:.2f}x at F (predicted)",
                met=overhead <= goal / bounds["F"] * bounds[shape.name],
            )
        )
    return rows, details


def against_fillings(shape: Shape) -> tuple[list[timing.Row], dict[str, Any]]:
    """Items 6, 7 and the compilations of 15."""
    steps = {z: Step(shape, terms("diffu_grpo", 0.0, z), 8) for z in (2, 16)}
    _check_probes(shape, steps)
    times = timing.alternate({str(z): step for z, step in steps.items()})
    slower = timing.ratio(times, "16", "2")
    compiled = [count for step in steps.values() for count in step.compilations()]
    kept, flat = _probe_bytes(steps[16])
    rows = [
        timing.Row(
            "6",
            "DiSPO step, Z=16 over Z=2, without rewards",
            shape.name,
            f"{slower:.2f}x",
            "<= 1.10x",
            "1x in FLOPs of forwards",
            met=slower <= 1.1,
        ),
        timing.Row(
            "7",
            "what a probed state keeps, Z=16",
            shape.name,
            f"{kept:.1f} bytes a position, {'flat' if flat else 'NOT flat'} in V",
            "<= 8Z = 128",
            "4Z + 4 = 68",
            met=kept <= 128 and flat,
        ),
        timing.Row(
            "15",
            f"compilations in {steps[2].number} steps with new prompts, a program",
            shape.name,
            f"{max(compiled)}",
            "1",
            met=max(compiled) == 1,
        ),
    ]
    return rows, {key: value._asdict() for key, value in times.items()}


def _check_probes(shape: Shape, steps: dict[int, Step]) -> None:
    found = []
    for step in steps.values():
        key = jax.random.key(7)
        trainable, prompts = step.state.trainable, step.prompts(key)
        found.append(step.programs.rollout(trainable, step.frozen, prompts, 0, key)[1][1])
    few, many = found
    np.testing.assert_array_equal(few.state, many.state)
    np.testing.assert_array_equal(few.fills, many.fills[:, :, :2])
    masked = np.asarray(few.state) == shape.model.mask_token_id
    assert masked.any(), "nothing to compare: no probed state has a mask"


def _probe_bytes(step: Step) -> tuple[float, bool]:
    """(bytes of a probe per state and position, whether a vocabulary twice as large changes it)."""

    def size(shape: Shape) -> float:
        bigger = Step(shape, step.programs.terms, 1)
        arguments = (bigger.state.trainable, None, bigger.prompts(jax.random.key(0)))
        with jax.set_mesh(bigger.mesh):
            made = jax.eval_shape(
                bigger.programs._rollout, *arguments, jnp.int32(0), jax.random.key(0)
            )[1][1]
        arrays = (made.state, made.fills)
        return sum(x.size * x.dtype.itemsize for x in arrays) / made.state.size

    model = step.shape.model
    double = step.shape._replace(
        model=type(model)(**{**vars(model), "vocab_size": 2 * model.vocab_size})
    )
    return size(step.shape), size(step.shape) == size(double)


def start() -> None:
    """A child process: seconds to the end of the first step, without imports."""
    clock = time.perf_counter()
    jax.block_until_ready(Step(SHAPES[_SHAPE.value], terms("diffu_grpo", 0.0, 2), 2)())
    print(time.perf_counter() - clock)


def start_up(shape: Shape) -> tuple[timing.Row, dict[str, Any]]:
    """Item 15: the first step of a process, with the compilation cache empty and filled."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, __file__, "--start", f"--shape={shape.name}"]
        seconds = [
            float(
                subprocess.run(
                    command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True
                ).stdout
            )
            for _ in ("cold", "warm")
        ]
    cold, warm = seconds
    row = timing.Row(
        "15",
        "first step of a process, compilation cache full over empty (wall clock)",
        shape.name,
        f"{warm:.1f} s over {cold:.1f} s = {warm / cold:.0%}",
        "<= 20%",
        met=warm <= 0.2 * cold,
    )
    return row, {"cold": cold, "warm": warm}


def host_gap() -> tuple[timing.Row, dict[str, Any]]:
    """Item 16: of the tiny recipe's outer step, what is neither device nor reward."""
    config = sudoku_dispo.get_config("tiny")
    config.steps, config.warm_start.steps = _HOST_STEPS.value, 1
    config.evaluation.every, config.evaluation.splits = 0, ()
    config.evaluation.steps, config.evaluation.size = (), 16
    config.checkpoint_every = 0
    config.mesh.data, config.mesh.fsdp = -1, 1
    with tempfile.TemporaryDirectory() as folder:
        trainer.train(recipe.build(config.to_dict()), Path(folder), config.to_dict())
        lines = runs.step_lines(Path(folder))[2:]
    medians = {
        name: float(np.median([x[name] for x in lines]))
        for name in ("step_time", "time/rollout", "time/reward", "time/update")
    }
    whole = medians.pop("step_time")
    gap = float(np.median([1 - sum(x[n] for n in medians) / x["step_time"] for x in lines]))
    parts = ", ".join(f"{n.removeprefix('time/')} {v / whole:.0%}" for n, v in medians.items())
    row = timing.Row(
        "16",
        f"outer step of the tiny recipe ({parts}), wall clock",
        "tiny Sudoku",
        f"{gap:.1%} is host gap",
        "<= 5%",
        "0%",
        met=gap <= 0.05,
    )
    return row, medians | {"step_time": whole}


def main(argv: list[str]) -> None:
    """Checks, times, prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    heap.keep_pages()
    if _START.value:
        return start()
    shape = SHAPES[_SHAPE.value]
    rows, details = against_base(shape)
    if shape.name == "Fn":
        return timing.save("steps_fn", rows, details)
    found, details["fillings"] = against_fillings(shape)
    rows += found
    for item, measure in (("start", lambda: start_up(shape)), ("host", host_gap)):
        row, details[item] = measure()
        rows.append(row)
    timing.save("steps", rows, details)


if __name__ == "__main__":
    app.run(main)
