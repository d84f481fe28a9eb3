"""Rescue of groups without a right answer, by inpainting (IGPO, arXiv 2509.10396).

On the host, between a rollout and its update: which groups are all wrong, which pieces of a
reference trace are injected into new samples for them, and which of these take whose place.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@runtime_checkable
class Traced(Protocol):
    """A task that knows worked solutions."""

    def trace(self, example: Any) -> Sequence[tuple[str, bool]] | None:
        """A right completion in pieces, and which of them may be given away; None if unknown.

        No piece that may be given away holds the answer; where the answer fills the completion
        (a board) its parts may, but never all of them are given.
        """


class Traces(NamedTuple):
    """Tokenized traces of N examples (or of B rows, once indexed)."""

    tokens: NDArray[np.int32]  # [N, L]
    hintable: NDArray[np.bool_]  # [N, L]

    def of(self, index: NDArray[np.integer[Any]]) -> "Traces":
        """The traces of these examples, one a row."""
        return Traces(self.tokens[index], self.hintable[index])


def encode_traces(
    task: Any, examples: Sequence[Any], encode: Callable[[str], Sequence[int]], length: int
) -> Traces:
    """Traces of `examples` in `length` tokens, longer ones cut off.

    Each piece is encoded by itself, so that no token spans what may be given away and what may
    not.

    Raises:
      ValueError: the task has no traces, or none with a piece that may be given away.
    """
    name = type(task).__module__
    if not isinstance(task, Traced):
        raise ValueError(f"{name} has no reference traces: a rescue needs Task.trace")
    tokens = np.zeros((len(examples), length), np.int32)
    hintable = np.zeros(tokens.shape, np.bool_)
    for i, example in enumerate(examples):
        start = 0
        for text, allowed in task.trace(example) or ():
            ids = encode(text)[: length - start]
            tokens[i, start : start + len(ids)] = ids
            hintable[i, start : start + len(ids)] = allowed
            start += len(ids)
    if not hintable.any():
        raise ValueError(f"{name} has no trace with a piece to give away: set fraction=0")
    return Traces(tokens, hintable)


@dataclasses.dataclass(frozen=True)
class Rescue:
    """How groups are rescued. The range of eta is the paper's, which gives no other value."""

    fraction: float = 0.0
    """Largest share of a group that is replaced; 0: no rescue. 0.5 restores the most signal."""
    eta_min: float = 0.2
    eta_max: float = 0.6
    """The share of a trace's chunks that is injected is U[eta_min, eta_max] for each row."""
    chunk_min: int = 5
    chunk_max: int = 10
    """Tokens of a chunk, U{chunk_min..chunk_max}; single cells of a board: 1 and 1."""
    success: float = 1.0
    """Rewards from here on are those of right answers."""

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction} of a group: choose one in [0, 1]")
        if not 0 <= self.eta_min <= self.eta_max < 1:
            raise ValueError(
                f"eta_min={self.eta_min}, eta_max={self.eta_max}: need 0 <= eta_min <= eta_max < 1"
                " (a whole trace would be an answer)"
            )
        if not 1 <= self.chunk_min <= self.chunk_max:
            raise ValueError(
                f"chunk_min={self.chunk_min}, chunk_max={self.chunk_max}: need "
                "1 <= chunk_min <= chunk_max"
            )

    def all_wrong(
        self, reward: NDArray[np.floating[Any]], group: NDArray[np.integer[Any]]
    ) -> NDArray[np.bool_]:
        """[B] whether the rewards of a row's group [B] all tie below `success`."""
        _, index = np.unique(group, return_inverse=True)
        low, high = (np.full(index.max() + 1, start) for start in (np.inf, -np.inf))
        np.minimum.at(low, index, reward)
        np.maximum.at(high, index, reward)
        wrong: NDArray[np.bool_] = ((low == high) & (high < self.success))[index]
        return wrong

    def hints(
        self,
        traces: Traces,
        wrong: NDArray[np.bool_],
        row: NDArray[np.integer[Any]],
        seed: int,
        step: int,
        mask_id: int,
    ) -> NDArray[np.int32]:
        """[B,L] the tokens injected into the rows that are `wrong` [B], MASK elsewhere.

        The hintable tokens of a row's trace, in order, are cut into N chunks, and floor(eta N)
        of them are chosen: fewer than all. A function of (seed, step, row) for each row.
        """
        hints = np.full(traces.tokens.shape, mask_id, np.int32)
        for i in np.flatnonzero(wrong):
            rng = np.random.default_rng([seed, step, int(row[i])])
            places = self._choose(rng, np.flatnonzero(traces.hintable[i]))
            hints[i, places] = traces.tokens[i, places]
        return hints

    def _choose(self, rng: np.random.Generator, places: NDArray[np.int64]) -> NDArray[np.int64]:
        most = math.ceil(len(places) / self.chunk_min)
        ends = np.cumsum(rng.integers(self.chunk_min, self.chunk_max, most, endpoint=True))
        chunk = np.searchsorted(ends, np.arange(len(places)), side="right")
        count = int(chunk[-1]) + 1 if len(places) else 0
        eta = rng.uniform(self.eta_min, self.eta_max)
        chosen = rng.choice(count, _floor(eta * count), replace=False) if count else chunk
        return places[np.isin(chunk, chosen)]

    def replaced(
        self,
        reward: NDArray[np.floating[Any]],
        hinted_reward: NDArray[np.floating[Any]],
        group: NDArray[np.integer[Any]],
    ) -> NDArray[np.bool_]:
        """[B] the rows whose hinted completion takes their own place.

        In every group that is all wrong, min(right hinted completions, floor(fraction G)) of
        them: the first ones, which is as good as random as a group's rows are exchangeable.
        """
        right = self.all_wrong(reward, group) & (hinted_reward >= self.success)
        out = np.zeros(right.shape, np.bool_)
        for number in np.unique(group):
            members = np.flatnonzero(group == number)
            limit = _floor(self.fraction * len(members))
            out[members[right[members]][:limit]] = True
        return out


def _floor(x: float) -> int:
    """floor, for a product that a rounding error may have put just below an integer."""
    return math.floor(round(x, 9))
