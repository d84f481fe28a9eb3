"""Every rule of decoding on one checkpoint: how good, how many forwards, how fast, how far off.

    python benchmarks/decoding.py --checkpoint=runs/mine [--split=test] [--size=0]
        [--rules="order=margin" --rules="schedule=threshold:0.9,block_length=4"] [--batch=256]

Each line is one way of decoding: options of `dmrl.diffusion.sampling.Sampling`, comma between two,
over --base. Greedy unless it says otherwise. A row's forwards are its own (with an adaptive
schedule rows differ); FLOPs are the model's, predicted from shapes; seconds are of the second pass,
so without compiling; drift is measured at one stored step of every row (docs/decoding.md).
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from absl import app, flags  # noqa: E402

from dmrl import (  # noqa: E402
    cost,
    data,
    evaluate,
    generation,
    optim,
    orders,
    parallel,
    policy,
    recipe,
)
from dmrl.diffusion import drift  # noqa: E402
from dmrl.diffusion.sampling import Sampling  # noqa: E402
from dmrl.programs import Programs  # noqa: E402
from dmrl.protocol import interval  # noqa: E402

DEFAULT = (
    "",
    "order=random",
    "order=margin",
    "order=entropy",
    "order=top_k:5",
    "order=softmax_confidence:0.05",
    "steps=8",
    "steps=8,schedule=cosine",
    "steps=4",
    "steps=4,schedule=doubling",
    "steps=8,remask=rcr",
    "steps=8,remask=remdm:0.1",
    "schedule=threshold:0.9",
    "schedule=threshold:0.6",
    "order=entropy,schedule=entropy_bound:0.1",
    "order=entropy,schedule=entropy_bound:1.0",
    "block_length=4",
    "block_length=4,cache=prefix",
    "block_length=4,cache=dual",
    "block_length=4,cache=dual:2",
    "block_length=4,schedule=threshold:0.9,cache=dual",
)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A run's folder", required=True)
SPLIT = flags.DEFINE_string("split", "test", "Held-out split")
SIZE = flags.DEFINE_integer("size", 0, "Examples, the first of the split; 0: all")
BASE = flags.DEFINE_string("base", "steps=16", "What all lines share")
RULES = flags.DEFINE_multi_string("rules", DEFAULT, "One way of decoding; may be repeated")
BATCH = flags.DEFINE_integer("batch", 256, "Rows at a time")
OUT = flags.DEFINE_string("out", "", "JSON file; default none")


class Line(NamedTuple):
    """One way of decoding, measured."""

    rules: str
    solved: float
    low: float
    high: float
    reward: float
    forwards: float
    """Mean of a row."""
    flops: float
    """Of a row, over those of the first line."""
    tokens_per_s: float
    kl: float | None
    agreement: float | None


def splitted(rules: str) -> list[str]:
    """`a=1,b=x:2,3` -> ['a=1', 'b=x:2,3']: a comma before a text without = belongs to a value."""
    parts: list[str] = []
    for part in filter(None, rules.split(",")):
        if "=" in part:
            parts.append(part)
        else:
            parts[-1] += f",{part}"
    return parts


def row_forwards(config: Sampling, reveal_step: np.ndarray) -> tuple[float, float]:
    """Mean forwards of a row that read everything, and that read a store."""
    if not config.adaptive:
        whole = config.steps // config.cache_rule.every
        return whole, config.steps - whole
    blocks = reveal_step.reshape(len(reveal_step), -1, config.block_length)
    own = np.array([[len(set(b[b >= 0].tolist())) for b in row] for row in blocks])
    whole = np.ceil(own / config.cache_rule.every).sum(-1)
    return float(whole.mean()), float((own.sum(-1) - whole).mean())


def flops(model: Any, config: Sampling, prompt: int, whole: float, stored: float) -> float:
    """The model's FLOPs for one completion."""
    shape, keys = cost.shape_of(model), prompt + config.length
    width = config.block_length
    queries = width
    if config.cache_rule.kind == "prefix":  # what the block and all after it read, on average
        queries = math.ceil((config.length + width) / 2)
    one = cost.forward_flops(shape, keys, keys, width)
    return whole * one + stored * cost.forward_flops(shape, queries, keys, width)


class Opened(NamedTuple):
    """A run and the examples that it is measured on."""

    made: recipe.Recipe
    loaded: policy.Policy
    """With the learned order of the run, if it has one."""
    mesh: Any
    prompts: data.Prompts
    base: Sampling


def opened(checkpoint: str, split: str, size: int, base: Sequence[str]) -> Opened:
    """The run in a folder, greedy with the options `base`, on the first examples (0: all).

    A learned order has to be asked for: the base is then max-confidence.

    Raises:
      ValueError: it is no run's folder.
    """
    config = policy.config(checkpoint)
    if config is None:
        raise ValueError(f"--checkpoint={checkpoint} is no run's folder")
    made = recipe.build(config)
    mesh = parallel.make_mesh(**made.mesh)
    loaded = policy.load(checkpoint, made.init_from, mesh)
    if orders.is_trained(made):
        loaded = orders.beside(loaded, [checkpoint], [made.sampling], mesh)
    tokens = (made.max_prompt_length, made.sampling.length, loaded.model.mask_token_id)
    prompts = data.tokenize(made.task, made.tokenizer, split, *tokens)
    how = made.sampling.greedy
    if how.learned:
        how = dataclasses.replace(how, order="low_confidence")
    prompts = prompts.first(size or len(prompts.examples))
    return Opened(made, loaded, mesh, prompts, generation.with_options(how, base))


class Measured(NamedTuple):
    """What one way of decoding gave."""

    sampling: Sampling
    decoded: evaluate.Decoded
    seconds: float
    """Of the second pass."""
    drift: dict[str, Any]


def measure(run: Opened, rules: str, batch: int) -> Measured:
    """Decodes twice with `rules` over the base."""
    config, loaded, made = generation.with_options(run.base, splitted(rules)), run.loaded, run.made
    programs = Programs(loaded.model, (), config, optim.make(made.optimizer, 1), run.mesh)
    args = (loaded.trainable, loaded.frozen, run.prompts, made.task, made.tokenizer)
    for _ in range(2):
        start = time.perf_counter()
        decoded = evaluate.decode(programs, *args, batch, jax.random.key(0))
        seconds = time.perf_counter() - start
    found = {}
    if config.approximate:
        some = jax.tree.map(lambda x: jax.numpy.asarray(x[:128]), decoded.rollout)
        denoiser = programs.policy(loaded.trainable, loaded.frozen)
        found = jax.jit(lambda r, k: drift.measure(denoiser, r, config, k))(some, jax.random.key(1))
    return Measured(config, decoded, seconds, found)


def lines(run: Opened, ways: Iterable[str], batch: int = 256) -> Iterator[tuple[Line, Measured]]:
    """Every way of decoding, its FLOPs over those of the first."""
    first = 0.0
    for rules in ways:
        found = measure(run, rules, batch)
        made = _line(run, rules, found)
        first = first or made.flops
        yield made._replace(flops=made.flops / first), found


def _line(run: Opened, rules: str, found: Measured) -> Line:
    rollout, count = found.decoded.rollout, len(found.decoded.texts)
    reveal, off = np.asarray(rollout.reveal_step), found.drift
    whole, stored = row_forwards(found.sampling, reveal)
    spent = flops(run.loaded.model, found.sampling, rollout.prompt.shape[1], whole, stored)
    solved = float(np.sum(found.decoded.scores["solved"]))
    return Line(
        rules,
        solved / count,
        *interval(solved, count),
        float(np.mean(found.decoded.scores["reward"])),
        whole + stored,
        spent,
        float(np.sum(reveal >= 0)) / found.seconds,
        *(float(off[k]) if off else None for k in ("drift/kl", "drift/agreement")),
    )


def table(lines: list[Line]) -> str:
    """Markdown."""
    head = "| rules | solved | 95% | reward | forwards | FLOPs | tokens/s | KL | same token |"
    rows = [head, "|---|---|---|---|---|---|---|---|---|"]
    for x in lines:
        off = ["", ""] if x.kl is None else [f"{x.kl:.4f}", f"{100 * x.agreement:.1f}%"]
        cells = [
            x.rules or "(base)",
            f"{100 * x.solved:.1f}%",
            f"{100 * x.low:.1f} to {100 * x.high:.1f}",
            f"{x.reward:.3f}",
            f"{x.forwards:.1f}",
            f"{x.flops:.2f}",
            f"{x.tokens_per_s:.0f}",
            *off,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main(argv: list[str]) -> None:
    """Measures every line and prints the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    run = opened(CHECKPOINT.value, SPLIT.value, SIZE.value, splitted(BASE.value))
    told: list[Line] = []
    for line, _ in lines(run, RULES.value, BATCH.value):
        told.append(line)
        print(table(told).splitlines()[-1], flush=True)
    count = len(run.prompts.examples)
    print(f"\n{count} examples of {SPLIT.value}, base {BASE.value}\n\n{table(told)}")
    if OUT.value:
        Path(OUT.value).write_text(json.dumps([x._asdict() for x in told], indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
