"""How to decode: the options of the sampler, checked before anything runs."""

import dataclasses
import functools
from typing import Any, NamedTuple

from dmrl.diffusion.order import ORDERS, STOCHASTIC, Learned
from dmrl.diffusion.remask import RULES, Keep, Rcr
from dmrl.diffusion.rules import rule
from dmrl.diffusion.schedule import ADAPTIVE, SCHEDULES, Block, Doubling, equal_blocks


class Cache(NamedTuple):
    """What of the keys and values of a block's first step is used again at its next ones."""

    kind: str
    """`prefix`: those of everything before the block; `dual`: of everything but the block."""
    every: int
    """Steps from one full forward to the next."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to decode `length` tokens in `steps` denoising steps, block by block.

    `schedule`, `order`, `remask` and `cache` are rules by name, some with values: `threshold:0.9`.
    """

    length: int
    steps: int
    block_length: int
    temperature: float = 0.0
    """Gumbel temperature of the proposed tokens; 0 takes the argmax."""
    order: str = "low_confidence"
    """Which positions next: a name of `order.ORDERS`."""
    cfg_scale: float = 0.0
    """Classifier-free guidance: u + (scale + 1)(c - u), u with the prompt masked."""
    schedule: str = "uniform"
    """How many at a step: a name of `schedule.SCHEDULES`."""
    top_p: float = 1.0
    """Tokens outside the nucleus of this mass (at `temperature`) are not proposed."""
    remask: str = "none"
    """What is masked again: a name of `remask.RULES`."""
    cache: str = "none"
    """`prefix` or `dual`: later steps of a block read keys and values of its first step, an
    approximation (Fast-dLLM, arXiv 2505.22618); `dual:4` refreshes them every 4 steps."""

    def __post_init__(self) -> None:
        for check in (
            self._check_blocks,
            self._check_numbers,
            self._check_rules,
            self._check_cache,
        ):
            check()

    def _check_blocks(self) -> None:
        if self.block_length < 1 or self.length % self.block_length:
            raise ValueError(
                f"block_length={self.block_length} does not divide length={self.length}; "
                f"choose one of {_divisors(self.length)}"
            )
        doubling = self.schedule_rule
        if isinstance(doubling, Doubling):
            wanted = (self.length, doubling.steps(self.length))
            if (self.block_length, self.steps) != wanted:
                raise ValueError(
                    f"schedule={self.schedule!r} has blocks and steps of its own: for "
                    f"length={self.length} set block_length={wanted[0]} and steps={wanted[1]}, "
                    f"not {self.block_length} and {self.steps}"
                )
            doubling.layout(self.length)
        elif self.steps < 1 or self.steps % self.blocks or self.steps > self.length:
            valid = [self.blocks * n for n in range(1, self.block_length + 1)]
            raise ValueError(
                f"steps={self.steps} must be a multiple of the {self.blocks} block(s) "
                f"(length={self.length}, block_length={self.block_length}) and at most "
                f"{self.length}; choose one of {_shorten(valid)}"
            )

    def _check_numbers(self) -> None:
        if self.temperature < 0 or self.cfg_scale < 0:
            raise ValueError(
                f"temperature={self.temperature} and cfg_scale={self.cfg_scale} must be >= 0"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")

    def _check_rules(self) -> None:
        noisy = isinstance(self.order_rule, STOCHASTIC)
        if isinstance(self.remask_rule, Rcr) and noisy:
            raise ValueError(
                f"remask={self.remask!r} masks the least confident again, but order={self.order!r} "
                "scores at random: choose an order that measures confidence"
            )
        if self.learned and self.cfg_scale:
            raise ValueError(
                f"order={self.order!r} reads no guidance: set cfg_scale={self.cfg_scale} to 0"
            )
        if self.adaptive and self.remasks:
            raise ValueError(
                f"remask={self.remask!r} needs a schedule that says how many masks are left, "
                f"which schedule={self.schedule!r} does not"
            )

    def _check_cache(self) -> None:
        kind, per_block = self.cache.partition(":")[0], self.steps // self.blocks
        if kind not in ("none", "prefix", "dual"):
            raise ValueError(f"cache={self.cache!r}: choose one of none, prefix, dual")
        every = self.cache_rule.every
        if kind == "none" and self.cache != "none":
            raise ValueError(f"cache={self.cache!r}: there is nothing to refresh; say 'none'")
        if every < 1 or per_block % every:
            raise ValueError(
                f"cache={self.cache!r} must be refreshed every n of the {per_block} steps of a "
                f"block; choose n from {_divisors(per_block)}"
            )
        if kind == "none":
            return
        other = {"remask": self.remasks, "cfg_scale": bool(self.cfg_scale)}
        other["schedule"] = isinstance(self.schedule_rule, Doubling)
        other["order"] = self.learned
        for name in (n for n, used in other.items() if used):
            raise ValueError(
                f"cache={self.cache!r} does not go with {name}={getattr(self, name)!r}: "
                "it keeps what only one block at a time may change"
            )

    @property
    def blocks(self) -> int:
        """Number of blocks of `block_length`."""
        return self.length // self.block_length

    @functools.cached_property
    def layout(self) -> list[Block]:
        """The blocks from left to right and their steps."""
        if isinstance(self.schedule_rule, Doubling):
            return self.schedule_rule.layout(self.length)
        return equal_blocks(self.length, self.block_length, self.steps)

    @functools.cached_property
    def order_rule(self) -> Any:
        """The order with its values."""
        return rule("order", self.order, ORDERS)

    @functools.cached_property
    def schedule_rule(self) -> Any:
        """The schedule with its values."""
        return rule("schedule", self.schedule, SCHEDULES)

    @functools.cached_property
    def remask_rule(self) -> Any:
        """The rule of remasking with its values."""
        return rule("remask", self.remask, RULES)

    @functools.cached_property
    def cache_rule(self) -> Cache:
        """The cache; one that is refreshed at every step if there is none."""
        kind, _, every = self.cache.partition(":")
        default = 1 if kind == "none" else self.steps // self.blocks
        return Cache(kind, int(every) if every.isdigit() else default if not every else 0)

    @property
    def learned(self) -> bool:
        """Whether an unmasking policy decides which positions are next."""
        return isinstance(self.order_rule, Learned)

    @property
    def greedy(self) -> "Sampling":
        """The same without noise on tokens, or on the positions that a policy chooses."""
        order = self.order
        if self.learned:
            order = f"learned:0,{self.order_rule.top_k}" if self.order_rule.top_k else "learned"
        return dataclasses.replace(self, temperature=0.0, order=order)

    @property
    def adaptive(self) -> bool:
        """Whether the model's answer decides how many positions a step reveals."""
        return isinstance(self.schedule_rule, ADAPTIVE)

    @property
    def remasks(self) -> bool:
        """Whether a revealed token may change."""
        return not isinstance(self.remask_rule, Keep)

    @property
    def approximate(self) -> bool:
        """Whether the predictions are not quite the model's."""
        return self.cache_rule.every > 1


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _shorten(values: list[int]) -> str:
    head = ", ".join(map(str, values[:8]))
    return head if len(values) <= 8 else f"{head}, ... {values[-1]}"
