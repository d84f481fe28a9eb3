"""Decode a held-out split and score it: yields (name, value) for every setting."""

import time
from collections.abc import Iterator, Mapping
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
    """Of each batch on the devices; the first one's include compiling."""


def setting_name(sampling: Sampling) -> str:
    """`greedy_16` or `sampled_4_random`: how tokens are drawn, in how many steps, what order."""
    order = "" if sampling.order == "low_confidence" else f"_{sampling.order}"
    return f"{'sampled' if sampling.temperature else 'greedy'}_{sampling.steps}{order}"


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

    Noise follows the row number, so the result does not depend on `batch`.
    """
    parts: list[Rollout] = []
    seconds: list[float] = []
    size = programs.group_size
    for index, real in data.in_order(len(prompts.examples), batch):
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
    return Decoded(joined, texts, scores, tuple(seconds))


def metrics(decoded: Decoded) -> Iterator[tuple[str, float]]:
    """Mean of each score, and the mean completion length."""
    for name, values in decoded.scores.items():
        yield name, float(np.mean(values))
    yield "mean_length", float(np.mean(np.asarray(decoded.rollout.length)))


def trajectories(
    decoded: Decoded,
    prompts: data.Prompts,
    task: Task,
    tok: Any,
    setting: Sampling,
    split: str,
    when: str,
    count: int,
) -> Iterator[Mapping[str, Any]]:
    """The first `count` completions as the report shows them: one JSON-able row each.

    A position is right if the completion is a solution, or if it agrees with the reference
    answer; unknown (None) where a puzzle has several answers and none was found.
    """
    rollout, grid = decoded.rollout, task.grid
    shown = [c for row in grid for c in row] if grid else list(range(rollout.tokens.shape[1]))
    for i in range(min(count, len(decoded.texts))):
        example = prompts.examples[i]
        template, answer = task.template(example), task.answer(example)
        tokens = [str(tok.decode([t], skip_special_tokens=True)) for t in rollout.tokens[i][shown]]
        reveal = rollout.reveal_step[i][shown].tolist()
        wanted: list[str | None] = [None] * len(shown)
        scores = {name: float(values[i]) for name, values in decoded.scores.items()}
        solved = scores.get("solved") == 1.0
        if solved:
            wanted = list(tokens)
        elif template is not None and answer is not None and not split.endswith("_multi"):
            wanted = [answer[c] for c in shown]
        yield {
            "when": when,
            "setting": f"{split} {setting_name(setting)}",
            "id": i,
            "prompt": task.prompt(example),
            "template": "".join(template[c] for c in shown) if template else "",
            "tokens": tokens,
            "reveal_step": reveal,
            "log_prob": np.round(rollout.log_prob[i][shown], 4).tolist(),
            "entropy": np.round(rollout.entropy[i][shown], 4).tolist(),
            "steps": setting.steps,
            "reward": scores["reward"],
            "metrics": scores,
            "correct": [
                None if step < 0 or want is None else token == want
                for step, token, want in zip(reveal, tokens, wanted, strict=True)
            ],
            "grid": [len(grid), len(grid[0])] if grid else None,
        }
