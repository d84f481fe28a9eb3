"""Rewards of rollouts and probes on the host, and what they say about a step."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dmrl import tokenizer
from dmrl.recipe import Recipe
from dmrl.types import HINT, Probe, Rollout

Put = Callable[[np.ndarray], jax.Array]
"""Lays rows out over the devices."""


class Scored(NamedTuple):
    """A chunk of a rollout with its rewards, and what the host read in it."""

    rollout: Rollout
    probes: tuple[Probe | None, ...]
    parts: list[dict[str, float]]
    texts: list[str]
    examples: Sequence[Any]
    calls: int
    """Texts that were scored: completions, fillings, and completions sampled again."""


def score(
    recipe: Recipe,
    put: Put,
    examples: Sequence[Any],
    rollout: Rollout,
    probes: Sequence[Probe | None],
) -> Scored:
    """Terminal rewards of the completions and of every probe filling, in one trip."""
    parts, texts = _rewards(recipe, examples, np.asarray(rollout.tokens))
    calls = len(parts)
    reward = np.array([p["reward"] for p in parts], np.float32)
    filled = []
    for probe in probes:
        if probe is not None:
            fills = np.asarray(probe.fills)
            copies = fills.shape[1] * fills.shape[2]
            repeated = [e for e in examples for _ in range(copies)]
            found, _ = _rewards(recipe, repeated, fills.reshape(-1, fills.shape[-1]))
            rewards = np.array([p["reward"] for p in found], np.float32)
            calls += len(found)
            probe = probe._replace(reward=put(rewards.reshape(fills.shape[:3])))
        filled.append(probe)
    rollout = rollout._replace(reward=put(reward))
    return Scored(rollout, tuple(filled), parts, texts, examples, calls)


def _rewards(
    recipe: Recipe, examples: Sequence[Any], tokens: np.ndarray
) -> tuple[list[dict[str, float]], list[str]]:
    model = recipe.model
    texts = tokenizer.decode(recipe.tokenizer, tokens, model.mask_token_id, model.eos_token_id)
    return [recipe.task.score(e, t) for e, t in zip(examples, texts, strict=True)], texts


def statistics(recipe: Recipe, scored: Sequence[Scored]) -> dict[str, float]:
    """What a step's rollout showed, under TRL's names."""
    rollout = jax.tree.map(
        lambda *xs: np.concatenate([np.asarray(x) for x in xs]), *(s.rollout for s in scored)
    )
    parts = [p for s in scored for p in s.parts]
    sampled = rollout.reveal_step >= 0
    values = {
        f"rewards/{name}/mean": float(np.mean([p[name] for p in parts]))
        for name in parts[0]
        if name != "reward"
    }
    values |= _spread("", rollout.reward.reshape(-1, recipe.loop.num_generations)) | {
        "entropy": float(np.mean(rollout.entropy[sampled])) if sampled.any() else 0.0,
        "completions/mean_length": float(np.mean(rollout.length)),
        "num_tokens": float(np.sum(sampled)),
        "reward_calls": float(sum(s.calls for s in scored)),
    }
    if recipe.rescue.fraction:
        values["rescued"] = float(np.mean(np.any(rollout.reveal_step == HINT, axis=1)))
    for i, term in enumerate(recipe.terms):
        found = [s.probes[i] for s in scored]
        rewards = [np.asarray(p.reward) for p in found if p is not None]
        if rewards:
            siblings = np.concatenate(rewards).reshape(-1, rewards[0].shape[-1])
            values |= _spread(f"{term.name}/step_", siblings)
    return values


def _spread(prefix: str, groups: np.ndarray) -> dict[str, float]:
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
