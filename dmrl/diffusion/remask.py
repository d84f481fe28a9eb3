"""Revealed tokens that become masks again.

A rule gets the scores of the open positions, which of them are masked and which it may take
back, how many masks the schedule reveals now and leaves afterwards. It says which positions are
revealed and which are masked again, so that as many stay masked as the schedule wants.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmrl.diffusion.order import Score, select_top
from dmrl.types import RowKeys


class Turn(NamedTuple):
    """One step of a sampler that may change its mind: the positions up to the block's end."""

    score: Score
    masked: Bool[Array, "b l"]
    revealed: Bool[Array, "b l"]
    """Sampled before, so not of the template."""
    confidence: Float[Array, "b l"]
    """The score with which a token was revealed last; +inf where none was."""
    lose: Int[Array, " b"]
    """Masks to lose at this step."""
    remain: Int[Array, " b"]
    """Masks to have after it, up to the block's end."""
    keys: RowKeys


Change = tuple[Bool[Array, "b l"], Bool[Array, "b l"], Float[Array, "b l"]]
"""(revealed now, masked again, confidence after)."""


@dataclasses.dataclass(frozen=True)
class Keep:
    """What is revealed stays."""

    def change(self, turn: Turn) -> Change:
        """The best-scored masks are revealed."""
        chosen = select_top(turn.score, turn.masked, turn.lose)
        return chosen, jnp.zeros_like(chosen), turn.confidence


@dataclasses.dataclass(frozen=True)
class Rcr:
    """Running-confidence remasking (MDPO, arXiv 2508.13148): everything is predicted, and the
    least confident of all tokens so far, also of earlier blocks, are masked again.

    The confidence of a token that was masked again and predicted anew is the larger one (`keep`
    = max, the paper) or the later one (last, the authors' code).
    """

    keep: str = "max"

    def __post_init__(self) -> None:
        if self.keep not in ("max", "last"):
            raise ValueError(f"keep={self.keep!r}: choose max or last")

    def change(self, turn: Turn) -> Change:
        """All masks but the `remain` least confident tokens."""
        best = turn.score
        if self.keep == "max":
            before = jnp.where(jnp.isinf(turn.confidence), -jnp.inf, turn.confidence)
            best = jnp.maximum(before, turn.score)
        confidence = jnp.where(turn.masked, best, turn.confidence)
        again = select_top(-confidence, turn.masked | turn.revealed, turn.remain)
        return turn.masked & ~again, again, confidence


@dataclasses.dataclass(frozen=True)
class Remdm:
    """Every revealed token of the block is masked again with probability sigma, and as many
    more are revealed: ReMDM-cap (arXiv 2503.00307), sigma = min(eta, (1 - alpha_s) / alpha_t)
    where alpha_t is the share of the block that is revealed before the step, alpha_s after it.

    Never so many that the masks would not suffice to follow the schedule.
    """

    eta: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.eta <= 1:
            raise ValueError(f"eta={self.eta} must be a probability above 0")

    def change(self, turn: Turn) -> Change:
        """Draws what is masked again, and reveals the best-scored in its place."""
        sigma = jnp.minimum(self.eta, turn.remain / jnp.maximum(jnp.sum(turn.revealed, -1), 1))
        shape = turn.score.shape[1:]
        drawn = jax.vmap(lambda key: jax.random.uniform(key, shape))(turn.keys)
        spare = jnp.sum(turn.masked, axis=-1) - turn.lose
        again = select_top(-drawn, turn.revealed & (drawn < sigma[:, None]), spare)
        chosen = select_top(turn.score, turn.masked, turn.lose + jnp.sum(again, axis=-1))
        return chosen, again, turn.confidence


RULES: dict[str, Any] = {"none": Keep, "rcr": Rcr, "remdm": Remdm}
