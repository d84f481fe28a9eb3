"""Rewards of rollouts and probes on the host, and what they say about a step.

Each process scores its share of the texts; every process gets all rewards.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from dmrl import models, parallel, processes, tokenizer
from dmrl.recipe import Recipe
from dmrl.tasks import Task
from dmrl.types import HINT, Probe, Rollout

Floats = NDArray[np.floating[Any]]


class Scored(NamedTuple):
    """A chunk of a rollout with its rewards."""

    rollout: Rollout
    probes: tuple[Probe | None, ...]
    """Both on the devices, still without rewards: see `rewarded`."""
    host: Any
    """The rollout in numpy arrays, without states and drafts."""
    parts: dict[str, Floats]
    """The task's metrics by name, each [B], 'reward' among them."""
    step_rewards: tuple[Floats | None, ...]
    """Rewards of each term's fillings [B,K,Z]."""
    examples: Sequence[Any]
    calls: int
    """Texts that were scored: completions, fillings, and completions sampled again."""


def rewards(
    task: Task,
    tok: Any,
    model: models.Config,
    examples: Sequence[Any],
    tokens: NDArray[np.int32],
    whole: bool = False,
) -> dict[str, Floats]:
    """The task's metrics of completions [B,L] up to EOS, or `whole`; each [B], float64."""
    names: list[str] = []

    def work(rows: NDArray[np.int64]) -> Floats:
        ids = (model.mask_token_id, model.eos_token_id)
        texts = tokenizer.decode(tok, tokens[rows], *ids, whole)
        found = [task.score(examples[i], text) for i, text in zip(rows, texts, strict=True)]
        names[:] = found[0]
        return np.array([[parts[name] for name in names] for parts in found], np.float64)

    table = processes.shared_rows(len(tokens), work)
    return dict(zip(names, table.T, strict=True))


def score(
    recipe: Recipe, examples: Sequence[Any], rollout: Rollout, probes: Sequence[Probe | None]
) -> Scored:
    """Terminal rewards of the completions and of every probe filling."""
    host = parallel.gather(rollout._replace(states=None, drafts=None))

    def scored(examples: Sequence[Any], tokens: NDArray[np.int32]) -> dict[str, Floats]:
        whole = recipe.loop.whole_text
        return rewards(recipe.task, recipe.tokenizer, recipe.model, examples, tokens, whole)

    def step_rewards(probe: Probe) -> Floats:
        fills = parallel.gather(probe.fills)
        copies = fills.shape[1] * fills.shape[2]
        repeated = [e for e in examples for _ in range(copies)]
        found = scored(repeated, fills.reshape(-1, fills.shape[-1]))["reward"]
        return found.astype(np.float32).reshape(fills.shape[:3])

    parts = scored(examples, host.tokens)
    steps = tuple(None if probe is None else step_rewards(probe) for probe in probes)
    calls = len(host.tokens) + sum(r.size for r in steps if r is not None)
    return Scored(rollout, tuple(probes), host, parts, steps, examples, calls)


def rewarded(
    scored: Scored, put: Callable[[Floats], jax.Array]
) -> tuple[Rollout, tuple[Probe | None, ...]]:
    """The rollout and its probes with their rewards, which `put` lays out over the devices."""
    probes = tuple(
        None if probe is None or reward is None else probe._replace(reward=put(reward))
        for probe, reward in zip(scored.probes, scored.step_rewards, strict=True)
    )
    reward = scored.parts["reward"].astype(np.float32)
    return scored.rollout._replace(reward=put(reward)), probes


def statistics(recipe: Recipe, scored: Sequence[Scored]) -> dict[str, float]:
    """What a step's rollout showed, under TRL's names."""
    rollout = jax.tree.map(lambda *xs: np.concatenate(xs), *(s.host for s in scored))
    parts = {name: np.concatenate([s.parts[name] for s in scored]) for name in scored[0].parts}
    reward = parts.pop("reward").astype(np.float32)
    sampled = (rollout.reveal_step >= 0) & (rollout.reveal_step < recipe.sampling.steps)
    values = {f"rewards/{name}/mean": float(np.mean(values)) for name, values in parts.items()}
    values |= _spread("", reward.reshape(-1, recipe.loop.num_generations)) | {
        "entropy": float(np.mean(rollout.entropy[sampled])) if sampled.any() else 0.0,
        "completions/mean_length": float(np.mean(rollout.length)),
        "num_tokens": float(np.sum(sampled)),
        "reward_calls": float(sum(s.calls for s in scored)),
    }
    if recipe.rescue.fraction:
        values["rescued"] = float(np.mean(np.any(rollout.reveal_step == HINT, axis=1)))
    for i, term in enumerate(recipe.terms):
        steps = [r for s in scored if (r := s.step_rewards[i]) is not None]
        if steps:
            siblings = np.concatenate(steps).reshape(-1, steps[0].shape[-1])
            values |= _spread(f"{term.name}/step_", siblings)
    return values


def _spread(prefix: str, groups: Floats) -> dict[str, float]:
    """Mean reward, mean within-group std, and the share of groups without a signal.

    The mean alone where a group is one filling.
    """
    if groups.shape[1] == 1:
        return {f"{prefix}reward": float(groups.mean())}
    std = groups.std(axis=1)
    zero = f"{prefix.removesuffix('step_')}frac_reward_zero_std"
    return {
        f"{prefix}reward": float(groups.mean()),
        f"{prefix}reward_std": float(std.mean()),
        zero: float(np.mean(std == 0)),
    }
