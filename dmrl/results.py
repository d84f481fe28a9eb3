"""Results of evaluations: under which protocol a number was taken, and whether two compare.

A protocol is everything that an accuracy depends on besides the model. Results are put side by
side only where all of it is the same.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = "results.json"


class DifferentProtocols(ValueError):
    """Two results do not belong in one column."""


def digest(value: Any) -> str:
    """16 hexadecimal digits that stand for a JSON-able value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def pass_at(rights: Sequence[int], samples: int, k: int) -> float:
    """pass@k: the chance that one of k samples is right, estimated without bias.

    Args:
      rights: of every question, how many of its `samples` are right.

    Source: Codex (arXiv 2107.03374), equation 1.
    """
    total = 0.0
    for right in rights:
        missed = 1.0
        for i in range(k):
            missed *= max(samples - right - i, 0) / (samples - i)
        total += 1 - missed
    return total / len(rights)


def read(place: str | Path) -> list[dict[str, Any]]:
    """The results in a file, or in the file results.json of a folder.

    Raises:
      ValueError: it is none that launch/evaluate.py wrote, or a hash is not that of its
        protocol.
      FileNotFoundError: there is none.
    """
    path = Path(place)
    path = path / FILE if path.is_dir() else path
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["results"]
        wrong = [r["hash"] for r in found if r["hash"] != digest(r["protocol"])]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of launch/evaluate.py ({error})") from None
    if wrong or not found:
        raise ValueError(f"{path}: {wrong or 'no results'}: not as launch/evaluate.py wrote it")
    return list(found)


def compare(one: str | Path, other: str | Path) -> list[tuple[str, str, str, str]]:
    """Rows (length, hash, accuracy of one, accuracy of the other), one for each protocol.

    Raises:
      DifferentProtocols: naming every field of the protocols that differs, for the first length
        at which they do; and as `read`.
    """
    mine, theirs = read(one), read(other)
    by_hash = {r["hash"]: r for r in theirs}
    for result in mine:
        if result["hash"] not in by_hash:
            _refuse(one, result, other, theirs)
    known = {r["hash"] for r in mine}
    for result in theirs:
        if result["hash"] not in known:
            _refuse(other, result, one, mine)
    return [
        (str(r["protocol"]["length"]), r["hash"], shown(r), shown(by_hash[r["hash"]])) for r in mine
    ]


def _refuse(
    one: Any, result: Mapping[str, Any], other: Any, candidates: Sequence[Mapping[str, Any]]
) -> None:
    nearest = min(candidates, key=lambda r: len(differences(result, r)))
    told = "; ".join(
        f"{name} {a!r} and {b!r}" for name, (a, b) in differences(result, nearest).items()
    )
    raise DifferentProtocols(
        f"not comparable: {one} at length {result['protocol']['length']} ({result['hash']}) has "
        f"no result of the same protocol in {other} (nearest {nearest['hash']}): {told}"
    )


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields in which two protocols differ, with both values (None where one lacks it)."""
    a, b = one["protocol"], other["protocol"]
    names = sorted(a.keys() | b.keys())
    return {n: (a.get(n), b.get(n)) for n in names if a.get(n) != b.get(n)}


def shown(result: Mapping[str, Any]) -> str:
    """An accuracy in per cent with its interval; of boards, cells and boards apart."""
    text = f"{100 * result['accuracy']:.1f}"
    if result["accuracy_95"]:
        low, high = result["accuracy_95"]
        text += f" [{100 * low:.1f}, {100 * high:.1f}]"
    if "cell_accuracy" in result:
        text += f" (cells {100 * result['cell_accuracy']:.1f}, "
        text += f"boards {100 * result['board_accuracy']:.1f})"
    return text
