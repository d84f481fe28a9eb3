"""Worked solutions in pieces, of which some may be given away (see `dmrl.rescue`)."""

import itertools
import re
from collections.abc import Iterable

Pieces = list[tuple[str, bool]]
"""A right completion piece by piece, and which of them may be given away."""


def merged(pieces: Iterable[tuple[str, bool]]) -> Pieces:
    """The same text in as few pieces as there are runs."""
    return [
        ("".join(text for text, _ in run), allowed)
        for allowed, run in itertools.groupby(pieces, key=lambda piece: piece[1])
    ]


def around(completion: str, solution: str, answer: str) -> Pieces | None:
    """The pieces of a `completion` that holds `solution`, a text that reasons up to `answer`.

    What follows the solution may not be given away, nor its last sentence, nor any with a box or
    with the answer in it as it is spelled, spaces and separators of thousands aside. (An answer
    spelled in another way, "two" for 2, is not found.) None without a solution.
    """
    if not solution or solution not in completion:
        return None
    before, _, after = completion.partition(solution)
    sentences = re.split(r"(?<=[.!?\n])(?=\s|$)", solution)
    while len(sentences) > 1 and not sentences[-1].strip():
        after = sentences.pop() + after
    told = [_tells(sentence, answer) for sentence in sentences]
    told[-1] = True
    inside = ((text, not kept) for text, kept in zip(sentences, told, strict=True))
    return merged([(before, bool(before)), *inside, (after, False)])


def _tells(sentence: str, answer: str) -> bool:
    """Whether a sentence has a box or the answer in it, as no part of a longer word or number."""
    if re.search(r"\\(?:boxed|fbox)\b", sentence):
        return True
    for spelled, text in ((answer, sentence), (_joined(answer), _joined(sentence))):
        pattern = r"\s*".join(map(re.escape, re.sub(r"\s", "", spelled)))
        first, last = (_edge(spelled[:1], "<"), _edge(spelled[-1:], ""))
        if re.search(f"{first}{pattern}{last}", text):
            return True
    return False


def _joined(text: str) -> str:
    """Without separators of thousands."""
    return re.sub(r"(?<=[0-9])(?:\{,\}|,(?:\\!)?|\\,)(?=[0-9])", "", text)


def _edge(character: str, behind: str) -> str:
    """What must not stand beside an answer that begins or ends so: units may, more digits not."""
    if character.isdigit():
        return f"(?{behind}![0-9])"
    return f"(?{behind}![A-Za-z])" if character.isalpha() else ""
