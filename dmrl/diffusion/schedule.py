"""How many positions each denoising step reveals.

A fixed schedule is a list of counts for a block of `masked` masks and S steps; an adaptive one
looks at the model's answer and says which positions it trusts.
"""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dmrl.diffusion.order import Score, rank


class Block(NamedTuple):
    """A stretch of a completion and the steps that fill it."""

    start: int
    size: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Uniform:
    """masked // steps each, the first masked % steps one more: LLaDA (arXiv 2502.09992).

    For a partly given block this spreads what is left over all of the block's steps.
    """

    def counts(self, masked: int, steps: int) -> list[int]:
        """Reveals of each step, `masked` together."""
        base, more = divmod(masked, steps)
        return [base + (step < more) for step in range(steps)]


@dataclasses.dataclass(frozen=True)
class Linear:
    """What floor(masked (1 - i / steps)) leaves after step i, in float64.

    MDPO's schedule as its authors' code rounds it: 48 masks in 12 steps are some 5s and some 3s.
    """

    def counts(self, masked: int, steps: int) -> list[int]:
        """Reveals of each step, `masked` together."""
        return _falls(masked, [1 - i / steps for i in range(1, steps + 1)])


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Few at first: cos(pi i / 2 steps) of the masks are left after step i (arXiv 2202.04200)."""

    def counts(self, masked: int, steps: int) -> list[int]:
        """Reveals of each step, `masked` together."""
        left = [math.cos(math.pi / 2 * i / steps) for i in range(1, steps)]
        return _falls(masked, [*left, 0.0])


def _falls(masked: int, left: list[float]) -> list[int]:
    remaining = [masked, *(math.floor(masked * share) for share in left)]
    return [before - after for before, after in itertools.pairwise(remaining)]


@dataclasses.dataclass(frozen=True)
class Doubling:
    """2^i at step i of floor(log2 length), all that is left at the last: ASS (arXiv 2509.23924).

    Of `blocks` blocks the rightmost ones are the shares of the last steps, one step each; the
    leftmost block runs the steps before.
    """

    blocks: int = 1

    def counts(self, masked: int, steps: int) -> list[int]:
        """Reveals of each step, `masked` together."""
        early = [max(min(2**i, masked - 2**i + 1), 0) for i in range(steps - 1)]
        return [*early, masked - sum(early)]

    def layout(self, length: int) -> list[Block]:
        """The blocks from left to right.

        Raises:
          ValueError: more blocks than steps.
        """
        steps = self.steps(length)
        if not 1 <= self.blocks <= steps:
            raise ValueError(
                f"doubling:{self.blocks}, but {length} tokens make 1 to {steps} blocks"
            )
        first = steps - self.blocks + 1
        sizes = [2**first - 1, *(2**i for i in range(first, steps))]
        sizes[-1] = length - sum(sizes[:-1])
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        return [Block(starts[i], n, 1 if i else first) for i, n in enumerate(sizes)]

    def steps(self, length: int) -> int:
        """Denoising steps for `length` tokens."""
        return max(int(math.log2(length)), 1)


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Every position whose proposed token has at least this probability (Fast-dLLM, 2505.22618).

    The best-scored one in any case; `steps` bounds how many steps a block may take.
    """

    at: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.at <= 1:
            raise ValueError(f"at={self.at} must be a probability above 0")

    def trusts(
        self,
        score: Score,
        masked: Bool[Array, "b l"],
        log_p: Float[Array, "b l"],
        entropy: Float[Array, "b l"],
    ) -> Bool[Array, "b l"]:
        """The positions that may be revealed now; `log_p` and `entropy` at temperature 1."""
        del score, masked, entropy
        return log_p >= math.log(self.at)


@dataclasses.dataclass(frozen=True)
class EntropyBound:
    """The best-scored positions whose entropies without the largest sum to at most `nats`.

    EB-Sampler (arXiv 2505.24857): a bound of what is lost by revealing them independently. The
    best-scored one in any case; `steps` bounds how many steps a block may take.
    """

    nats: float = 0.1

    def __post_init__(self) -> None:
        if self.nats < 0:
            raise ValueError(f"nats={self.nats} must be >= 0")

    def trusts(
        self,
        score: Score,
        masked: Bool[Array, "b l"],
        log_p: Float[Array, "b l"],
        entropy: Float[Array, "b l"],
    ) -> Bool[Array, "b l"]:
        """The positions that may be revealed now; `log_p` and `entropy` at temperature 1."""
        del log_p
        place = rank(score, masked)
        upto = (place[:, None, :] <= place[:, :, None]) & masked[:, None, :]
        spent = jnp.where(upto, entropy[:, None, :], 0.0)
        return jnp.sum(spent, axis=-1) - jnp.max(spent, axis=-1) <= self.nats


SCHEDULES: dict[str, Any] = {
    "uniform": Uniform,
    "linear": Linear,
    "cosine": Cosine,
    "doubling": Doubling,
    "threshold": Threshold,
    "entropy_bound": EntropyBound,
}
ADAPTIVE = (Threshold, EntropyBound)


def equal_blocks(length: int, size: int, steps: int) -> list[Block]:
    """Blocks of `size`, the steps shared evenly."""
    count = length // size
    return [Block(i * size, size, steps // count) for i in range(count)]


def counts(rule: Any, blocks: list[Block], masked: Int[Array, "b n"]) -> Int[Array, "b t"]:
    """Reveals at every step of all blocks, in order, for rows with `masked` masks a block."""
    columns = []
    for i, block in enumerate(blocks):
        table = np.array([rule.counts(m, block.steps) for m in range(block.size + 1)], np.int32)
        columns.append(jnp.take(jnp.asarray(table), masked[:, i], axis=0))
    return jnp.concatenate(columns, axis=1)
