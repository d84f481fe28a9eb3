"""The optimiser chain."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import optax

SCHEDULES = ("constant", "cosine")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with gradient clipping and warm-up."""

    learning_rate: float = 3e-6
    schedule: str = "constant"
    """After the warm-up: `constant`, or `cosine` down to `final_fraction` of the peak."""
    warmup_steps: int = 1
    """Updates over which the rate rises linearly from 0: the first update has rate 0."""
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.1
    clip_norm: float = 0.2
    """Global gradient norm above which the gradient is scaled down."""
    heads_learning_rate: float = 1e-3
    """Of the heads beside the policy, if a term has any: constant, with an Adam of their own."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}: choose one of {SCHEDULES}")
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise ValueError(f"need {self.learning_rate=} > 0 and {self.clip_norm=} > 0")
        if self.heads_learning_rate <= 0:
            raise ValueError(f"heads_learning_rate={self.heads_learning_rate} must be positive")


def learning_rate(hp: Optimizer, updates: int) -> optax.Schedule:
    """Linear warm-up over `warmup_steps` updates, then the schedule, over `updates` in all."""
    final = hp.final_fraction * hp.learning_rate
    if hp.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0, hp.learning_rate, hp.warmup_steps, max(updates, hp.warmup_steps + 1), final
        )
    return optax.warmup_constant_schedule(0.0, hp.learning_rate, hp.warmup_steps)


class WithHeads(NamedTuple):
    """Optimiser state of a tree that has heads."""

    policy: optax.OptState
    heads: optax.OptState


def make(hp: Optimizer, updates: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW, all in the precision of the weights: train float32.

    The top-level entry 'heads' of the trained tree, where there is one, has an Adam of its own:
    it neither counts in the norm nor is scaled by it. Without it the state is that of the policy.
    """
    policy = optax.chain(
        optax.clip_by_global_norm(hp.clip_norm),
        optax.adamw(
            learning_rate(hp, updates),
            hp.b1,
            hp.b2,
            weight_decay=hp.weight_decay,
            mu_dtype="float32",
        ),
    )
    heads = optax.adam(hp.heads_learning_rate, hp.b1, hp.b2)

    def init(params: Any) -> Any:
        if not _has_heads(params):
            return policy.init(params)
        return WithHeads(policy.init(_without_heads(params)), heads.init(params["heads"]))

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        if not _has_heads(grads):
            return policy.update(grads, state, params)
        main, main_state = policy.update(
            _without_heads(grads), state.policy, _without_heads(params)
        )
        own, own_state = heads.update(grads["heads"], state.heads)
        return {**main, "heads": own}, WithHeads(main_state, own_state)

    return optax.GradientTransformation(init, update)


def _has_heads(tree: Any) -> bool:
    return isinstance(tree, Mapping) and "heads" in tree


def _without_heads(tree: Any) -> dict[str, Any]:
    return {name: leaf for name, leaf in tree.items() if name != "heads"}
