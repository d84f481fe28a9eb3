"""Decode a held-out split and score it: yields (name, value) for every setting."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from dmrl import data, parallel, scoring, tokenizer
from dmrl.diffusion.sampler import Sampling
from dmrl.tasks import Task
from dmrl.types import Rollout


class Decoded(NamedTuple):
    """Finished completions of a split, on the host."""

    rollout: Rollout
    texts: list[str]
    scores: dict[str, NDArray[np.floating[Any]]]
    """The task's metrics by name, each [B]."""
    seconds: tuple[float, ...] = ()
    """Of each call on the devices; the first one's include compiling."""
    rows: int = 0
    """Completions of a call."""


def setting_name(sampling: Sampling) -> str:
    """`greedy_16` or `sampled_4_random_rcr`: how tokens are drawn, in how many steps, and by which
    order, schedule, remasking and cache where they are not the usual ones."""
    usual = {f.name: f.default for f in dataclasses.fields(Sampling)}
    rules = {name: getattr(sampling, name) for name in ("order", "schedule", "remask", "cache")}
    others = [rule for name, rule in rules.items() if rule != usual[name]]
    return "_".join(["sampled" if sampling.temperature else "greedy", str(sampling.steps), *others])


def decode(
    programs: Any,
    trainable: Any,
    frozen: Any,
    prompts: data.Prompts,
    task: Task,
    tok: Any,
    batch: int,
    key: jax.Array,
) -> Decoded:
    """Decodes every prompt with `programs.sampling`, `programs.group_size` times in a row.

    `batch` examples at a time, or where `programs` has slots a queue of several times as many.
    Noise follows the row number, so the result depends on neither.
    """
    parts: list[Rollout] = []
    seconds: list[float] = []
    size = programs.group_size
    queued = programs.slots and not prompts.buckets
    many = data.queue(len(prompts.examples), batch) if queued else batch
    for index, real in data.in_order(len(prompts.examples), many):
        rows = prompts.rows(index)
        start = time.perf_counter()
        rollout, _ = programs.rollout(trainable, frozen, rows, int(index[0]) * size, key)
        rollout = parallel.gather(rollout)
        seconds.append(time.perf_counter() - start)
        parts.append(jax.tree.map(lambda x, n=real * size: x[:n], rollout))
    joined: Any = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
    cfg = programs.model
    texts = tokenizer.decode(tok, np.asarray(joined.tokens), cfg.mask_token_id, cfg.eos_token_id)
    examples = [e for e in prompts.examples for _ in range(size)]
    scores = scoring.rewards(task, tok, cfg, examples, joined.tokens)
    return Decoded(joined, texts, scores, tuple(seconds), many * size)


def metrics(decoded: Decoded) -> Iterator[tuple[str, float]]:
    """Mean of each score, and the mean completion length."""
    for name, values in decoded.scores.items():
        yield name, float(np.mean(values))
    yield "mean_length", float(np.mean(np.asarray(decoded.rollout.length)))
