"""The optimiser chain."""

import dataclasses

import optax

SCHEDULES = ("constant", "cosine")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with gradient clipping and warm-up."""

    learning_rate: float = 3e-6
    schedule: str = "constant"
    """After the warm-up: `constant`, or `cosine` down to `final_fraction` of the peak."""
    warmup_steps: int = 1
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.1
    clip_norm: float = 0.2
    """Global gradient norm above which the gradient is scaled down."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}: choose one of {SCHEDULES}")
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise ValueError(f"need {self.learning_rate=} > 0 and {self.clip_norm=} > 0")


def learning_rate(hp: Optimizer, updates: int) -> optax.Schedule:
    """Linear warm-up over `warmup_steps` updates, then the schedule, over `updates` in all."""
    final = hp.final_fraction * hp.learning_rate
    if hp.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0, hp.learning_rate, hp.warmup_steps, max(updates, hp.warmup_steps + 1), final
        )
    return optax.warmup_constant_schedule(0.0, hp.learning_rate, hp.warmup_steps)


def make(hp: Optimizer, updates: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW, all in the precision of the weights: train float32."""
    return optax.chain(
        optax.clip_by_global_norm(hp.clip_norm),
        optax.adamw(
            learning_rate(hp, updates),
            hp.b1,
            hp.b2,
            weight_decay=hp.weight_decay,
            mu_dtype="float32",
        ),
    )
