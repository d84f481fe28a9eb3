"""What happened to one completion: which token came when, and how sure the model was of it.

A trace is plain JSON, text and not token ids, and all that `viewer` needs. It holds

    tokens        the final text of each shown position
    reveal_step   when each was filled last, as in `Rollout`
    log_prob, entropy   at that moment, in nats
    steps         T
    length        tokens up to and including the first EOS; None for a board
    changes       [step, position, text or None], what each step did to which position; None where
                  no revealed token ever changes: `reveal_step` then says it all
    answer        the text that would be right at each position, or None where that is not known
    grid, box     rows and columns of a board and of its boxes; None for text
    violation     {"step", "position", "against"}, see `first_violation`; None if there is none
    branches      [{"step", "state", "fills", "lengths", "reward", "advantage"}], see `branches`

Positions count what is shown, in reading order: all of a text, the cells of a board.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dmrl.types import Probe, Rollout

Change = tuple[int, int, str | None]
"""Denoising step, shown position, and what it holds from then on: a text, or None for a mask."""


@runtime_checkable
class Ruled(Protocol):
    """A task that shows a board and knows its rule: no unit holds one token twice."""

    @property
    def units(self) -> list[list[int]]:
        """Cells, counted along `Task.grid`: of Sudoku the rows, columns and boxes."""


class Reader(NamedTuple):
    """How to read token ids."""

    tok: Any
    mask_id: int
    eos_id: int


class Layout(NamedTuple):
    """Which positions of a completion are shown, and how."""

    positions: list[int]
    grid: tuple[int, int] | None = None
    """Rows and columns; None for text."""
    units: Sequence[Sequence[int]] = ()


def layout(task: Any, length: int) -> Layout:
    """The board of a task, or its whole completion of `length` tokens."""
    grid = task.grid
    if grid is None:
        return Layout(list(range(length)))
    units = task.units if isinstance(task, Ruled) else ()
    return Layout([c for row in grid for c in row], (len(grid), len(grid[0])), units)


def make(
    rollout: Rollout,
    i: int,
    steps: int,
    reader: Reader,
    shown: Layout,
    answer: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """The trace of row `i` of a rollout in numpy arrays, without branches.

    Where the rollout has `states` [B,T+1,L] the trace tells every remasked and edited token; else
    a token stays once it is revealed. Of a token that was taken back, only the step is known.

    Raises:
      ValueError: `states` does not lead to the rollout's tokens.
    """
    at = shown.positions
    tokens, reveal_step = rollout.tokens[i][at], rollout.reveal_step[i][at]
    final = texts(reader.tok, tokens)
    changes: list[Change] | None = None
    begun: list[str | None] = [
        text if step < 0 else None for text, step in zip(final, reveal_step, strict=True)
    ]
    if rollout.states is not None:
        states = np.asarray(rollout.states[i][:, at])
        _check(states, np.asarray(tokens), np.asarray(reveal_step) < steps)
        changes = _changes(reader, states)
        begun = _unmasked(reader, states[0])
    filled = np.flatnonzero((reveal_step >= 0) & (reveal_step < steps))
    by_step = sorted((int(reveal_step[p]), int(p), final[p]) for p in filled)
    return {
        "tokens": final,
        "reveal_step": reveal_step.tolist(),
        "log_prob": np.round(rollout.log_prob[i][at], 4).tolist(),
        "entropy": np.round(rollout.entropy[i][at], 4).tolist(),
        "steps": steps,
        "length": None if shown.grid else int(rollout.length[i]),
        "changes": changes,
        "answer": None if answer is None else list(answer),
        "grid": list(shown.grid) if shown.grid else None,
        "box": _box(shown),
        "violation": first_violation(begun, by_step if changes is None else changes, shown.units),
    }


def texts(tok: Any, tokens: Any) -> list[str]:
    """The text of each of `tokens` [n] by itself; '' for EOS and other special tokens.

    A piece of a character that several tokens spell is shown as the vocabulary writes it.
    """
    ids = [int(t) for t in tokens]
    known = {t: str(tok.decode([t], skip_special_tokens=True)) for t in set(ids)}
    for token, text in known.items():
        if "\N{REPLACEMENT CHARACTER}" in text:
            known[token] = str(tok.convert_ids_to_tokens(token))
    return [known[t] for t in ids]


def first_violation(
    begun: Sequence[str | None], changes: Iterable[Change], units: Sequence[Sequence[int]]
) -> dict[str, Any] | None:
    """The first cell whose token its unit already holds: {"step", "position", "against"}.

    A board is judged after each whole step, as all tokens of a step are chosen at once; of
    several cells that break the rule in one step the first in reading order counts. `against`:
    the cells, given ones among them, that hold the same token in a unit of `position`. A cell
    that merely rules out every solution breaks nothing yet: `answer` is what shows that.

    Args:
      begun: the text of each position before the first step, None for a mask.
      changes: by step.
      units: positions that may not hold one token twice.
    """
    cells = list(begun)
    for step, made in itertools.groupby(changes, key=lambda change: change[0]):
        news = [(position, text) for _, position, text in made]
        for position, text in news:
            cells[position] = text
        for position, text in sorted((p, t) for p, t in news if t is not None):
            seen = {c for unit in units if position in unit for c in unit if cells[c] == text}
            if len(seen) > 1:
                return {"step": step, "position": position, "against": sorted(seen - {position})}
    return None


def branches(
    probe: Probe, i: int, reader: Reader, shown: Layout, baseline: str
) -> list[dict[str, Any]]:
    """The states that row `i` was branched at and what it was filled with, one item a state.

    `step` is the denoising step that would have come next, `state` its texts with None for a mask,
    `fills` [Z][masks] the texts drawn for them, `lengths` [Z] tokens up to the first EOS (None for
    a board), `reward` and `advantage` [Z]: reward less the mean of all siblings, or of the others
    where `baseline` is "leave_one_out" (DiSPO eq. 3; `algorithms.advantage.within`).

    Args:
      probe: in numpy arrays, with its rewards.
    """
    assert probe.reward is not None
    found = []
    for k, step in enumerate(probe.step[i].tolist()):
        state = np.asarray(probe.state[i, k])[shown.positions]
        fills, reward = np.asarray(probe.fills[i, k]), np.asarray(probe.reward[i, k], np.float64)
        centred = reward - reward.mean()
        if baseline == "leave_one_out":
            centred *= len(reward) / (len(reward) - 1)
        drawn = fills[:, shown.positions][:, state == reader.mask_id]
        found.append(
            {
                "step": step,
                "state": _unmasked(reader, state),
                "fills": [texts(reader.tok, fill) for fill in drawn],
                "lengths": None if shown.grid else [_length(f, reader.eos_id) for f in fills],
                "reward": np.round(reward, 4).tolist(),
                "advantage": np.round(centred, 4).tolist(),
            }
        )
    return found


def _unmasked(reader: Reader, tokens: NDArray[Any]) -> list[str | None]:
    found = texts(reader.tok, tokens)
    return [None if t == reader.mask_id else x for t, x in zip(tokens, found, strict=True)]


def _length(tokens: NDArray[Any], eos_id: int) -> int:
    ends = np.flatnonzero(tokens == eos_id)
    return int(ends[0]) + 1 if len(ends) else len(tokens)


def _check(states: NDArray[Any], tokens: NDArray[Any], sampled: NDArray[np.bool_]) -> None:
    """What was never filled may be set afterwards: EOS, where the sampler stopped at one."""
    wrong = np.flatnonzero((states[-1] != tokens) & sampled)
    if len(wrong):
        raise ValueError(
            f"the last of {len(states)} states holds token {states[-1][wrong[0]]} at shown "
            f"position {wrong[0]}, the completion {tokens[wrong[0]]}: states must end with the "
            "final tokens"
        )


def _changes(reader: Reader, states: NDArray[Any]) -> list[Change]:
    """Every position that a step left different from how it found it, by step."""
    step, position = np.nonzero(states[1:] != states[:-1])
    news = _unmasked(reader, states[step + 1, position])
    return list(zip(step.tolist(), position.tolist(), news, strict=True))


def _box(shown: Layout) -> list[int] | None:
    """Rows and columns of the first unit that spans several of both."""
    if shown.grid is None:
        return None
    for unit in shown.units:
        box = [len({c // shown.grid[1] for c in unit}), len({c % shown.grid[1] for c in unit})]
        if min(box) > 1:
            return box
    return None
