"""Preference pairs from a file, and the stage that trains on them instead of on rollouts.

A file has one JSON object a line: "prompt", "chosen" and "rejected" texts, and maybe "template",
the completion with BLANK where the model fills (else all of it counts).
"""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from dmrl import data, parallel, stages, tokenizer
from dmrl.held import Held
from dmrl.programs import TrainState
from dmrl.recipe import Recipe
from dmrl.stages import StepResult


class Pairs(NamedTuple):
    """N pairs, tokenized: chosen before rejected on the axis of two."""

    prompt: NDArray[np.int32]
    """[N, P], padded on the left."""
    prompt_valid: NDArray[np.bool_]
    tokens: NDArray[np.int32]
    """[N, 2, L], padded with EOS, which counts up to the first one."""
    free: NDArray[np.bool_]
    """[N, 2, L] what the model would have filled."""


def read(path: str, tok: Any, prompt_length: int, length: int, mask_id: int, eos_id: int) -> Pairs:
    """The pairs of a JSONL file.

    Raises:
      ValueError: no such file or no line in it; a line, named by its number, that is no such
        object or whose texts do not fit; prompts longer than `prompt_length`.
    """
    if not Path(path).is_file():
        raise ValueError(f"preferences={path!r} is no file")
    prompts, tokens, free = [], [], []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = _texts(line)
            template = tokenizer.encode_template(tok, row.get("template"), length, mask_id)
            pair = [_completion(tok, row[name], length, eos_id) for name in ("chosen", "rejected")]
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        prompts.append(tokenizer.encode_prompt(tok, row["prompt"]))
        tokens.append(pair)
        free.append([np.array(template) == mask_id] * 2)
    if not prompts:
        raise ValueError(f"preferences={path!r} is empty")
    prompt, valid = tokenizer.pad_left(prompts, prompt_length, tok.pad_token_id)
    return Pairs(prompt, valid, np.array(tokens, np.int32), np.array(free))


def _texts(line: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON object ({error})") from error
    names = ("prompt", "chosen", "rejected")
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in names):
        raise ValueError(f"needs the texts {', '.join(names)}; it has {line[:80]}")
    return row


def _completion(tok: Any, text: str, length: int, eos_id: int) -> list[int]:
    ids = tokenizer.encode(tok, text)
    if len(ids) > length:
        raise ValueError(f"{text[:40]!r}... is {len(ids)} tokens, sampling.length is {length}")
    return ids + [eos_id] * (length - len(ids))


class Preferences(stages.Reinforce):
    """Stage 2 on pairs of a file: no sampling and no rewards, mu inner updates a step."""

    def __init__(self, recipe: Recipe, mesh: Any, held: Held) -> None:
        """Raises ValueError for pairs that cannot be read or are fewer than a step takes."""
        super().__init__(recipe, mesh, held)
        cfg, loop = recipe.model, recipe.loop
        ids = (cfg.mask_token_id, cfg.eos_token_id)
        lengths = (recipe.max_prompt_length, recipe.sampling.length)
        self.pairs = read(recipe.preferences, recipe.tokenizer, *lengths, *ids)
        seed = data.stream_seed(recipe.seed, self.name)
        self.batches = data.batches(len(self.pairs.prompt), loop.prompts_per_step, seed)

    def step(self, state: TrainState, number: int, index: np.ndarray, key: jax.Array) -> StepResult:
        """One update on the pairs `index`."""
        start, pairs = time.perf_counter(), self.pairs
        prompt, valid = data.bucketed(
            pairs.prompt[index], pairs.prompt_valid[index], self.recipe.prompt_buckets
        )
        rollout = stages.given(
            np.repeat(prompt, 2, axis=0),
            np.repeat(valid, 2, axis=0),
            pairs.tokens[index].reshape(-1, pairs.tokens.shape[-1]),
            pairs.free[index].reshape(-1, pairs.free.shape[-1]),
            group_size=2,
        )
        rollout = rollout._replace(reward=np.tile(np.array([1, 0], np.float32), len(index)))
        rollout = parallel.put(rollout, parallel.batch_sharding(self.programs.mesh))
        probes = (None,) * len(self.programs.terms)
        state, metrics = self.programs.update(state, self.held.frozen, [rollout], [probes], key)
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        seconds = time.perf_counter() - start
        values |= {
            "learning_rate": float(self.schedule(number * self.recipe.loop.num_iterations)),
            "time/update": seconds,
            "step_time": seconds,
        }
        return StepResult(state, values, [])
